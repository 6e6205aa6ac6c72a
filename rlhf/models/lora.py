"""LoRA layers whose forward and backward are a handful of matrix products in the base's number type.

peft's own layer casts its input to float32 and back, scales and adds in passes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.models.products import PLAIN, Parts, products


class LeanLoraLinear(LoraLinear):
    """peft's LoRA layer: the products of this project where they are all there is to do, elsewhere peft's own
    way.
    """

    def forward(self, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        """(..., I) -> (..., O) in the base's number type."""
        parts = None if arguments or more else parts_of(self)
        if parts is None or parts.a is None or type_of_products(parts.weight) != parts.weight.dtype:
            return super().forward(x, *arguments, **more)
        return products(PLAIN, [x.to(parts.weight.dtype)], [parts])


def parts_of(layer: Any) -> Parts | None:
    """What a linear layer computes with; None where it does anything else besides."""
    if type(layer) is nn.Linear:
        return None if "forward" in vars(layer) else Parts(layer.weight, layer.bias)
    if type(layer) is not LeanLoraLinear or layer.merged:
        return None
    base: Any = layer.get_base_layer()
    if base.weight.requires_grad or hasattr(base.weight, "ds_id"):  # DeepSpeed's hooks want peft's own way
        return None
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    if layer.disable_adapters or not layer.active_adapters:
        return Parts(weight, base.bias)
    name = layer.active_adapters[0]
    usual = len(layer.active_adapters) == 1 and name in layer.lora_A and name not in layer.lora_variant
    if not usual or (layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0):
        return None
    a: Any = layer.lora_A[name]
    b: Any = layer.lora_B[name]
    return Parts(weight, base.bias, a.weight, b.weight, layer.scaling[name])


def type_of_products(weight: Tensor) -> torch.dtype:
    """The number type of products with this weight: its own, unless autocast sets another."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


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
