"""nvidia-modelopt's distillation loss and ours are the same number on the same logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.divergences import divergence_and_slopes

KINDS = {"forward_kl": False, "reverse_kl": True}


@pytest.mark.parametrize("kind", KINDS)
def test_our_divergence_and_its_gradient_are_those_of_modelopts_logits_kl_loss(kind):
    """KL(teacher || student); with `reverse` modelopt exchanges the two, which is our reverse KL."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    generator = torch.Generator().manual_seed(1)
    student_SBV, teacher_SBV = (3 * torch.randn(5, 2, 37, generator=generator) for _ in range(2))
    student_SBV.requires_grad_()
    config = SimpleNamespace(tensor_model_parallel_size=1, context_parallel_size=1, sequence_parallel=False)
    theirs_BS, *_ = LogitsKLLoss(config, reverse=KINDS[kind])(student_SBV, teacher_SBV)
    theirs_BS.sum().backward()

    log_p_CV, log_q_CV = (logits.detach().flatten(0, 1).log_softmax(-1) for logits in (teacher_SBV, student_SBV))
    q_CV = log_q_CV.exp()
    ours_C, slopes_CV = divergence_and_slopes(log_p_CV, log_q_CV, DivergenceConfig(kind=kind))
    gradient_CV = slopes_CV - q_CV * slopes_CV.sum(-1, keepdim=True)
    assert torch.allclose(ours_C.view(5, 2), theirs_BS.T.detach(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient_CV.view(5, 2, 37), student_SBV.grad, rtol=1e-4, atol=1e-6)
