#!/usr/bin/env bash
# What the run.sh of a folder in examples starts: this node's part of a run of the folder's recipe.
#
#   bash launch/recipe.sh examples/qwen3_8b [--section.field value ...]
#
# PROMPTS is the folder that tools/prepare_prompts.py wrote, LAYERS a recipe of the example's folder to lay over its
# recipe.yaml; NNODES, GPUS_PER_NODE, NODE_RANK, MASTER_ADDR, MASTER_PORT are torchrun.sh's. DRY_RUN=1 only prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob
example=${1:?the folder of a recipe}
shift
folder=${PROMPTS:-prompts/opdlm}
prompts=("$folder"/*.parquet)
if ((${#prompts[@]} == 0)); then
    echo "error: PROMPTS ($folder) must be a folder with Parquet files; README.md has the command" >&2
    exit 2
fi
recipes=(--config "$example/recipe.yaml")
[[ -z "${LAYERS:-}" ]] || recipes+=(--config "$example/$LAYERS")
launcher=(bash launch/torchrun.sh)
[[ -z "${DRY_RUN:-}" ]] || launcher+=(--dry-run)
exec "${launcher[@]}" -- -m megatron_opdlm.train "${recipes[@]}" --data.train_files "${prompts[@]}" "$@"
