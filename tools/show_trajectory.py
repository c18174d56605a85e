"""A run as one HTML page that opens from disk: settings, curves, warnings, and its trajectories step by step.

    python tools/show_trajectory.py --run runs/quickstart                        # writes runs/quickstart/report.html
    python tools/show_trajectory.py --run runs/quickstart --output page.html

It works on a run that is still going on too. What there is to see of trajectories is what the run has kept, as
`logging.trajectory_interval` and `logging.num_trajectories` say.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run directory (`logging.directory`)")
    parser.add_argument("--output", type=Path, help="page to write; default: report.html in the run directory")
    arguments = parser.parse_args()

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        from megatron_opdlm.observability.report import write_report

        print(write_report(arguments.run, output=arguments.output))


if __name__ == "__main__":
    main()
