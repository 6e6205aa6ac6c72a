"""The layers of Llama and its like, computed by fewer and larger steps.

transformers' layers hold every step's result for the backward pass, about twice as much as it needs, and take
ten passes over memory for a norm. The sums are the same. B sequences, L tokens, H width.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaModel, MistralModel, Qwen2Model, Qwen3Model

from rlhf.models import attention
from rlhf.models.lora import parts_of, type_of_products
from rlhf.models.products import GATE, PLAIN, Parts, RmsNorm, join, joined, products

# Makes the function x (..., I) -> (..., O) of a weight (O, I) and a bias (O,).
Prepare = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]

MODELS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
NUM_MATRICES = 7  # of a layer
MASKED = ("sdpa", attention.NAME)  # the kernels that take any mask


def hidden_states(model: Any, tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
    """Last hidden states (N, H) at N positions, row after row, of tokens (B, L) with no padding before
    others; None where the model asks for anything that is not computed here.

    All are in the number type of products; weights of another are rounded to it.
    """
    layers = _layers(model, tokens.shape[1])
    if layers is None:
        return None
    x = model.embed_tokens(tokens).to(type_of_products(model.embed_tokens.weight))
    cosines, sines = model.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0))
    config = model.config
    rotations = _Rotations.of(cosines[0], sines[0], config.num_attention_heads, config.num_key_value_heads)
    wanted = _Wanted(rows, columns, tokens.shape) if model.config._attn_implementation in MASKED else None
    for index, (layer, parts) in enumerate(zip(model.layers, layers, strict=True)):
        step = functools.partial(_next, layer=layer, parts=parts, rotations=rotations)
        if index == len(layers) - 1 and wanted is not None:
            step = functools.partial(step, wanted=wanted)
        if layer.training and layer.gradient_checkpointing:
            x = checkpoint(step, x, use_reentrant=False)
        else:
            x = step(x)
    return _norm(model.norm, x[rows, columns] if wanted is None else x)


class _Wanted:
    """Positions of tokens (B, L) whose states alone are asked for, beside one another as queries (B, Q)."""

    def __init__(self, rows: Tensor, columns: Tensor, shape: torch.Size) -> None:
        self.index = (rows, columns)
        counts = torch.bincount(rows, minlength=shape[0])
        places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        self.slots = (rows, places)
        self.shape = (shape[0], int(counts.max()))
        last_keys = rows.new_zeros(self.shape).index_put(self.slots, columns)
        keys = torch.arange(shape[1], device=rows.device)
        self.mask = (keys <= last_keys.unsqueeze(-1)).unsqueeze(1)  # (B, 1, Q, L)


class _Rotations(NamedTuple):
    """What positions (L or N) multiply heads with, beside one another, to turn them: queries, keys, and
    values, which do not turn. Su et al. 2021, https://arxiv.org/abs/2104.09864
    """

    cosines: Tensor  # (L, heads * D)
    sines: Tensor
    num_queries: int
    num_keys: int

    @classmethod
    def of(cls, cosines: Tensor, sines: Tensor, num_queries: int, num_keys: int) -> _Rotations:
        """From cosines and sines (L, D), each of two equal halves."""
        half = cosines.shape[1] // 2
        turned, still = num_queries + num_keys, cosines.new_zeros(num_keys * cosines.shape[1])
        signed = torch.cat([-sines[:, :half], sines[:, half:]], dim=1)
        wide = [each.repeat(1, turned) for each in (cosines, signed)]
        rest = [each.expand(len(cosines), -1) for each in (still + 1, still)]
        tables = [torch.cat(pair, dim=1) for pair in zip(wide, rest, strict=True)]
        return cls(tables[0], tables[1], num_queries, num_keys)

    def part(self, start: int, stop: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tables of some heads, at all positions or at N columns."""
        width = self.cosines.shape[1] // (self.num_queries + 2 * self.num_keys)
        tables = [each[:, start * width : stop * width] for each in self[:2]]
        tables = tables if columns is None else [each[columns] for each in tables]
        return tables[0], tables[1]


def _next(
    x: Tensor, layer: Any, parts: list[Parts], rotations: _Rotations, wanted: _Wanted | None = None
) -> Tensor:
    """The hidden states (B, L, H) after a layer, from those before it; (N, H) where some alone are wanted."""
    own, (query, key, value, output, gate, up, down) = layer.self_attn, parts
    norm, states, mask = layer.input_layernorm, x, None
    num_queries, num_keys = rotations.num_queries, rotations.num_keys
    first, start = ([query, key, value], 0) if wanted is None else ([key, value], num_queries)
    heads = _heads(own, products(*_normed(norm, x), first), num_queries - start, num_keys)
    heads = _turned(heads, *rotations.part(start, num_queries + 2 * num_keys))
    q, k, v = heads.split([num_queries - start, num_keys, num_keys], dim=-2)
    if wanted is not None:
        states, mask = x[wanted.index], wanted.mask
        q = _heads(own, products(*_normed(norm, states), [query]), num_queries, 0)
        q = _turned(q, *rotations.part(0, num_queries, wanted.index[1]))
        q = q.new_zeros(*wanted.shape, *q.shape[1:]).index_put(wanted.slots, q)
    attend = AttentionInterface()[own.config._attn_implementation]
    found, _ = attend(
        own, *(each.transpose(1, 2) for each in (q, k, v)), mask, dropout=0.0, scaling=own.scaling
    )
    found = (found if wanted is None else found[wanted.slots]).flatten(-2)
    x = states + products(PLAIN, [found], [output])
    gated = products(*_normed(layer.post_attention_layernorm, x), [gate, up])
    return x + products(GATE, [gated], [down])


