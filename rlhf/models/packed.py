"""Weights laid out for sampling: a processor lays out a plain bfloat16 matrix anew for every product, which
takes longer than the product where it has few rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.engine import Engine


@contextlib.contextmanager
def packed(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Let the linear layers compute with copies of their weights in oneDNN's own layout, for a while.

    Does nothing but in bfloat16 on a processor that oneDNN serves. The weights must not change meanwhile.
    """
    usable = engine.device.type == "cpu" and engine.dtype == torch.bfloat16
    if not (usable and torch.backends.mkldnn.is_available()):
        yield
        return
    layers: list[Any] = [
        layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)
    ]
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(engine.dtype), None)
            bias = None if layer.bias is None else layer.bias.detach().to(engine.dtype)
            layer.forward = functools.partial(_linear, weight, bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
