"""Train a block-diffusion student from an autoregressive teacher.

torchrun --nproc-per-node 8 -m megatron_opdlm.train --config recipe.yaml --training.max_steps 3
"""

from __future__ import annotations

import sys

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config


def main(arguments: list[str] | None = None) -> None:
    """Parses, checks, trains. A user's mistake ends in one line and exit code 2."""
    with user_errors():
        config = load_config(
            arguments,
            required=("student", "teacher", "data.train_files", "validation"),
            description=__doc__.splitlines()[0],
        )
        _train(config)


def _train(config: Config) -> None:
    # torch and Megatron are imported only when there is something to train, so `--help` answers at once
    from megatron_opdlm.config.check import check_config
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import shut_down, world_size
    from megatron_opdlm.training.interruption import EXIT_CODE
    from megatron_opdlm.training.trainer import Trainer

    check_config(config, world_size())
    set_up_logging()
    is_done = Trainer(config).run()
    shut_down()
    if not is_done:
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main(sys.argv[1:])
