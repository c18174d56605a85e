#!/usr/bin/env bash
# Style (Python, shell, Dockerfiles) and the CPU suite, as in continuous integration. Arguments go to pytest:
# `bash tests/run.sh tests/unit -x`.
# `bash tests/run.sh --lane latest ...`, with --lane in front, does the same under the newest Megatron-Core: README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lane=cpu
if [[ "${1:-}" == --lane ]]; then
    lane="${2:-}"
    [[ "$lane" == cpu || "$lane" == latest ]] || { echo "error: --lane ($lane) must be cpu or latest" >&2; exit 2; }
    shift 2
fi
source requirements/make_environment.sh
python -c "import triton" 2>/dev/null || python -m pip install --quiet --requirement requirements/tests.txt

python -m ruff check .
python -m ruff format --check .
mapfile -t scripts < <(find . -name '.?*' ! -name .ci -prune -o -name runs -prune -o \
    -type f \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print)
shellcheck --external-sources "${scripts[@]}"
hadolint Dockerfile Dockerfile.cpu
# Tests start several processes; one thread in each keeps them from crowding each other out.
export OMP_NUM_THREADS=1
(($# == 0)) || exec python -m pytest --durations=15 "$@"
# First what is one process a test, two at a time; then, one at a time, what takes all cores itself.
status=0
python -m pytest --durations=15 --numprocesses 2 --dist loadfile tests/unit tests/parity || status=1
python -m pytest --durations=15 tests/distributed tests/end_to_end tests/gpu || status=1
exit $status
