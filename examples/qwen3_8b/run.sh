#!/usr/bin/env bash
# Qwen3-8B, the paper's general recipe: this node's part of a run on 8 GPUs.
#
#   bash examples/qwen3_8b/run.sh [--section.field value ...]
#
# launch/recipe.sh says which variables it reads.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch/recipe.sh" examples/qwen3_8b "$@"
