# shellcheck shell=bash
# Sourced by torchrun.sh on every node, before its ranks start. What is set already stays: NCCL_DEBUG=INFO bash ...
# Each setting has its reason here and, where it has to be chosen by site, a row in README.md. Those of NCCL and CUDA
# follow the libraries' documentation; none of them has been measured on GPUs.

# torchrun's store outlives a restart. On one node the attempts are kept apart in it (parallel/initialize.py); launchers
# of several nodes count them differently, since one that was lost begins anew, so each attempt gets a store of its own.
# Without it ranks find the addresses of ranks that have died.
if ((NNODES > 1)); then
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
fi
# How long torchrun waits for ranks that it told to stop, before it kills them. The recipe decides how long they may
# take (`training.grace_seconds`: they leave by then in any case), so this is only to be longer. Unset it is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"

# Threads of a rank: its share of the cores, for data, checkpoints and `optimizer.cpu_offload_fraction`; at most 8,
# because thread pools of many ranks crowd each other out. torchrun alone would set 1.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    OMP_NUM_THREADS=$(($(nproc) / GPUS_PER_NODE))
    OMP_NUM_THREADS=$((OMP_NUM_THREADS < 1 ? 1 : OMP_NUM_THREADS > 8 ? 8 : OMP_NUM_THREADS))
    export OMP_NUM_THREADS
fi

# One hardware queue: kernels start in the order they are launched in, so that Megatron's tensor-parallel collectives
# start before the matrix product that hides them (megatron/core/tensor_parallel/layers.py relies on it). It matters up
# to Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Rollout and training take the same memory in turns, in other shapes: segments that grow in place leave less of it in
# pieces that nobody can use. (PyTorch from 2.9 on calls it PYTORCH_ALLOC_CONF and reads this name too, which
# Megatron-Core looks at.)
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# The version of NCCL, and what goes wrong in it; silent otherwise. INFO shows the network and the rings chosen: look at
# it once on a cluster, for "via NET/IB" and not "via NET/Socket" between nodes.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The interface by which ranks find each other, the same name on all nodes: SOCKET_IFNAME=eth0. NCCL takes the first one
# that is up, gloo (checkpoints, prompts) that of the node's host name, which on many systems is the loopback. Traffic
# of training goes over InfiniBand or RoCE in any case, if NCCL finds it.
if [[ -n "${SOCKET_IFNAME:-}" ]]; then
    export NCCL_SOCKET_IFNAME="$SOCKET_IFNAME" GLOO_SOCKET_IFNAME="$SOCKET_IFNAME"
fi

# Compiled kernels (FlexAttention, Triton) go to the node's own disk: home folders are shared, slow, and written by all
# ranks at once.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-${UID}}"
# Tokenizers' own threads and forked workers do not go together; without this every rank warns.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Logs appear when they are written, and a crash in a library leaves the Python lines it came from.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}" PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
