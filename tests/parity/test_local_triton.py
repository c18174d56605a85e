"""The fused window kernels without a GPU: their numbers in Triton's interpreter, their code in Triton's compiler.

The oracle is `DenseAttention` in float64 with autograd; the causal kernel under test conditions is plain PyTorch. The
interpreter is chosen by the environment when Triton is imported, and the compiler needs a stand-in for the GPU's
driver, so both run in processes of their own, this file being their script:

    TRITON_INTERPRET=1 python tests/parity/test_local_triton.py numbers
    python tests/parity/test_local_triton.py code
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask
from megatron_opdlm.models.attention import decomposition
from megatron_opdlm.models.attention.backend import AttentionCase, Streams
from megatron_opdlm.models.attention.dense import DenseAttention

# name: positions, block size, query heads, key-value heads, head dimension, real tokens of each sequence, precision
CASES = {
    "one short block and a half": (5, 4, 2, 1, 16, [5, 3], "float32"),
    "a single block, and a sequence that is all padding": (8, 16, 2, 2, 16, [8, 0], "float32"),
    "blocks of one": (33, 1, 2, 1, 16, [33, 20], "float32"),
    "blocks of five, three heads a group": (33, 5, 3, 1, 24, [33, 17], "float32"),
    "eight heads a group": (40, 8, 8, 1, 16, [40, 1], "float32"),
    "wide blocks, one head": (70, 32, 1, 1, 40, [70, 64], "float32"),
    "several tiles": (257, 4, 1, 1, 16, [257], "float32"),
    # The interpreter multiplies bfloat16 numbers as integers; float16 takes the same path through the kernels.
    "half precision": (64, 16, 4, 2, 64, [41], "float16"),
}
TOLERANCES = {"float32": (2e-6, 2e-6, 6e-6), "float16": (2e-3, 2e-6, 6e-3)}  # of outputs, log-sum-exps, gradients
# name: compute capability, block size, query heads, key-value heads, head dimension, precision
BUILDS = {
    "Hopper, bfloat16, blocks of 4, four heads a group": (90, 4, 32, 8, 128, "bfloat16"),
    "Ampere, float16, blocks of 32, three heads a group": (80, 32, 3, 1, 80, "float16"),
}
SHARED_MEMORY_OF_AMPERE = 163 * 1024


@functools.cache
def run_script(task: str, interpret: str, cache: Path) -> dict:
    """What one process of this file says about all cases of a task."""
    pytest.importorskip("triton", reason="the package triton is not installed: the fused window kernels are untested")
    root = str(Path(__file__).parents[2])
    changes = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": root}
    process = subprocess.run(
        [sys.executable, __file__, task], env=os.environ | changes, capture_output=True, text=True, timeout=280
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("case", CASES)
def test_fused_kernels_match_dense_float64(case, cache):
    errors = run_script("numbers", "1", cache)[case]
    tolerances = TOLERANCES[CASES[case][-1]]
    for name, error, tolerance in zip(("outputs", "log-sum-exps", "gradients"), errors, tolerances, strict=True):
        assert error <= tolerance, f"{name} differ by {error}"


@pytest.mark.parametrize("build", BUILDS)
def test_fused_kernels_compile_to_machine_code_within_shared_memory(build, cache):
    kernels = run_script("code", "0", cache)[build]
    assert list(kernels) == ["merge_kernel", "query_gradient_kernel", "key_gradient_kernel"]
    for num_code_bytes, num_shared_bytes in kernels.values():
        assert num_code_bytes > 0
        assert num_shared_bytes <= SHARED_MEMORY_OF_AMPERE


# --- numbers: run under the interpreter ------------------------------------------------------------------------------


class PlainCausal:
    """See `decomposition.CausalKernel`: float64 softmax attention and its gradient, from the formulas."""

    def scores(self, query, key, scale):
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        scores = torch.einsum("bqnd,bknd->bnqk", query.double(), key.double()) * scale
        return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))

    def forward(self, query, key, value, scale):
        scores = self.scores(query, key, scale)
        value = value.double().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), value)
        return out.to(query.dtype), scores.logsumexp(dim=-1).float()

    def backward(self, grad_out, query, key, value, out, lse, scale):
        repeats = query.shape[2] // key.shape[2]
        grad_out, query = grad_out.double(), query.double()
        probabilities = (self.scores(query, key, scale) - lse.double()[..., None]).exp()
        wide_key, wide_value = (x.double().repeat_interleave(repeats, dim=2) for x in (key, value))
        row_sums = (grad_out * out).sum(dim=-1).transpose(1, 2)[..., None]
        grad_scores = probabilities * (torch.einsum("bqnd,bknd->bnqk", grad_out, wide_value) - row_sums) * scale
        grad_query = torch.einsum("bnqk,bknd->bqnd", grad_scores, wide_key)
        grad_key = torch.einsum("bnqk,bqnd->bknd", grad_scores, query)
        grad_value = torch.einsum("bnqk,bqnd->bknd", probabilities, grad_out)
        grad_key, grad_value = (x.unflatten(2, (-1, repeats)).sum(dim=3) for x in (grad_key, grad_value))
        return tuple(x.to(key.dtype) for x in (grad_query, grad_key, grad_value))


def make_streams(length, num_heads, num_groups, head_dim, batch_size, dtype, device="cpu"):
    """As in a model: views of tensors [S, 2B, heads, D] whose batch holds the clean rows, then the noisy ones."""
    stacked = [torch.randn(length, 2 * batch_size, n, head_dim) for n in (num_heads, num_groups, num_groups)]
    clean, noisy = zip(*(x.to(device, dtype).transpose(0, 1).chunk(2) for x in stacked), strict=True)
    return Streams(*clean, *noisy)


def dense_lse(streams, lengths, block_size, scale):
    """Log-sum-exps [B, 2N, S] in the order (group, stream, head of the group)."""
    length, num_groups = streams.key_clean.shape[1:3]
    query = torch.cat((streams.query_clean, streams.query_noisy), dim=1).unflatten(2, (num_groups, -1))
    scores = torch.einsum("bqghd,bkgd->bghqk", query, torch.cat((streams.key_clean, streams.key_noisy), dim=1)) * scale
    mask = block_diffusion_mask(lengths, length, block_size)[:, None, None]
    by_stream = scores.masked_fill(~mask, float("-inf")).logsumexp(dim=-1).unflatten(3, (2, length))
    return by_stream.transpose(2, 3).flatten(1, 3)


def saved_lse(out):
    """The log-sum-exp that the forward kept for the backward: behind the six streams and the two outputs."""
    return out.grad_fn.next_functions[0][0].saved_tensors[8]


def largest_error(actual, expected):
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True))


def errors_of(length, block_size, num_heads, num_groups, head_dim, lengths, dtype):
    """Largest errors of outputs, log-sum-exps and gradients at real tokens; everything is finite elsewhere too."""
    from megatron_opdlm.models.attention import local_triton

    decomposition.local_part = lambda _: local_triton
    torch.manual_seed(0)
    scale, lengths = head_dim**-0.5, torch.tensor(lengths)
    streams = make_streams(length, num_heads, num_groups, head_dim, len(lengths), getattr(torch, dtype))
    is_real = (torch.arange(length) < lengths[:, None])[..., None, None]
    # An expanded gradient, as a sum sends it, has no dense dimension.
    grads = [is_real.to(streams[0].dtype).expand(streams[0].shape), torch.randn(streams[0].shape) * is_real]
    grads[1] = grads[1].to(streams[0].dtype)

    leaves = [x.detach().requires_grad_() for x in streams]
    outs = decomposition.block_diffusion_attention(Streams(*leaves), lengths, block_size, scale, PlainCausal())
    lse = saved_lse(outs[0])[:, :, :length]
    gradients = torch.autograd.grad(outs, leaves, grads)
    assert all(x.isfinite().all() for x in (*outs, lse, *gradients))

    exact = [x.detach().double().requires_grad_() for x in streams]
    dense = DenseAttention(AttentionCase(device_type="cpu"))
    dense_outs = dense.attend(Streams(*exact), lengths=lengths, block_size=block_size, scale=scale)
    dense_gradients = torch.autograd.grad(dense_outs, exact, [x.double() for x in grads])
    out_error = largest_error([x * is_real for x in outs], [x * is_real for x in dense_outs])
    is_real = is_real[:, None, :, 0, 0]
    lse_error = largest_error([lse * is_real], [dense_lse(Streams(*exact), lengths, block_size, scale) * is_real])
    return out_error, lse_error, largest_error(gradients, dense_gradients)


# --- code: compiled ahead of time, on tensors without data -----------------------------------------------------------


class Compiled:
    """Takes the place of a kernel: compiles what would be launched and notes the sizes of code and shared memory."""

    def __init__(self, kernel, notes):
        self.kernel, self.notes = kernel, notes

    def __getitem__(self, grid):
        def compile_instead(*args, **options):
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.notes[self.kernel.__name__] = (len(compiled.asm["cubin"]), compiled.metadata.shared)

        return compile_instead


def build(capability, block_size, num_heads, num_groups, head_dim, dtype):
    """Name of each kernel -> bytes of machine code, bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from megatron_opdlm.models.attention import local_triton, local_triton_kernels

    target = GPUTarget("cuda", capability, 32)
    answers = {"get_current_target": target, "get_current_device": capability, "get_current_stream": 0}
    driver.set_active(SimpleNamespace(**{name: lambda *_, answer=x: answer for name, x in answers.items()}))
    notes = {}
    for name in ("merge_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        setattr(local_triton, name, Compiled(getattr(local_triton_kernels, name), notes))
    streams = make_streams(16 * block_size, num_heads, num_groups, head_dim, 2, getattr(torch, dtype), "meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    rows, keys, values = decomposition.kernel_inputs(streams, block_size)
    causal = (rows, rows[..., 0].float().transpose(1, 2))
    outs, lse = local_triton.merge_window(streams, causal, lengths, block_size, 0.1)
    local_triton.window_gradients(streams, outs, outs, lse, lengths, block_size, 0.1, (rows, keys, values))
    return notes


if __name__ == "__main__":
    table, measure = {"numbers": (CASES, errors_of), "code": (BUILDS, build)}[sys.argv[1]]
    print(json.dumps({name: measure(*case) for name, case in table.items()}))
