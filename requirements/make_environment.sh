# Sourced from the repository root. Afterwards $PYTHON is an interpreter that has what requirements/cpu.txt lists:
# the one in .venv, which is made or brought up to date if need be. With PYTHON already set, that one is taken as it
# is, e.g. `PYTHON=python bash tests/run.sh` in a container that brings everything.
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=.venv/bin/python
    installed=.venv/installed_requirements.txt # written after the installation, so one that was cut short is repeated
    if ! cmp --silent requirements/cpu.txt "$installed" || ! "$PYTHON" -c ""; then
        base="$(command -v python3.11 || command -v python3)" || { echo "error: no python3.11 or python3" >&2; exit 2; }
        echo "Installing requirements/cpu.txt into .venv with $base (only this once) ..." >&2
        "$PYTHON" -c "" 2>/dev/null || "$base" -m venv --clear .venv
        "$PYTHON" -m pip install --quiet --requirement requirements/cpu.txt
        cp requirements/cpu.txt "$installed"
    fi
fi
export PYTHON
