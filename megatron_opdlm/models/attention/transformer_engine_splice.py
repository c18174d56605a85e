"""Other results for Transformer Engine's fused attention kernel, in the midst of its stock `DotProductAttention`.

That module does much around the cuDNN kernel: FP8 quantizers with their history of maxima, the switch between recipes,
bookkeeping for activation recompute, its checkpoint state. All of it stays as it is. The autograd function in the
middle calls `fused_attn_fwd`, a name of its Python module, and saves what this returns for a backward that calls the
backward kernel. So it is enough that during one call the name leads to a function that runs the kernel and merges
other keys into its output and log-sum-exp: Transformer Engine then saves the *merged* ones, and its own backward, in
bfloat16 or FP8, yields the kernel's part of the exact gradient (see `decomposition`).

Thread of control: the names are replaced for the length of one forward call and restored whatever happens. This is
safe since a process runs one forward at a time, be it in the main thread or, under activation recompute, in autograd's
while the main thread waits. A call within a call is an error.

Example:

    >>> splice = FusedAttentionSplice()
    >>> out = splice.run(attention, query, key, value, lambda out, lse: merge(out, lse))

Legend: `B` sequences, `R` rows of the kernel, `N` and `G` query and key-value heads of the module, `D` head dimension.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator

import torch

PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"

Merge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From the kernel's output [R, B, N, D] and log-sum-exp [B, N, R] to the merged ones, both contiguous."""


class FusedAttentionSplice:
    """The places where Transformer Engine is spliced; one for all layers of a model."""

    def __init__(self) -> None:
        self.backends = importlib.import_module(f"{PACKAGE}.backends")
        self.utils = importlib.import_module(f"{PACKAGE}.utils")
        self.selection = importlib.import_module(f"{PACKAGE}.dot_product_attention")._attention_backends
        self.own_selection = {**self.selection, "attention_params": None}
        self.quantizer_index = list(inspect.signature(self.backends.fused_attn_fwd).parameters).index("o_quantizer")
        self.is_running = False

    def run(
        self, attention: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, merge: Merge
    ) -> torch.Tensor:
        """`attention(query, key, value)`, [R, B, N * D], with `merge` applied to what its fused kernel returns.

        Args:
            attention: a `DotProductAttention` for tensors with the sequence before the batch.
            query: contiguous [R, B, N, D].
            key: contiguous [R, B, G, D]; `value` alike.
            value: see `key`.
            merge: see `Merge`. It runs without gradients.

        Raises:
            ValueError: Transformer Engine has no fused kernel for these inputs.
            RuntimeError: it did not call its fused kernel, or not as expected.
        """
        assert not self.is_running, "one call at a time: the spliced names are those of a Python module"
        num_calls = 0
        kernel = self.backends.fused_attn_fwd

        def merged_kernel(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            out, statistics, *rest = kernel(*args, **kwargs)
            quantizer = args[self.quantizer_index] if len(args) > self.quantizer_index else kwargs.get("o_quantizer")
            return *merged_result(out, list(statistics), quantizer, query.shape, merge), *rest

        with self._fused_only(), _replaced(self.backends, "fused_attn_fwd", merged_kernel):
            out = attention(query, key, value)
        if num_calls != 1:
            raise RuntimeError(
                f"attention.backend te: Transformer Engine called its fused attention kernel {num_calls} times in a "
                "forward, not once; attention.backend aten or flash does without it"
            )
        return out

    @contextlib.contextmanager
    def _fused_only(self) -> Iterator[None]:
        """Lets Transformer Engine choose its fused attention even where it would prefer another of its backends.

        It remembers its last choice in a dictionary. The spliced calls have a memory of their own, so that neither
        they nor the calls of other modules meet a choice made for the other.
        """
        choose, others = self.utils.get_attention_backend, dict(self.selection)
        self.selection.update(self.own_selection)
        self.is_running = True
        try:
            with _replaced(self.utils, "get_attention_backend", lambda inputs: fused_choice(choose(inputs))):
                yield
        finally:
            self.is_running = False
            self.own_selection = dict(self.selection)
            self.selection.update(others)


@contextlib.contextmanager
def _replaced(module: object, name: str, function: Callable) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def fused_choice(choice: tuple) -> tuple:
    """Transformer Engine's choice among its three backends, turned to fused attention.

    `choice` is what its `get_attention_backend` returns: (use flash, which flash, use fused, which fused, use unfused,
    which of the three are available).
    """
    _, _, _, which_fused, _, available = choice
    if not available[1]:
        raise ValueError(
            "attention.backend te: Transformer Engine has no fused attention kernel for these inputs and settings "
            "(NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 makes it say why); attention.backend aten or flash does without it"
        )
    return False, None, True, which_fused, False, available


def merged_result(
    out: torch.Tensor, statistics: list[torch.Tensor], quantizer: object | None, shape: torch.Size, merge: Merge
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The kernel's result with the rest merged in, in the form in which the kernel returned it.

    Args:
        out: [R, B, N, D], a tensor or a quantized one. The latter is merged in its nominal dtype, whose rounding is far
            below that of FP8, and quantized again.
        statistics: the log-sum-exp [B, N, R, 1]; in FP8 before version 2.15 a companion of the same shape, which the
            backward for this layout does not read; the random state.
        quantizer: of the output; none if it is not quantized.
        shape: (R, B, N, D).
        merge: see `Merge`.
    """
    if statistics[0].shape != (shape[1], shape[2], shape[0], 1):
        raise RuntimeError(
            f"attention.backend te: Transformer Engine's kernel returned statistics of shape "
            f"{tuple(statistics[0].shape)}, not one log-sum-exp for each query; NVTE_FUSED_ATTN_BACKEND must be unset"
        )
    is_quantized = type(out) is not torch.Tensor
    merged_out, lse = merge(out.dequantize().view(shape) if is_quantized else out, statistics[0][..., 0])
    if is_quantized:
        merged_out = quantized_again(merged_out, quantizer)
    return merged_out, [lse[..., None]] * (len(statistics) - 1) + statistics[-1:]


def quantized_again(out: torch.Tensor, quantizer: object) -> torch.Tensor:
    """`quantizer(out)`; the quantizer keeps the larger of the maxima that it has recorded before and now.

    The next steps' scale follows from the maximum and has to cover both the kernel's own output and the merged one.
    Merging averages, so either may be the larger.
    """
    amax = quantizer.amax.clone()
    quantized = quantizer(out)
    quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    return quantized
