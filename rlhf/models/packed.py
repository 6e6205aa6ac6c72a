"""Layers laid out for sampling: its products have few rows, and what stands around them takes as long.

A processor lays out a plain bfloat16 matrix anew for every product; and matrices that share an input make
one product.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf.engine import Engine
from rlhf.models import llama
from rlhf.models.loading import trunk
from rlhf.pass_sizes import SMALL_MODEL


@contextlib.contextmanager
def packed(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Let the layers compute with copies of their weights, for a while: in oneDNN's own layout where products
    are in bfloat16 on a processor that it serves, beside one another where Llama's layers have one input.

    Does nothing on a GPU, nor for large models in float32. The weights must not change meanwhile.
    """
    prepare = _preparation(model, engine)
    if prepare is None:
        yield
        return
    changed: list[Any] = []
    try:
        for module, forward in _forwards(model, prepare):
            module.forward = forward
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _preparation(model: nn.Module, engine: Engine) -> llama.Prepare | None:
    if engine.device.type != "cpu":
        return None
    if engine.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return _laid_out
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    return _plain if small and engine.dtype == torch.float32 else None


def _forwards(model: nn.Module, prepare: llama.Prepare) -> Iterator[tuple[Any, Callable[..., Any]]]:
    inner = trunk(model)
    forward = llama.forward_of(inner, prepare)
    if forward is not None:
        yield inner, forward
    fused = set() if forward is None else set(inner.layers.modules())
    for layer in model.modules():
        if type(layer) is nn.Linear and layer not in fused and "forward" not in vars(layer):
            yield layer, prepare(layer.weight, layer.bias)


def _laid_out(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), None)
    return functools.partial(_linear, weight, None if bias is None else bias.detach().bfloat16())


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


def _plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return functools.partial(functional.linear, weight=weight.detach(), bias=bias)
