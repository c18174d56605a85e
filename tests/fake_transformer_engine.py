"""A fake of what the backend `te` touches of Transformer Engine, with the structure of the real one, on a CPU.

`DotProductAttention` chooses among its backends with a remembered selection, and its fused one is an autograd function
that calls `fused_attn_fwd` by the name in its module, saves what this returns and computes its backward from that
alone. The parameters are those of versions 2.9 and 2.20, between which `fused_attn_fwd` drifted;
`tests/unit/test_transformer_engine_versions.py` compares them with the real packages. The kernel is PyTorch's CPU flash
attention, in FP8 between quantized inputs and outputs.

Example:

    >>> fake = FakeTransformerEngine(release="2.20", quantizer_class=IdentityQuantizer)
    >>> with fake.installed(monkeypatch):
    ...     from transformer_engine.pytorch import DotProductAttention
"""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

from megatron_opdlm.models.attention.aten import CpuFlash

PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class QuantizedTensor:
    """What a quantizer returns: like TE's, not a plain tensor, with a shape and a nominal dtype."""

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self.data, self.scale, self.dtype, self.shape = data, scale, dtype, data.shape

    def dequantize(self) -> torch.Tensor:
        return (self.data.to(torch.promote_types(self.dtype, torch.float32)) / self.scale).to(self.dtype)


class Float8Quantizer:
    """Delayed scaling: casts with a scale from earlier maxima, and records the maximum of this call over the last."""

    def __init__(self, fp8_dtype: torch.dtype) -> None:
        self.fp8_dtype, self.scale, self.amax = fp8_dtype, torch.ones(()), torch.zeros(())

    def __call__(self, tensor: torch.Tensor) -> QuantizedTensor:
        self.amax.copy_(tensor.abs().max())
        return QuantizedTensor(self._cast(tensor), self.scale.clone(), tensor.dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self.fp8_dtype).max
        return (tensor.float() * self.scale).clamp(-largest, largest).to(self.fp8_dtype)

    def update_scale(self) -> None:
        self.scale = torch.finfo(self.fp8_dtype).max / self.amax
        self.amax.zero_()


class IdentityQuantizer(Float8Quantizer):
    """Rounds nothing, so that the quantized path can be held against exact numbers."""

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def update_scale(self) -> None:
        self.amax.zero_()


def prepare_for_saving(*tensors):
    """The plain tensors for `save_for_backward`, and what rebuilds the quantized ones around them."""
    plain = [x.data if isinstance(x, QuantizedTensor) else x for x in tensors]
    return plain, [(x.scale, x.dtype) if isinstance(x, QuantizedTensor) else None for x in tensors]


def restore_from_saved(objects, plain):
    return [QuantizedTensor(x, *made) if made else x for made, x in zip(objects, plain, strict=True)]


def _causal_forward(query, key, value, scale):
    """`CpuFlash.forward` on contiguous [S, B, heads, D]; the output is contiguous, the log-sum-exp [B, heads, S, 1]."""
    assert all(x.is_contiguous() for x in (query, key, value)), "kernel strides follow from the layout's name"
    assert query.shape[0] == key.shape[0] and query.shape[2] % key.shape[2] == 0
    out, lse = CpuFlash().forward(*(x.transpose(0, 1) for x in (query, key, value)), scale)
    return out.transpose(0, 1).contiguous(), lse.contiguous()[..., None]


def _causal_backward(grad_out, query, key, value, out, statistics, scale):
    lse, random_state = statistics[0], statistics[-1]
    assert lse.is_contiguous() and lse.shape == (query.shape[1], query.shape[2], query.shape[0], 1)
    assert lse.dtype.itemsize >= 4 and random_state.dtype is torch.int64 and random_state.shape == (2,)
    rows = (x.transpose(0, 1) for x in (grad_out, query, key, value, out))
    return tuple(x.transpose(0, 1).contiguous() for x in CpuFlash().backward(*rows, lse[..., 0], scale))


