"""Layers laid out for sampling: its products have few rows, and what stands around them takes as long.

A processor lays out a plain bfloat16 matrix anew for every product; and matrices that share an input make
one product.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.engine import Engine
from rlhf.models import llama
from rlhf.models.attention import Heads, split_values, turn
from rlhf.models.loading import trunk
from rlhf.models.lora import type_of_products
from rlhf.models.products import GATE, Parts, RmsNorm, Whole
from rlhf.pass_sizes import SMALL_MODEL

# Narrow models' rotations are looked up in a table, which holds a multiple of this many positions.
POSITIONS = 256

# Makes the function x (..., I) -> (..., O) of a weight (O, I) and a bias (O,).
Prepare = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


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


def _preparation(model: nn.Module, engine: Engine) -> Prepare | None:
    if engine.device.type != "cpu":
        return None
    if engine.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return _laid_out
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    return _plain if small and engine.dtype == torch.float32 else None


def _forwards(model: nn.Module, prepare: Prepare) -> Iterator[tuple[Any, Callable[..., Any]]]:
    inner = trunk(model)
    forward = _forward_of(inner, prepare)
    if forward is not None:
        yield inner, forward
    fused = set() if forward is None else set(inner.layers.modules())
    for layer in model.modules():
        if type(layer) is nn.Linear and layer not in fused and "forward" not in vars(layer):
            yield layer, prepare(layer.weight, layer.bias)


def _forward_of(model: Any, prepare: Prepare) -> Callable[..., BaseModelOutputWithPast] | None:
    """A forward for a model that does what its own does where gradients are not asked for, with a cache and
    padding; matrices that share an input are prepared as one. None as in `llama.hidden_states`.
    """
    pairs = llama.pairs_of(model) if prepare is _plain else 0
    layers = llama.matrices_of(model, sys.maxsize, pairs)
    if layers is None or any(part.a is not None for parts in layers for part in parts):
        return None
    if any("forward" in vars(each) for each in (model, *model.layers)):
        return None
    if model.config._attn_implementation not in llama.MASKED:
        return None
    steps = [
        functools.partial(_step, layer=layer, products=_prepared(parts, prepare))
        for layer, parts in zip(model.layers, layers, strict=True)
    ]
    kind, rotations_at = type_of_products(model.embed_tokens.weight), _rotations_at(model, pairs)
    return functools.partial(_forward, model=model, steps=steps, kind=kind, rotations_at=rotations_at)


def _rotations_at(model: Any, pairs: int) -> Callable[[Tensor, Tensor], llama.Rotations]:
    """`llama.rotations_of` x at positions (B, L), from a table where that is small and stays right."""
    if not pairs or model.rotary_emb.rope_type in ("dynamic", "longrope"):  # these depend on the longest row
        return lambda x, positions: llama.rotations_of(model, x, positions, pairs)

    @functools.lru_cache(maxsize=1)
    def table(count: int) -> llama.Rotations:
        positions = torch.arange(count).unsqueeze(0)
        return llama.rotations_of(model, model.embed_tokens.weight, positions, pairs)

    def look_up(_: Tensor, positions: Tensor) -> llama.Rotations:
        count = int(positions.max()) + 1
        found = table(count + -count % POSITIONS)
        return found._replace(first=found.first[0, positions], second=found.second[0, positions])

    return look_up


def _forward(  # noqa: PLR0913 (transformers' signature of a model)
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    *,
    model: Any,
    steps: Sequence[Callable[..., Tensor]],
    kind: torch.dtype,
    rotations_at: Callable[[Tensor, Tensor], llama.Rotations],
    **_: Any,
) -> BaseModelOutputWithPast:
    """The last hidden states (B, L, H) of tokens (B, L) behind cached ones; the mask (B, T) is of all."""
    length, before = input_ids.shape[1], 0 if past_key_values is None else past_key_values.get_seq_length()
    x = model.embed_tokens(input_ids).to(kind)
    if position_ids is None:
        position_ids = torch.arange(before, before + length, device=x.device).unsqueeze(0)
    rotations, added = rotations_at(x, position_ids), None
    if attention_mask is not None and not bool(attention_mask.all()):
        seen = attention_mask[:, None, None, :].bool().expand(-1, -1, length, -1).tril(before)
        added = x.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    x = x.flatten(0, 1)
    for step in steps:
        x = step(x, rotations, added, past_key_values)
    x = _normed(model.norm, x).unflatten(0, (-1, length))
    return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


def _prepared(parts: Sequence[Parts], prepare: Prepare) -> list[Callable[[Tensor], Tensor]]:
    """The products with query, key and value; output; gate and up; down."""
    found = []
    for some in (parts[:3], parts[3:4], parts[4:6], parts[6:]):
        whole = Whole(some, some[0].weight.dtype)
        found.append(prepare(whole.weight, whole.bias))
    return found


def _step(  # noqa: PLR0913 (a layer and what it sees)
    x: Tensor,
    rotations: llama.Rotations,
    added: Tensor | None,
    cache: Any,
    *,
    layer: Any,
    products: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """The hidden states (B * L, H) after a layer; `added` to products of queries and keys (B, 1, L, T)."""
    own, (first, output, gate_up, down) = layer.self_attn, products
    sizes = Heads(rotations.num_queries, rotations.num_keys, own.head_dim, own.scaling)
    heads = llama.heads_of(own, first(_normed(layer.input_layernorm, x)), *sizes[:2])
    turning, v = split_values(heads.unflatten(0, (-1, rotations.first.shape[1])), sizes)
    q, k = split_values(turn(turning, *rotations[:2], sizes.width), sizes)
    q, k, v = (each.unflatten(-1, (-1, sizes.width)).transpose(1, 2) for each in (q, k, v))
    if cache is not None:
        k, v = cache.update(k, v, own.layer_idx)
    attend = AttentionInterface()[own.config._attn_implementation]
    found, _ = attend(own, q, k, v, added, dropout=0.0, scaling=own.scaling)
    x = output(found.reshape(len(x), -1)).add_(x)
    gated = gate_up(_normed(layer.post_attention_layernorm, x))
    return down(GATE.forward(*gated.chunk(2, dim=-1))).add_(x)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return RmsNorm(norm.variance_epsilon).forward(x, norm.weight)


def _laid_out(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), None)
    return functools.partial(_linear, weight, None if bias is None else bias.detach().bfloat16())


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


def _plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return functools.partial(functional.linear, weight=weight.detach(), bias=bias)
