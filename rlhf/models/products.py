"""Matrix products of one input with several layers' weights, LoRA's factors among them, and what comes before
them, as one step of autograd.

What comes before is cheap beside a wide product, so it is computed again in the backward pass and not held. N
rows, I inputs, O outputs of all layers beside one another, r ranks of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rlhf.derived import derived, rounded

# Layers narrower than this have products as cheap as what comes before them, which then is held, and weights
# that are cheap to move.
NARROW = 256


class Parts(NamedTuple):
    """What a linear layer computes with: W (outputs, I), its bias (outputs,), and A (rank, I) and B (outputs,
    rank) of the adapter that acts, with its scaling. An adapted layer's W and bias are frozen.

    With `pairs`, the width of a head, outputs i and i + pairs / 2 of each head stand beside one another.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    pairs: int = 0


class Plain:
    """Nothing comes before."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I)."""
        return x

    def again(self, x: Tensor) -> list[Tensor]:
        """What `forward` gave, in the backward pass, and what else that has use for."""
        return [x]

    def backward(self, grad: Tensor, steps: list[Tensor], x: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, from the output's, which may be overwritten, and what `again` gave."""
        return [grad]


@dataclass(frozen=True)
class RmsNorm:
    """weight * x / sqrt(mean(x^2) + epsilon). Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467"""

    epsilon: float

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, I), weight (I,) -> (N, I) in the number type of x."""
        return self.again(x, weight)[0]

    def again(self, x: Tensor, weight: Tensor) -> list[Tensor]:
        """The output, x / norm in float32, and 1 / norm (N, 1)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=exact)
        scale = torch.addcmul(
            _epsilon(self.epsilon, exact, x.device), norm, norm, value=1 / x.shape[1]
        ).rsqrt_()
        unit = x * scale
        return [(unit * weight.to(x.dtype)).to(x.dtype), unit, scale]

    def backward(self, grad: Tensor, steps: list[Tensor], x: Tensor, weight: Tensor) -> list[Tensor | None]:
        """The gradients of x, computed in float32, and of weight; `grad` is overwritten."""
        _, unit, scale = steps
        grad = grad.to(unit.dtype)
        of_weight = (grad * unit).sum(0).to(weight.dtype) if weight.requires_grad else None
        inner = grad.mul_(weight.to(unit.dtype))
        mean = torch.linalg.vecdot(inner, unit).div_(x.shape[1]).unsqueeze(1)
        return [inner.addcmul_(unit, mean, value=-1).mul_(scale).to(x.dtype), of_weight]


@functools.lru_cache(maxsize=16)
def _epsilon(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1, 1), value, dtype=dtype, device=device)


class Gate:
    """silu(gate) * up. Shazeer 2020, https://arxiv.org/abs/2002.05202"""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(N, I), (N, I) -> (N, I)."""
        return functional.silu(gate).mul_(up)

    def again(self, gate: Tensor, up: Tensor) -> list[Tensor]:
        """The output, and silu(gate)."""
        opened = functional.silu(gate)
        return [opened * up, opened]

    def backward(
        self,
        grad: Tensor,
        steps: list[Tensor],
        gate: Tensor,
        up: Tensor,
        *,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor | None]:
        """The gradients of gate and up, written to `out`; `grad` is overwritten."""
        of_gate, of_up = out or (torch.empty_like(gate), torch.empty_like(up))
        torch.mul(steps[1], grad, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=of_gate)
        return [of_gate, of_up]


PLAIN, GATE = Plain(), Gate()
Before = Plain | RmsNorm | Gate


def begin(before: Before, inputs: Sequence[Tensor], width: int) -> tuple[Tensor, list[Tensor]]:
    """What `before` makes of inputs, and the steps for its backward pass, none where the width is large."""
    if width >= NARROW:
        return before.forward(*inputs), []
    steps = before.again(*inputs)
    return steps[0], steps


def join(weights: Sequence[Tensor]) -> None:
    """Move matrices (outputs, I) below one another in memory, where `products` takes them as one."""
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Matrices (outputs, I) below one another: a view where they lie so in memory, else a copy."""
    first, length = weights[0].detach(), 0
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for weight in weights:
        where = (weight.untyped_storage().data_ptr(), weight.storage_offset())
        if not weight.is_contiguous() or where != (storage, start + length * first.shape[1]):
            return torch.cat([each.detach() for each in weights])
        length += len(weight)
    return first.as_strided((length, first.shape[1]), first.stride())


