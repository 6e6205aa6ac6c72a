"""LoRA layers whose forward and backward are a handful of matrix products in the base's number type.

peft's own layer casts its input to float32 and back, scales and adds in passes of their own. N rows of input,
I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class _Product(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T for x (N, I), W (O, I), A (r, I), B (O, r); W is frozen."""

    @staticmethod
    def forward(  # noqa: PLR0913 (the tensors of the equation)
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        a_low, b_low = a.to(x.dtype), (b * scaling).to(x.dtype)
        hidden = x @ a_low.t()
        ctx.save_for_backward(x, weight, hidden, a_low, b_low)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return functional.linear(x, weight, bias).addmm_(hidden, b_low.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, hidden, a_low, b_low = ctx.saved_tensors
        grad_hidden = grad @ b_low
        grad_a = (grad_hidden.t() @ x).to(ctx.dtypes[0])
        grad_b = (grad.t() @ hidden).to(ctx.dtypes[1]) * ctx.scaling
        grad_x = (grad @ weight).addmm_(grad_hidden, a_low) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a, grad_b, None


class LeanLoraLinear(LoraLinear):
    """peft's LoRA layer: the products above where they are all there is to do, elsewhere peft's own way."""

    def forward(self, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        """(..., I) -> (..., O) in the base's number type."""
        base: Any = self.get_base_layer()
        active = self.active_adapters
        plain = not (arguments or more or self.disable_adapters or self.merged) and len(active) == 1
        if not plain or active[0] not in self.lora_A or active[0] in self.lora_variant:
            return super().forward(x, *arguments, **more)
        name = active[0]
        dropout = self.lora_dropout[name]
        kind = x.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != base.weight.dtype
        if (self.training and getattr(dropout, "p", 0.0) > 0) or base.weight.requires_grad or cast:
            return super().forward(x)
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        y = _Product.apply(
            x.reshape(-1, x.shape[-1]).to(weight.dtype),
            weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return y.view(*x.shape[:-1], -1)


def merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """W + scaling B A of the acting adapter in the number type of W: (O, I), or (I, O) where W is kept so.

    The product's terms are rounded as in `_Product`, its sum once.
    """
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    return torch.addmm(weight, a.t(), b.t()) if layer.fan_in_fan_out else torch.addmm(weight, b, a)


def make_lean(model: nn.Module) -> None:
    """Let every LoRA layer over an unquantized linear layer compute this way."""
    for module in model.modules():
        if type(module) is LoraLinear and isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            module.__class__ = LeanLoraLinear
