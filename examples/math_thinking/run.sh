#!/usr/bin/env bash
# MATH with a thinking Qwen3-8B or Qwen3-4B, the paper's recipe: this node's part of a run on 8 GPUs.
#
#   bash examples/math_thinking/run.sh [--section.field value ...]
#
# launch/recipe.sh says which variables it reads.
set -euo pipefail
export PROMPTS=${PROMPTS:-prompts/math_thinking}
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch/recipe.sh" examples/math_thinking "$@"
