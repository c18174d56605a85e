#!/usr/bin/env bash
# MATH with Qwen3-8B or Qwen3-4B, the paper's MATH recipe: this node's part of a run on 8 GPUs.
#
#   bash examples/math/run.sh [--section.field value ...]
#
# launch/recipe.sh says which variables it reads.
set -euo pipefail
export PROMPTS=${PROMPTS:-prompts/math}
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch/recipe.sh" examples/math "$@"