def _heads(own: Any, x: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Heads (..., heads, D) of products (..., -) with their matrices: queries and keys, normed where the
    family does so, and what follows them.
    """
    heads = x.unflatten(-1, (-1, own.head_dim))
    if not hasattr(own, "q_norm"):
        return heads
    q, k, rest = heads.tensor_split([num_queries, num_queries + num_keys], dim=-2)
    return torch.cat([_norm(own.q_norm, q), _norm(own.k_norm, k), rest], dim=-2)


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return _Turned.apply(heads.flatten(-2), cosines, sines, heads.shape[-1]).view(heads.shape)


class _Turned(torch.autograd.Function):
    """Rotary positions: x (..., heads * D) times cosines, plus its heads with their halves swapped times
    sines, (..., heads * D).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.width = width
        return (x * cosines).addcmul_(_swapped(x, width), sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cosines, sines = ctx.saved_tensors
        return (grad * cosines).addcmul_(_swapped(grad, ctx.width), sines, value=-1), None, None, None


def _swapped(x: Tensor, width: int) -> Tensor:
    halves = x.view(*x.shape[:-1], -1, 2, width // 2)
    return torch.cat([halves[..., 1:, :], halves[..., :1, :]], dim=-2).view(x.shape)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (..., heads, D) turned by cosines and sines (..., D), each of two equal halves."""
    half, sines = x.shape[-1] // 2, sines[..., : x.shape[-1] // 2].unsqueeze(-2)
    found = x * cosines.unsqueeze(-2)
    found[..., :half].addcmul_(x[..., half:], sines, value=-1)
    found[..., half:].addcmul_(x[..., :half], sines)
    return found


def _normed(norm: Any, x: Tensor) -> tuple[RmsNorm, list[Tensor]]:
    return RmsNorm(norm.variance_epsilon), [x, norm.weight]


def steps(model: Any, prepare: Prepare) -> list[tuple[Any, Callable[..., Tensor]]] | None:
    """Each layer with a forward that does what transformers' does where gradients are not asked for, with a
    cache and any mask; matrices that share an input are prepared as one. None as in `hidden_states`.
    """
    layers = _layers(model, sys.maxsize)
    if layers is None or any(part.a is not None for parts in layers for part in parts):
        return None
    if any("forward" in vars(layer) for layer in model.layers):
        return None
    kind = type_of_products(model.embed_tokens.weight)
    return [
        (layer, functools.partial(_step, layer=layer, products=_prepared(parts, prepare), kind=kind))
        for layer, parts in zip(model.layers, layers, strict=True)
    ]


def _prepared(parts: Sequence[Parts], prepare: Prepare) -> list[Callable[[Tensor], Tensor]]:
    """The products with query, key and value; output; gate and up; down."""
    found = []
    for some in (parts[:3], parts[3:4], parts[4:6], parts[6:]):
        biases = [w.new_zeros(len(w)) if bias is None else bias for w, bias, *_ in some]
        bias = torch.cat(biases) if any(part.bias is not None for part in some) else None
        found.append(prepare(joined([part.weight for part in some]), bias))
    return found


def _step(  # noqa: PLR0913 (transformers' signature of a layer)
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    *,
    layer: Any,
    products: Sequence[Callable[[Tensor], Tensor]],
    kind: torch.dtype,
    **more: Any,
) -> Tensor:
    """The hidden states (B, L, H) after a layer, in the number type `kind`."""
    assert position_embeddings is not None
    own, x, (first, output, gate_up, down) = layer.self_attn, hidden_states.to(kind), products
    num_keys = own.config.num_key_value_heads
    heads = first(_norm(layer.input_layernorm, x)).unflatten(-1, (-1, own.head_dim))
    q_and_k, v = heads[..., :-num_keys, :], heads[..., -num_keys:, :]
    if hasattr(own, "q_norm"):
        q, k = q_and_k[..., :-num_keys, :], q_and_k[..., -num_keys:, :]
        q_and_k = torch.cat([_norm(own.q_norm, q), _norm(own.k_norm, k)], dim=-2)
    q_and_k = _rotated(q_and_k, *(each.to(kind) for each in position_embeddings))
    q, k, v = (each.transpose(1, 2) for each in (q_and_k[..., :-num_keys, :], q_and_k[..., -num_keys:, :], v))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, own.layer_idx)
    attend = AttentionInterface()[own.config._attn_implementation]
    found, _ = attend(own, q, k, v, attention_mask, dropout=0.0, scaling=own.scaling)
    x = x + output(found.flatten(-2))
    return x + down(GATE.forward(gate_up(_norm(layer.post_attention_layernorm, x))))


def _norm(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


def join_weights(model: Any) -> None:
    """Lay the matrices of one input below one another in memory, so that their products are one."""
    for parts in _layers(model, 0) or []:
        for some in (parts[:3], parts[4:6]):
            join([part.weight for part in some])


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
    if hasattr(weight, "ds_id"):  # DeepSpeed gathers weights where a module's own forward is called
        return None
    found: list[list[Parts]] = []
    for layer in model.layers:
        parts = [
            part for part in map(parts_of, _matrices(layer)) if part and part.weight.dtype == weight.dtype
        ]
        if len(parts) < NUM_MATRICES:
            return None
        found.append(parts)
    return found


def _matrices(layer: Any) -> Iterator[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
