#!/usr/bin/env bash
# Qwen3-30B-A3B, a mixture of experts, by the paper's recipe of 8B: this node's part of a run on 16 GPUs.
#
#   bash examples/qwen3_30b_a3b/run.sh [--section.field value ...]
#
# launch/recipe.sh says which variables it reads.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch/recipe.sh" examples/qwen3_30b_a3b "$@"