def products(before: Before, inputs: Sequence[Tensor], layers: Sequence[Parts]) -> Tensor:
    """Outputs (..., O) of layers that share the input (..., I) that `before` makes of `inputs`, in the number
    type of the first of these; weights of another type are rounded to it.
    """
    rows = [each.reshape(-1, each.shape[-1]) if each.dim() > 1 else each for each in inputs]
    weights, others = tensors_of(layers)
    y = _Products.apply(before, others, len(rows), *rows, *weights)
    return y.view(*inputs[0].shape[:-1], y.shape[-1])


class Whole:
    """Layers as one, in a number type: W (O, I), bias (O,), A (r, I) of all adapters, and B (O, r), where
    each adapter has rows and columns of its own. Adapters that are `folded` are in W too; outputs stand in
    `order`.
    """

    def __init__(self, layers: Sequence[Parts], kind: torch.dtype) -> None:
        weights = [layer.weight for layer in layers]
        self.weight = rounded(weights[0].detach() if len(layers) == 1 else joined(weights), kind)
        self.bias, self.a, self.b = None, None, None
        if any(layer.bias is not None for layer in layers):
            biases = [w.new_zeros(len(w)) if bias is None else bias for w, bias, *_ in layers]
            self.bias = torch.cat(biases).to(kind)
        factors = [layer.a for layer in layers if layer.a is not None]
        if factors:
            self.a = (torch.cat(factors) if len(factors) > 1 else factors[0]).to(kind)
            blocks = [w.new_zeros(len(w), 0) if b is None else b * s for w, _, _, b, s, _ in layers]
            blocks = [block.to(kind) for block in blocks]
            self.b = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]
        # Added to W where that is so narrow that this takes fewer operations than the products with A and B,
        # and nothing is rounded by it.
        self.folded = (
            self.a is not None
            and factors[0].dtype == kind
            and self.weight.numel() <= 3 * len(self.a) * sum(self.weight.shape)
        )
        if self.folded and self.a is not None and self.b is not None:
            self.weight = torch.addmm(self.weight, self.b, self.a)
        self.order = _order_of(tuple((len(layer.weight), layer.pairs) for layer in layers))
        if self.order is not None:
            self.weight = self.weight[self.order]
            self.bias = None if self.bias is None else self.bias[self.order]
            self.b = None if self.b is None else self.b[self.order]

    def as_in_layers(self, x: Tensor) -> Tensor:
        """What belongs to the outputs (O, ...), in the layers' own order."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (N, I) -> (N, O), and what adapters made of x in between (N, r), where that was computed."""
        y = functional.linear(x, self.weight, self.bias)
        if self.a is None or self.b is None or self.folded:
            return y, None
        hidden = x @ self.a.t()
        return y.addmm_(hidden, self.b.t()), hidden

    def gradients(
        self,
        layers: Sequence[Parts],
        grad: Tensor,
        x: Tensor,
        hidden: Tensor | None,
        *,
        of_input: bool = True,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of x and of all layers' tensors, from that of the outputs (N, O)."""
        low = None if hidden is None or self.b is None else grad @ self.b
        of_x = grad @ self.weight if of_input else None
        if of_x is not None and low is not None and self.a is not None:
            of_x.addmm_(low, self.a)
        return of_x, _weight_gradients(layers, self, grad, x, hidden, low)

    @classmethod
    def of(cls, layers: Sequence[Parts], kind: torch.dtype) -> Whole:
        """The same for all passes while the weights do not change."""
        tensors, others = tensors_of(layers)
        return derived(lambda: cls(layers, kind), tensors, kind, *others)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Before, others: Others, num_inputs: int, *tensors: Tensor) -> Tensor:
        inputs, layers = tensors[:num_inputs], layers_of(tensors[num_inputs:], others)
        with torch.autocast(inputs[0].device.type, enabled=False):
            x, steps = begin(before, inputs, inputs[0].shape[1])
            whole = Whole.of(layers, x.dtype)
            y, hidden = whole.outputs(x)
        ctx.save_for_backward(*tensors, hidden, *steps)
        ctx.before, ctx.others, ctx.num_inputs, ctx.end = before, others, num_inputs, len(tensors)
        ctx.whole = whole
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        everything = ctx.saved_tensors
        saved, (hidden, *steps) = everything[: ctx.end], everything[ctx.end :]
        inputs, layers = saved[: ctx.num_inputs], layers_of(saved[ctx.num_inputs :], ctx.others)
        steps = steps or ctx.before.again(*inputs)
        of_input = any(ctx.needs_input_grad[3 : 3 + len(inputs)])
        of_x, of_weights = ctx.whole.gradients(layers, grad, steps[0], hidden, of_input=of_input)
        of_inputs = [None] * len(inputs) if of_x is None else ctx.before.backward(of_x, steps, *inputs)
        return None, None, None, *of_inputs, *of_weights


