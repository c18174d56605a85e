#!/usr/bin/env bash
# The quickstart: from the shipped teacher to a block-diffusion student, evaluated and exported, in runs/quickstart.
#
#   bash examples/quickstart/run.sh                                              # two CPU processes, or all GPUs
#   bash examples/quickstart/run.sh --parallel.tensor_model_parallel_size 2      # any setting of the recipe
#   STUDENT=examples/quickstart/small bash examples/quickstart/run.sh            # a smaller student than its teacher
#
# RUN_DIRECTORY names another folder; what an earlier quickstart left there is replaced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source requirements/make_environment.sh

quickstart=examples/quickstart
run=${RUN_DIRECTORY:-runs/quickstart}
student=${STUDENT:-$quickstart/teacher} # the autoregressive model that the student starts from
if [[ -e "$run" && ! -d "$run/tasks" ]]; then
    echo "error: RUN_DIRECTORY ($run) exists and is not an earlier quickstart's" >&2
    exit 2
fi
rm -rf "$run"
mkdir -p "$run"
started=$SECONDS
export OMP_NUM_THREADS=1 # one core per process
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus > 0 ? gpus : 2))
settings=("$@")
if ((gpus > 0)); then # flash kernels take no float32; 4 rows a micro-batch fit up to 8 GPUs
    settings=(--precision.dtype bfloat16 --training.micro_batch_size 4 "$@")
fi
launch() { torchrun --standalone --nproc-per-node "$processes" -m "$@"; }
say() { printf '\n== %s\n' "$*"; }

say "Tasks: prompts to learn from, and held-out ones to be judged by"
python $quickstart/tasks.py --output "$run/tasks" --num-train 20000 --num-heldout 256 --seed 0

say "Hugging Face -> Megatron: the teacher, and the student that starts from it"
python tools/convert_hf_to_megatron.py --hf $quickstart/teacher --output "$run/teacher" --role teacher
python tools/convert_hf_to_megatron.py --hf "$student" --output "$run/untrained" --role student

evaluate() { # evaluate NAME CHECKPOINT [setting ...]
    launch megatron_opdlm.evaluate --config $quickstart/recipe.yaml "${settings[@]}" --student.checkpoint "$2" \
        --evaluation.files "$run/tasks/heldout.jsonl" --evaluation.output "$run/$1.json" --rollout.temperature 0 "${@:3}"
}
say "The student before training"
evaluate untrained "$run/untrained" --rollout.remasking_strategy low_confidence_static

say "On-policy distillation"
launch megatron_opdlm.train --config $quickstart/recipe.yaml "${settings[@]}" --student.checkpoint "$run/untrained" \
    --teacher.checkpoint "$run/teacher" --data.train_files "$run/tasks/train.jsonl" --logging.directory "$run"

say "The student after training: one token per step, and as many as it is sure of"
evaluate student_static "$run/checkpoints" --rollout.remasking_strategy low_confidence_static
evaluate student_dynamic "$run/checkpoints" --rollout.remasking_strategy low_confidence_dynamic

say "Megatron -> Hugging Face, and a look at the folder with plain transformers"
python tools/convert_megatron_to_hf.py --checkpoint "$run/checkpoints" --output "$run/student_hf"
python $quickstart/summarize.py --run "$run" --teacher $quickstart/teacher --start "$student" \
    --seconds $((SECONDS - started))
