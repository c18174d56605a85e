#!/usr/bin/env bash
# What the containers start: says what they consist of, then runs the command.
set -euo pipefail
python -m megatron_opdlm.versions --devices >&2
exec "$@"