Others = Sequence[tuple[float, int]]  # of each layer: scaling and pairs


def tensors_of(layers: Sequence[Parts]) -> tuple[list[Tensor | None], Others]:
    """What a step of autograd takes of layers: their tensors, and what else they have."""
    return [tensor for layer in layers for tensor in layer[:4]], [layer[4:] for layer in layers]


def layers_of(tensors: Sequence[Tensor], others: Others) -> list[Parts]:
    """The layers of `tensors_of`."""
    rows = zip(tensors[0::4], tensors[1::4], tensors[2::4], tensors[3::4], others, strict=True)
    return [Parts(*row[:4], *row[4]) for row in rows]


@functools.lru_cache(maxsize=16)
def _order_of(layers: Sequence[tuple[int, int]]) -> Tensor | None:
    """Which output of layers (outputs, pairs) stands at each place; None where none is moved."""
    if not any(pairs for _, pairs in layers):
        return None
    places = torch.arange(sum(size for size, _ in layers)).split([size for size, _ in layers])
    parts = zip(places, layers, strict=True)
    return torch.cat(
        [own.view(-1, 2, pairs // 2).mT.flatten() if pairs else own for own, (_, pairs) in parts]
    )


def _weight_gradients(  # noqa: PLR0913 (the tensors of the equation)
    layers: Sequence[Parts], whole: Whole, grad: Tensor, x: Tensor, hidden: Tensor | None, low: Tensor | None
) -> list[Tensor | None]:
    """The gradients of W, bias, A and B of each layer, None where they are frozen."""
    of_weight, of_a, of_b = None, None, None
    trained = any(layer.a is not None and layer.a.requires_grad for layer in layers)
    if any(layer.weight.requires_grad for layer in layers) or (whole.folded and trained):
        of_weight = grad.t() @ x
    if trained and whole.a is not None and whole.b is not None:
        if of_weight is not None and whole.folded:
            of_a, of_b = whole.b.t() @ of_weight, of_weight @ whole.a.t()
        elif hidden is not None and low is not None:
            of_a, of_b = low.t() @ x, grad.t() @ hidden
    of_weight, of_b = (None if each is None else whole.as_in_layers(each) for each in (of_weight, of_b))
    of_bias = None
    if any(layer.bias is not None and layer.bias.requires_grad for layer in layers):
        of_bias = whole.as_in_layers(grad.sum(0))
    found: list[Tensor | None] = []
    row = column = 0
    for weight, bias, a, b, scaling, _ in layers:
        rows = slice(row, row + weight.shape[0])
        row = rows.stop
        found += [
            of_weight[rows].to(weight.dtype) if of_weight is not None and weight.requires_grad else None
        ]
        if of_bias is None or bias is None or not bias.requires_grad:
            found += [None]
        else:
            found += [of_bias[rows].to(bias.dtype)]
        columns = slice(column, column + (0 if a is None else len(a)))
        column = columns.stop
        if a is None or b is None or of_a is None or of_b is None or not a.requires_grad:
            found += [None, None]
        else:
            found += [of_a[columns].to(a.dtype), of_b[rows, columns].to(b.dtype) * scaling]
    return found
