# Sourced from the repository root. Afterwards `python` and `torchrun` are those of .venv, which has what
# requirements/cpu.txt lists and is made or brought up to date if need be. With PYTHON set to another interpreter, those
# beside it are taken as they are: `PYTHON=/usr/bin/python bash tests/run.sh` in a container that brings everything.
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$PWD/.venv/bin/python"
    installed=.venv/installed_requirements.txt # written after the installation, so one that was cut short is repeated
    if ! cmp --silent requirements/cpu.txt "$installed" || ! "$PYTHON" -c ""; then
        base="$(command -v python3.11 || command -v python3)" || { echo "error: there is no python3" >&2; exit 2; }
        echo "Installing requirements/cpu.txt into .venv with $base (only this once) ..." >&2
        "$PYTHON" -c "" 2>/dev/null || "$base" -m venv --clear .venv
        "$PYTHON" -m pip install --quiet --requirement requirements/cpu.txt
        cp requirements/cpu.txt "$installed"
    fi
fi
command -v "$PYTHON" >/dev/null || { echo "error: PYTHON ($PYTHON) must be an interpreter" >&2; exit 2; }
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
export PATH
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # tools and examples import the package from here
