#!/usr/bin/env bash
# Style and the CPU suite, as in continuous integration. Arguments go to pytest: `bash tests/run.sh tests/unit -x`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source requirements/make_environment.sh
python -c "import triton" 2>/dev/null || python -m pip install --quiet --requirement requirements/tests.txt

python -m ruff check .
python -m ruff format --check .
# Tests start several processes; one thread in each keeps them from crowding each other out.
OMP_NUM_THREADS=1 python -m pytest --durations=15 "$@"
