# shellcheck shell=bash
# Sourced from the repository root. Afterwards `python` and `torchrun` are those of an environment that has what the
# list of the lane names, and that is made or brought up to date if need be:
#
#   lane=cpu      requirements/cpu.txt in .venv, Python 3.11; the lane unless the script that sources this sets another
#   lane=latest   requirements/latest.txt in .venv-latest, with the Python 3.12 that PYTHON312 names, or python3.12
#
# With PYTHON set to another interpreter, the first lane takes it and what is beside it as they are:
# `PYTHON=/usr/bin/python bash tests/run.sh` in a container that brings everything.
refuse() { echo "error: $*" >&2; exit 2; }

install() { # install ENVIRONMENT BASE_INTERPRETER: what the lane lists; sets PYTHON
    local wanted installed="$1/installed_requirements.txt" # written last, so one that was cut short is repeated
    PYTHON="$PWD/$1/bin/python"
    wanted="$(cat requirements/both_lanes.txt "requirements/$lane.txt" requirements/evalplus.txt)"
    if [[ ! -f "$installed" || "$wanted" != "$(cat "$installed")" ]] || ! "$PYTHON" -c ""; then
        echo "Installing requirements/$lane.txt into $1 with $2 (only this once) ..." >&2
        "$PYTHON" -c "" 2>/dev/null || "$2" -m venv --clear "$1"
        "$PYTHON" -m pip install --quiet --requirement "requirements/$lane.txt"
        "$PYTHON" -m pip install --quiet --no-deps --requirement requirements/evalplus.txt
        echo "$wanted" >"$installed"
    fi
}

lane="${lane:-cpu}"
if [[ "$lane" == latest ]]; then
    [[ -z "${PYTHON:-}" ]] || refuse "PYTHON ($PYTHON) must be unset: --lane latest has an environment of its own"
    base="${PYTHON312:-python3.12}"
    [[ "$("$base" -c 'import sys; print(sys.version_info[:2] == (3, 12))' 2>/dev/null)" == True ]] ||
        refuse "PYTHON312 ($base) must be a Python 3.12, which --lane latest needs"
    install .venv-latest "$base"
elif [[ -z "${PYTHON:-}" ]]; then
    base="$(command -v python3.11 || command -v python3)" || refuse "there is no python3"
    install .venv "$base"
fi
command -v "$PYTHON" >/dev/null || refuse "PYTHON ($PYTHON) must be an interpreter"
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
export PATH
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # tools and examples import the package from here
