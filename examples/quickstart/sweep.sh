#!/usr/bin/env bash
# How the quickstart's student trades accuracy for speed: five thresholds, three block sizes, one model. After run.sh:
#
#   bash examples/quickstart/sweep.sh                                            # writes runs/quickstart/sweep
#   bash examples/quickstart/sweep.sh --evaluation.max_tasks 64                  # any setting of the recipe
#
# RUN_DIRECTORY names the quickstart's folder, as for run.sh. A sweep that was stopped goes on when it is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source requirements/make_environment.sh

run=${RUN_DIRECTORY:-runs/quickstart}
if [[ ! -d "$run/student_hf" ]]; then
    echo "error: there is no student in $run yet: bash examples/quickstart/run.sh makes it" >&2
    exit 2
fi
export OMP_NUM_THREADS=1 # one core per process
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
settings=("$@")
if ((gpus > 0)); then # flash kernels take no float32
    settings=(--precision.dtype bfloat16 "$@")
fi
torchrun --standalone --nproc-per-node $((gpus > 0 ? gpus : 2)) -m megatron_opdlm.evaluate \
    --config examples/quickstart/recipe.yaml --student.hf "$run/student_hf" \
    --evaluation.files "$run/tasks/heldout.jsonl" --evaluation.output "$run/sweep" --rollout.temperature 0 \
    --evaluation.sweep.thresholds "[0.7,0.8,0.9,0.95,1.0]" --evaluation.sweep.block_sizes "[4,8,16]" "${settings[@]}"