class FakeTransformerEngine:
    """The package: its modules, what FP8 autocast would say, and what its kernel saw and kept."""

    def __init__(self, release: str = "2.20", quantizer_class: type | None = None) -> None:
        """`release` is "2.9" or "2.20"; a quantizer class stands for FP8 attention under autocast."""
        self.release = release
        self.version = f"{release}.0"
        self.cudnn_version = (9, 14, 0)
        self.is_fused_available, self.prefers_flash = True, False
        self.quantizer_class = quantizer_class
        self.num_flash_calls = 0
        self._build_modules()

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> FakeTransformerEngine:
        """Puts the modules where `import` finds them, for the rest of the test."""
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: self.version if name == "transformer-engine" else version(name)
        )
        return self

    def _build_modules(self) -> None:
        names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.utils")
        names += ("transformer_engine.pytorch.attention", PACKAGE)
        names += tuple(f"{PACKAGE}.{name}" for name in ("backends", "utils", "dot_product_attention"))
        self.modules = {name: types.ModuleType(name) for name in names}
        for name in names[1:]:
            parent, _, child = name.rpartition(".")
            setattr(self.modules[parent], child, self.modules[name])
        self.backends, self.utils, self.front = (self.modules[name] for name in names[-3:])
        self.modules["transformer_engine.pytorch.utils"].get_cudnn_version = lambda: self.cudnn_version
        self.backends.fused_attn_fwd = fused_attn_fwd_2_9 if self.release == "2.9" else fused_attn_fwd_2_20
        self.backends.FusedAttnFunc = FusedAttnFunc
        self.utils.get_attention_backend = self.get_attention_backend
        self.front._attention_backends = {
            "attention_params": None,
            "use_flash_attention": None,
            "flash_attention_backend": None,
            "use_fused_attention": None,
            "fused_attention_backend": None,
            "use_unfused_attention": None,
            "backend_selection_requires_update": False,
        }
        fake = self

        class BoundDotProductAttention(DotProductAttention):
            engine = fake

        self.modules["transformer_engine.pytorch"].DotProductAttention = BoundDotProductAttention

    def get_attention_backend(self, attention_params=None):
        """(use flash, which flash, use fused, which fused, use unfused, available), as the real one returns."""
        available = [self.prefers_flash, self.is_fused_available, True]
        use_fused = self.is_fused_available and not self.prefers_flash
        which_fused = 1 if self.is_fused_available else None
        return self.prefers_flash, "2.8", use_fused, which_fused, not (self.prefers_flash or use_fused), available


