#!/usr/bin/env bash
# Qwen3-0.6B, the paper's general recipe: this node's part of a run on 8 GPUs.
#
#   bash examples/qwen3_0.6b/run.sh [--section.field value ...]
#
# launch/recipe.sh says which variables it reads.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch/recipe.sh" examples/qwen3_0.6b "$@"
