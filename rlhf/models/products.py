"""Matrix products of one input with several layers' weights, LoRA's factors among them, and what comes before
them, as one step of autograd.

What comes before is cheap, so it is computed again in the backward pass and not held. N rows, I inputs, O
outputs of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Parts(NamedTuple):
    """What a linear layer computes with: W (O, I), its bias (O,), and A (r, I) and B (O, r) of the adapter
    that acts, with its scaling. An adapted layer's W and bias are frozen.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    def scaled_b(self) -> Tensor:
        """scaling B (O, r) in the number type of W."""
        assert self.b is not None
        return (self.b * self.scaling).to(self.weight.dtype)

    def folded(self) -> Parts:
        """The layer without its adapter, which is added to W, where W is so narrow that this takes fewer
        operations than the products with A and B, and nothing is rounded by it.
        """
        if self.a is None or self.b is None or self.weight.dtype != self.a.dtype:
            return self
        if self.weight.numel() > 2 * len(self.a) * sum(self.weight.shape):
            return self
        return Parts(torch.addmm(self.weight, self.b, self.a, alpha=self.scaling), self.bias)


class Plain:
    """Nothing comes before."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I)."""
        return x

    def again(self, x: Tensor) -> list[Tensor]:
        """What `forward` gave, in the backward pass, and what else that has use for."""
        return [x]

    def backward(self, grad: Tensor, steps: list[Tensor], x: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, from that of the output and what `again` gave."""
        return [grad]


@dataclass(frozen=True)
class RmsNorm:
    """weight * x / sqrt(mean(x^2) + epsilon). Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467"""

    epsilon: float

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, I), weight (I,) -> (N, I)."""
        return functional.rms_norm(x, weight.shape, weight, self.epsilon)

    def again(self, x: Tensor, weight: Tensor) -> list[Tensor]:
        """The output, x / norm in float32, and 1 / norm (N, 1)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=exact)
        scale = norm.square_().div_(x.shape[1]).add_(self.epsilon).rsqrt_()
        unit = x * scale
        return [unit.to(x.dtype) * weight, unit, scale]

    def backward(self, grad: Tensor, steps: list[Tensor], x: Tensor, weight: Tensor) -> list[Tensor | None]:
        """The gradients of x, computed in float32, and of weight."""
        _, unit, scale = steps
        inner = (grad * weight).to(unit.dtype)
        mean = torch.linalg.vecdot(inner, unit).div_(x.shape[1]).unsqueeze(1)
        grad_x = torch.addcmul(inner, unit, mean, value=-1).mul_(scale).to(x.dtype)
        return [grad_x, (grad * unit).sum(0).to(weight.dtype) if weight.requires_grad else None]


class Gate:
    """silu(gate) * up. Shazeer 2020, https://arxiv.org/abs/2002.05202"""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(N, I), (N, I) -> (N, I)."""
        return functional.silu(gate).mul_(up)

    def again(self, gate: Tensor, up: Tensor) -> list[Tensor]:
        """The output, and silu(gate)."""
        opened = functional.silu(gate)
        return [opened * up, opened]

    def backward(self, grad: Tensor, steps: list[Tensor], gate: Tensor, up: Tensor) -> list[Tensor | None]:
        """The gradients of gate and up."""
        return [torch.ops.aten.silu_backward(grad * up, gate), steps[1].mul_(grad)]


PLAIN, GATE = Plain(), Gate()
Before = Plain | RmsNorm | Gate


def products(before: Before, inputs: Sequence[Tensor], layers: Sequence[Parts]) -> list[Tensor]:
    """Outputs (..., O) of layers that share the input (..., I) that `before` makes of `inputs`, all of them
    in the weights' number type.
    """
    rows = [each.reshape(-1, each.shape[-1]) if each.dim() > 1 else each for each in inputs]
    weights = [tensor for layer in layers for tensor in layer[:4]]
    found = _Products.apply(before, [layer.scaling for layer in layers], len(rows), *rows, *weights)
    return [y.view(*inputs[0].shape[:-1], y.shape[-1]) for y in found]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, before: Before, scalings: list[float], num_inputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, layers = tensors[:num_inputs], _layers(tensors[num_inputs:], scalings)
        with torch.autocast(inputs[0].device.type, enabled=False):
            x = before.forward(*inputs)
            folded = [layer.folded() for layer in layers]
            hidden = _hidden(x, folded)
            found = [functional.linear(x, layer.weight, layer.bias) for layer in folded]
            for y, layer, low in zip(found, folded, hidden, strict=True):
                if low is not None:
                    y.addmm_(low, layer.scaled_b().t())
        ctx.save_for_backward(*tensors, *hidden)
        ctx.before, ctx.scalings, ctx.num_inputs = before, scalings, num_inputs
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, hidden = saved[: ctx.num_inputs], saved[-len(grads) :]
        layers = _layers(saved[ctx.num_inputs : -len(grads)], ctx.scalings)
        folded = [layer.folded() for layer in layers]
        low = [None if each.b is None else g @ each.scaled_b() for g, each in zip(grads, folded, strict=True)]
        steps, of_inputs = ctx.before.again(*inputs), [None] * len(inputs)
        if any(ctx.needs_input_grad[3 : 3 + len(inputs)]):
            of_inputs = ctx.before.backward(_input_gradient(grads, low, folded), steps, *inputs)
        of_weights = [
            gradient
            for layer, grad, *rest in zip(layers, grads, hidden, low, strict=True)
            for gradient in _weight_gradients(layer, grad, steps[0], *rest)
        ]
        return None, None, None, *of_inputs, *of_weights


def _layers(tensors: Sequence[Tensor], scalings: Sequence[float]) -> list[Parts]:
    rows = zip(tensors[0::4], tensors[1::4], tensors[2::4], tensors[3::4], scalings, strict=True)
    return [Parts(*row) for row in rows]


def _hidden(x: Tensor, layers: Sequence[Parts]) -> list[Tensor | None]:
    """x A^T (N, r) of each layer with an adapter, by one product for all."""
    factors = [layer.a for layer in layers if layer.a is not None]
    if not factors:
        return [None] * len(layers)
    parts = iter((x @ torch.cat(factors).to(x.dtype).t()).split([len(a) for a in factors], dim=1))
    return [None if layer.a is None else next(parts) for layer in layers]


def _input_gradient(grads: Sequence[Tensor], low: Sequence[Tensor | None], layers: Sequence[Parts]) -> Tensor:
    """The gradient (N, I) of the shared input, of those of the outputs (N, O) and of x A^T (N, r)."""
    total = grads[0] @ layers[0].weight
    for grad, layer in zip(grads[1:], layers[1:], strict=True):
        total.addmm_(grad, layer.weight)
    adapted = [(each, layer.a) for each, layer in zip(low, layers, strict=True) if each is not None]
    if adapted:
        hidden, factors = zip(*adapted, strict=True)
        total.addmm_(torch.cat(hidden, dim=1), torch.cat(factors).to(total.dtype))
    return total


def _weight_gradients(
    layer: Parts, grad: Tensor, x: Tensor, hidden: Tensor | None, low: Tensor | None
) -> list[Tensor | None]:
    """The gradients of W, bias, A and B, None where they are frozen."""
    found: list[Tensor | None] = [None] * 4
    if layer.bias is not None and layer.bias.requires_grad:
        found[1] = grad.sum(0)
    if layer.a is None or layer.b is None:
        found[0] = grad.t() @ x if layer.weight.requires_grad else None
    elif not layer.a.requires_grad:
        pass
    elif hidden is None or low is None:  # folded into W
        whole = grad.t() @ x
        found[2:] = (layer.b.t() @ whole).mul_(layer.scaling), (whole @ layer.a.t()).mul_(layer.scaling)
    else:
        found[2:] = (
            (low.t() @ x).to(layer.a.dtype),
            (grad.t() @ hidden).to(layer.b.dtype).mul_(layer.scaling),
        )
    return found