class DotProductAttention(torch.nn.Module):
    """The parameters and the choice of a backend are the real ones'; the rest is what a causal layer needs."""

    engine: FakeTransformerEngine

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        tp_group: object | None = None,
        layer_number: int | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "sbhd", "causal")
        self.heads = (num_attention_heads // tp_size, num_gqa_groups // tp_size, kv_channels)
        self.settings = {"sequence_parallel": sequence_parallel, "tp_group": tp_group, "layer_number": layer_number}
        self.softmax_scale = softmax_scale
        if quantizer_class := self.engine.quantizer_class:
            formats = {"qkv": E4M3, "s": E4M3, "o": E4M3, "do": E5M2, "dqkv": E5M2}
            self.quantizers = {name: quantizer_class(fp8_dtype) for name, fp8_dtype in formats.items()}

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_heads, num_groups, head_dim = self.heads
        assert query_layer.shape[2:] == (num_heads, head_dim) and key_layer.shape[2:] == (num_groups, head_dim)
        selection = self.engine.front._attention_backends
        attention_params = (query_layer.shape, key_layer.shape)
        if selection["attention_params"] != attention_params:
            selection["attention_params"] = attention_params
            selection["backend_selection_requires_update"] = True
        if selection["backend_selection_requires_update"]:
            *choice, _ = self.engine.utils.get_attention_backend(attention_params)
            selection.update(zip(list(selection)[1:6], choice, strict=True))
            selection["backend_selection_requires_update"] = False
        if selection["use_fused_attention"]:
            out = self.engine.backends.FusedAttnFunc.apply(query_layer, key_layer, value_layer, self)
            return out.view(*out.shape[:-2], -1)
        self.engine.num_flash_calls += 1
        return _causal_forward(query_layer, key_layer, value_layer, self.softmax_scale)[0].flatten(2)


class FusedAttnFunc(torch.autograd.Function):
    """Saves what the kernel's name returned, and computes its backward from that."""

    @staticmethod
    def forward(ctx, q, k, v, module):
        engine, nominal_dtype = module.engine, q.dtype
        length, quantizers = q.shape[0], (None, None)
        if engine.quantizer_class:
            q, k, v = _combined_and_quantized((q, k, v), module.quantizers["qkv"])
            quantizers = (module.quantizers["s"], module.quantizers["o"])
        arguments = (True, length, length, None, None, q, k, v, nominal_dtype, 1, None, None, None, None, None)
        arguments += (*quantizers, module.softmax_scale, 0.0, True, "sbhd_sbhd_sbhd")
        arguments += () if engine.release == "2.9" else ("sbhd", None)
        out_, aux_ctx_tensors, *_ = engine.backends.fused_attn_fwd(*arguments, "no_bias", "causal")
        tensors, ctx.tensor_objects = prepare_for_saving(q, k, v, out_, *aux_ctx_tensors)
        ctx.save_for_backward(*tensors)
        ctx.module = module
        return out_.dequantize().view(out_.shape) if isinstance(out_, QuantizedTensor) else out_

    @staticmethod
    def backward(ctx, d_out):
        tensors = restore_from_saved(ctx.tensor_objects, ctx.saved_tensors)
        scale, d_out = ctx.module.softmax_scale, d_out.contiguous()
        if not ctx.module.engine.quantizer_class:
            q, k, v, out, *statistics = tensors
            return *_causal_backward(d_out, q, k, v, out, statistics, scale), None
        d_out = ctx.module.quantizers["do"](d_out).dequantize()
        q, k, v, out = (x.dequantize() for x in tensors[:4])
        grads = _causal_backward(d_out, q, k, v, out, tensors[4:], scale)
        grads = _combined_and_quantized(grads, ctx.module.quantizers["dqkv"])
        return *(x.dequantize() for x in grads), None


def _combined_and_quantized(tensors, quantizer):
    """One cast for several tensors: a quantizer that is called twice would forget the first maximum."""
    flat = quantizer(torch.cat([x.reshape(-1) for x in tensors]))
    parts = flat.data.split([x.numel() for x in tensors])
    return [QuantizedTensor(part.view(x.shape), flat.scale, x.dtype) for part, x in zip(parts, tensors, strict=True)]


def _fused_attn_fwd(q, k, v, o_quantizer, attn_scale, num_statistics):
    """The kernel: output, and the tensors for the backward. In FP8 it records the maximum of its own output."""
    if o_quantizer is not None:
        q, k, v = (x.dequantize() for x in (q, k, v))
    out, lse = _causal_forward(q, k, v, attn_scale)
    if o_quantizer is not None:
        out = o_quantizer(out)
    random_state = torch.zeros(2, dtype=torch.int64)
    return out, [lse] + [lse.reciprocal()] * (num_statistics - 1) + [random_state]


def fused_attn_fwd_2_9(
    is_training,
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    fake_dtype,
    fused_attention_backend,
    attn_bias=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    page_table_k=None,
    page_table_v=None,
    s_quantizer=None,
    o_quantizer=None,
    attn_scale=None,
    dropout=0.0,
    fast_zero_fill=True,
    qkv_layout="sbh3d",
    attn_bias_type="no_bias",
    attn_mask_type="padding",
    softmax_type="vanilla",
    window_size=(-1, -1),
    rng_gen=None,
    softmax_offset=None,
    return_max_logit=False,
):
    """FP8 returns the log-sum-exp, a companion and the random state; other formats the first and the last."""
    assert (qkv_layout, attn_bias_type, attn_mask_type) == ("sbhd_sbhd_sbhd", "no_bias", "causal")
    return _fused_attn_fwd(q, k, v, o_quantizer, attn_scale, 1 if o_quantizer is None else 2)


def fused_attn_fwd_2_20(
    is_training,
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    fake_dtype,
    fused_attention_backend,
    attn_bias=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    page_table_k=None,
    page_table_v=None,
    s_quantizer=None,
    o_quantizer=None,
    attn_scale=None,
    dropout=0.0,
    fast_zero_fill=True,
    qkv_layout="sbh3d",
    o_format="sbhd",
    qkv_scale_inv_format=None,
    attn_bias_type="no_bias",
    attn_mask_type="padding",
    softmax_type="vanilla",
    window_size=(-1, -1),
    bottom_right_diagonal=None,
    rng_gen=None,
    softmax_offset=None,
    return_max_logit=False,
    cuda_graph=False,
):
    """Any format returns the log-sum-exp and the random state."""
    assert (qkv_layout, o_format, attn_bias_type, attn_mask_type) == ("sbhd_sbhd_sbhd", "sbhd", "no_bias", "causal")
    return _fused_attn_fwd(q, k, v, o_quantizer, attn_scale, 1)
