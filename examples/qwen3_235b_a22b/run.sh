#!/usr/bin/env bash
# Qwen3-235B-A22B, a mixture of experts, with twice the paper's batch: this node's part of a run on 128 GPUs.
#
#   bash examples/qwen3_235b_a22b/run.sh [--section.field value ...]
#
# launch/recipe.sh says which variables it reads.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch/recipe.sh" examples/qwen3_235b_a22b "$@"
