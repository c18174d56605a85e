"""AdamW in plain PyTorch with the contract of Transformer Engine's FusedAdam.

Megatron's distributed optimizer and its checkpoints assume that `step` lives in the parameter group and that the state
of a parameter is exactly `exp_avg` and `exp_avg_sq`. It serves where no fused Adam exists, that is on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Adam(torch.optim.Optimizer):
    """Adam with decoupled (`adam_w_mode`) or L2 weight decay; moments in float32.

    Source: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "Megatron calls step() without a closure"
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                group["step"] = group.get("step", 0) + 1
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict) -> None:
        first, second = self._moments(params, "exp_avg"), self._moments(params, "exp_avg_sq")
        gradients = [param.grad.float() for param in params]
        (beta1, beta2), lr, decay, step = group["betas"], group["lr"], group["weight_decay"], group["step"]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            gradients = torch._foreach_add(gradients, params, alpha=decay)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, first, denominators, -lr / (1 - beta1**step))

    def _moments(self, params: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)
        return [self.state[param][name] for param in params]
