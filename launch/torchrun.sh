#!/usr/bin/env bash
# Starts this node's ranks of a run, on one node or on many, and starts them again if one of them dies.
#
#   bash launch/torchrun.sh -- -m megatron_opdlm.train --config recipe.yaml                  # all GPUs of this machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh -- -m megatron_opdlm.train ...        # on each node
#   bash launch/torchrun.sh --dry-run --nnodes 2 --master-addr node0 --gpus-per-node 8 -- -m ...   # only prints
#
# Each setting is a flag or an environment variable; the flag wins.
#   --nnodes         NNODES          nodes of the run, 1
#   --gpus-per-node  GPUS_PER_NODE   ranks on this node; its GPUs (those of CUDA_VISIBLE_DEVICES). Where there are none:
#                                    CPU processes, to be given
#   --node-rank      NODE_RANK       0 on the node at MASTER_ADDR. Slurm's and Kubernetes' own variables serve too
#   --master-addr    MASTER_ADDR     where node 0 keeps the store at which the nodes meet
#   --master-port    MASTER_PORT     29500
#   --max-restarts   MAX_RESTARTS    how often all ranks are started again after a failure, 3
#   --job-id         JOB_ID          launchers with the same one belong together, "opdlm"
#   --local-addr     LOCAL_ADDR      by which other nodes reach this one; its host name
#                    PYTHON          the interpreter, python
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
refuse() { echo "error: $*" >&2; exit 2; }

dry_run=no
NNODES=${NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-0}}}
MASTER_ADDR=${MASTER_ADDR:-}
MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
JOB_ID=${JOB_ID:-opdlm}
LOCAL_ADDR=${LOCAL_ADDR:-${SLURMD_NODENAME:-}}
PYTHON=${PYTHON:-python}
while (($#)); do
    case "$1" in
        --dry-run) dry_run=yes; shift; continue ;;
        --) shift; break ;;
        --nnodes | --gpus-per-node | --node-rank | --master-addr | --master-port | --max-restarts | --job-id | \
            --local-addr)
            (($# > 1)) || refuse "$1 needs a value"
            name="${1#--}"
            name="${name^^}"
            printf -v "${name//-/_}" '%s' "$2"
            shift 2 ;;
        *) refuse "$1 is no setting of torchrun.sh; the program and its settings follow --" ;;
    esac
done
(($#)) || refuse "nothing to run: -- -m megatron_opdlm.train --config recipe.yaml"

if [[ -z "$GPUS_PER_NODE" ]]; then
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then # which nvidia-smi does not care for; -1 is none of them
        IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES/#-1*/}"
        GPUS_PER_NODE=${#visible[@]}
    else
        GPUS_PER_NODE=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep --count '^GPU ' || true)
    fi
    ((GPUS_PER_NODE > 0)) || refuse "GPUS_PER_NODE must be given where there is no GPU: the number of CPU processes"
fi
for name in NNODES GPUS_PER_NODE NODE_RANK MASTER_PORT MAX_RESTARTS; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || refuse "$name (${!name}) must be a whole number"
done
((NNODES > 0 && GPUS_PER_NODE > 0)) || refuse "NNODES ($NNODES) and GPUS_PER_NODE ($GPUS_PER_NODE) must be at least 1"
((NODE_RANK < NNODES)) || refuse "NODE_RANK ($NODE_RANK) must be below NNODES ($NNODES)"
((NNODES == 1)) || [[ -n "$MASTER_ADDR" ]] || refuse "MASTER_ADDR must be given on several nodes: that of node 0"

# shellcheck source=launch/env.sh
source "$launch/env.sh"
PYTHONPATH="$(dirname "$launch")${PYTHONPATH:+:$PYTHONPATH}" # a checkout runs without being installed
export PYTHONPATH

meeting=(--standalone) # a free port of this machine
if ((NNODES > 1)); then
    # Node 0 keeps the store because it is told so: names of one machine differ between its network interfaces, inside a
    # container and out of it. Nodes may come late (an image to fetch: read_timeout) and be replaced (join_timeout).
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID"
        --rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=1800,read_timeout=300")
    [[ -z "$LOCAL_ADDR" ]] || meeting+=(--local-addr "$LOCAL_ADDR")
fi
command=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE"
    --max-restarts "$MAX_RESTARTS" "${meeting[@]}" "$@")

if [[ "$dry_run" == yes ]]; then
    echo "# environment"
    for name in TORCH_DISABLE_SHARE_RDZV_TCP_STORE TORCH_ELASTIC_SHUTDOWN_TIMEOUT OMP_NUM_THREADS \
        CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_CUDA_ALLOC_CONF NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME \
        TRITON_CACHE_DIR TOKENIZERS_PARALLELISM PYTHONUNBUFFERED PYTHONFAULTHANDLER PYTHONNOUSERSITE \
        PYTHONPATH; do
        [[ -z "${!name+set}" ]] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    echo "# versions"
    printf '%q -m megatron_opdlm.versions\n' "$PYTHON"
    echo "# ranks"
    printf '%q ' "${command[@]}"
    echo
    exit
fi
"$PYTHON" -m megatron_opdlm.versions >&2
exec "${command[@]}" # torchrun takes this process, so signals reach it
