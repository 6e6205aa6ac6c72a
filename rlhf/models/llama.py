"""The layers of Llama and its like over whole sequences, computed by fewer and larger steps.

transformers' layers hold every step's result for the backward pass, about twice as much as it needs, and take
ten passes over memory for a norm. The sums are the same. B sequences, L tokens, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rlhf.models.lora import in_type_of_products, parts_of
from rlhf.models.products import GATE, PLAIN, Parts, RmsNorm, products

MODELS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
NUM_MATRICES = 7  # of a layer


def hidden_states(model: Any, tokens: Tensor) -> Tensor | None:
    """Hidden states (B, L, H) before the last norm, of tokens (B, L) with no padding before others; None
    where the model asks for anything that is not computed here.
    """
    layers = _layers(model, tokens.shape[1])
    if layers is None:
        return None
    x = model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    rotations = model.rotary_emb(x, positions)
    attend = AttentionInterface()[model.config._attn_implementation]
    for layer, parts in zip(model.layers, layers, strict=True):
        if layer.training and layer.gradient_checkpointing:
            x = checkpoint(_next, x, layer, parts, rotations, attend, use_reentrant=False)
        else:
            x = _next(x, layer, parts, rotations, attend)
    return x


def _next(
    x: Tensor, layer: Any, parts: list[Parts], rotations: tuple[Tensor, Tensor], attend: Callable[..., Any]
) -> Tensor:
    """The hidden states (B, L, H) after a layer, from those before it."""
    attention, (query, key, value, output, gate, up, down) = layer.self_attn, parts
    projected = products(*_normed(layer.input_layernorm, x), [query, key, value])
    q, k, v = (each.unflatten(-1, (-1, attention.head_dim)) for each in projected)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotations)
    found, _ = attend(attention, q, k, v.transpose(1, 2), None, dropout=0.0, scaling=attention.scaling)
    x = x + products(PLAIN, [found.flatten(2)], [output])[0]
    gated = products(*_normed(layer.post_attention_layernorm, x), [gate, up])
    return x + products(GATE, gated, [down])[0]


def _normed(norm: Any, x: Tensor) -> tuple[RmsNorm, list[Tensor]]:
    return RmsNorm(norm.variance_epsilon), [x, norm.weight]


def _layers(model: Any, length: int) -> list[list[Parts]] | None:
    """What each layer's seven matrices compute with: query, key, value, output, gate, up, down."""
    if type(model) not in MODELS:
        return None
    config = model.config
    window = getattr(config, "sliding_window", None)
    drops = model.training and config.attention_dropout > 0
    windowed = window is not None and window < length
    kernel = config._attn_implementation
    if drops or windowed or config.hidden_act != "silu" or kernel not in AttentionInterface():
        return None
    weight: Tensor = model.embed_tokens.weight
    found: list[list[Parts]] = []
    for layer in model.layers:
        parts = [
            part for part in map(parts_of, _matrices(layer)) if part and part.weight.dtype == weight.dtype
        ]
        if len(parts) < NUM_MATRICES:
            return None
        found.append(parts)
    return found if in_type_of_products(weight) else None


def _matrices(layer: Any) -> Iterator[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
