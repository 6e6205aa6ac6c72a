"""The layers of Llama and its like, computed by fewer and larger steps.

transformers' layers hold every step's result for the backward pass, about twice as much as it needs, and take
ten passes over memory for a norm. The sums are the same. B sequences, L tokens, H width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaModel, MistralModel, Qwen2Model, Qwen3Model

from rlhf.derived import derived
from rlhf.models import attention
from rlhf.models.attention import Heads, Tables, Wanted, split_values, turn, turned_attention
from rlhf.models.lora import parts_of, type_of_products
from rlhf.models.products import (
    GATE,
    NARROW,
    Others,
    Parts,
    RmsNorm,
    Whole,
    begin,
    join,
    layers_of,
    products,
    tensors_of,
)

MODELS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
NUM_MATRICES = 7  # of a layer
MASKED = ("sdpa", attention.NAME)  # the kernels that take any mask


def hidden_states(model: Any, tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
    """Last hidden states (N, H) at N positions, row after row, of tokens (B, L) with no padding before
    others; None where the model asks for anything that is not computed here.

    All are in the number type of products; weights of another are rounded to it.
    """
    length, pairs = tokens.shape[1], pairs_of(model)
    layers = _layers_now(model, length, pairs)
    if layers is None:
        return None
    x = model.embed_tokens(tokens).to(type_of_products(model.embed_tokens.weight))
    positions = torch.arange(length, device=x.device).unsqueeze(0)
    rotations = derived(
        lambda: rotations_of(model, x, positions, pairs),
        [model.rotary_emb.inv_freq],
        *(length, x.dtype, pairs),
    )
    wanted = Wanted(rows, columns, tokens.shape) if model.config._attn_implementation in MASKED else None
    for index, (layer, parts) in enumerate(zip(model.layers, layers, strict=True)):
        step = functools.partial(_next, layer=layer, parts=parts, rotations=rotations)
        if index == len(layers) - 1 and wanted is not None:
            step = functools.partial(step, wanted=wanted)
        if layer.training and layer.gradient_checkpointing:
            x = checkpoint(step, x, use_reentrant=False)
        else:
            x = step(x)
    return norm_of(model.norm, x[rows, columns] if wanted is None else x)


class Rotations(NamedTuple):
    """What positions multiply queries and keys with, beside one another, to turn them: the tables of `turn`.
    Su et al. 2021, https://arxiv.org/abs/2104.09864
    """

    first: Tensor  # (B, L, heads * D), or heads * D / 2 of complex numbers
    second: Tensor
    num_queries: int
    num_keys: int

    def part(self, start: int, stop: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tables of some heads, at all positions or at N columns."""
        width = self.first.shape[-1] // (self.num_queries + self.num_keys)
        tables = [each[..., start * width : stop * width] for each in self[:2]]
        tables = tables if columns is None else [each[0, columns] for each in tables]
        return tables[0], tables[1]


def rotations_of(model: Any, x: Tensor, positions: Tensor, pairs: int) -> Rotations:
    """Tables for x (B, L, H), in its number type, at positions (B, L), and for heads of `pairs_of`."""
    (cosines, sines), config = model.rotary_emb(x, positions), model.config
    half, counts = cosines.shape[-1] // 2, (config.num_attention_heads, config.num_key_value_heads)
    if pairs:
        turns = torch.complex(cosines[..., :half], sines[..., :half])
        tables = [turns, turns.conj()]
    else:
        tables = [cosines, torch.cat([-sines[..., :half], sines[..., half:]], dim=-1)]
    wide = [each.repeat(1, 1, sum(counts)) for each in tables]
    return Rotations(wide[0], wide[1], *counts)


def _next(
    x: Tensor, layer: Any, parts: list[Parts], rotations: Rotations, wanted: Wanted | None = None
) -> Tensor:
    """The hidden states (B, L, H) after a layer, from those before it; (N, H) where some alone are wanted."""
    own, (query, key, value), norm = layer.self_attn, parts[:3], layer.input_layernorm
    num_queries, num_keys = rotations.num_queries, rotations.num_keys
    first, start = ([query, key, value], 0) if wanted is None else ([key, value], num_queries)
    heads = heads_of(own, products(*_normed(norm, x), first), num_queries - start, num_keys)
    sizes = Heads(num_queries, num_keys, own.head_dim, own.scaling)
    tables = rotations.part(start, num_queries + num_keys)
    states, queries = x, None
    if wanted is not None:
        states = x[wanted.index]
        its_tables = rotations.part(0, num_queries, wanted.index[1])
        queries = heads_of(own, products(*_normed(norm, states), [query]), num_queries, 0), its_tables, wanted
    if own.config._attn_implementation == attention.NAME and x.shape[1] <= attention.MAX_KEYS:
        found = turned_attention(heads, tables, sizes, queries)
    else:
        found = _attention(own, heads, tables, sizes, queries)
    return _after(layer, parts, states, found)


def _attention(
    own: Any, x: Tensor, tables: Tables, heads: Heads, queries: tuple[Tensor, Tables, Wanted] | None
) -> Tensor:
    """What `turned_attention` computes, by the kernel that the settings name."""
    turning, v = split_values(x, heads)
    q, k = split_values(_Turned.apply(turning, *tables, heads.width), heads)
    mask = None
    if queries is not None:
        some, its_tables, wanted = queries
        q, mask = wanted.spread(_Turned.apply(some, *its_tables, heads.width)), wanted.mask
    attend = AttentionInterface()[own.config._attn_implementation]
    parts = (each.unflatten(-1, (-1, heads.width)).transpose(1, 2) for each in (q, k, v))
    found, _ = attend(own, *parts, mask, dropout=0.0, scaling=heads.scale)
    return (found if queries is None else found[queries[2].slots]).flatten(-2)


def _after(layer: Any, parts: list[Parts], states: Tensor, found: Tensor) -> Tensor:
    weights, others = tensors_of(parts[3:])
    normed, [weight] = _normed(layer.post_attention_layernorm)
    width = states.shape[-1]
    rest = _AfterAttention.apply(
        normed, others, states.reshape(-1, width), found.reshape(-1, found.shape[-1]), weight, *weights
    )
    return rest.view(states.shape)


class _AfterAttention(torch.autograd.Function):
    """x (N, H) + output(found), and what a layer's second half adds to that."""

    @staticmethod
    def forward(  # noqa: PLR0913 (the tensors of the equation)
        ctx: Any,
        norm: RmsNorm,
        others: Others,
        x: Tensor,
        found: Tensor,
        weight: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        wholes = [Whole.of(layers, found.dtype) for layers in _after_attention(tensors, others)]
        output, *gates, down = wholes
        with torch.autocast(found.device.type, enabled=False):
            y, low_found = output.outputs(found)
            normed, norm_steps = begin(norm, [y.add_(x), weight], x.shape[1])
            gated, lows = zip(*(each.outputs(normed) for each in gates), strict=True)
            opened, gate_steps = begin(GATE, _gate_and_up(gated), x.shape[1])
            result, low_opened = down.outputs(opened)
        saved = [found, low_found, y, weight, low_opened, *gated, *lows, *tensors]
        ctx.save_for_backward(*saved, *norm_steps, *gate_steps)
        ctx.norm, ctx.others, ctx.wholes = norm, others, wholes
        ctx.ends = (len(saved), len(saved) + len(norm_steps))
        return result.add_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        everything, (end, next_end) = list(ctx.saved_tensors), ctx.ends
        norm_steps, gate_steps = everything[end:next_end], everything[next_end:]
        output, *gates, down = ctx.wholes
        found, low_found, y, weight, low_opened, *rest = everything[:end]
        count = len(gates)
        gated, lows, tensors = rest[:count], rest[count : 2 * count], rest[2 * count :]
        first, *middle, last = _after_attention(tensors, ctx.others)
        steps = gate_steps or GATE.again(*_gate_and_up(gated))
        of_opened, of_down = down.gradients(last, grad, steps[0], low_opened)
        of_gated = [torch.empty_like(each) for each in gated]
        GATE.backward(of_opened, steps, *_gate_and_up(gated), out=_gate_and_up(of_gated))
        steps = norm_steps or ctx.norm.again(y, weight)
        of_normed, of_gates = zip(
            *(
                whole.gradients(layers, own, steps[0], low)
                for whole, layers, own, low in zip(gates, middle, of_gated, lows, strict=True)
            ),
            strict=True,
        )
        of_y, of_weight = ctx.norm.backward(functools.reduce(Tensor.add_, of_normed), steps, y, weight)
        of_y.add_(grad)
        of_found, of_output = output.gradients(first, of_y, found, low_found)
        return None, None, of_y, of_found, of_weight, *of_output, *itertools.chain(*of_gates), *of_down


def _after_attention(tensors: Sequence[Tensor], others: Others) -> tuple[list[Parts], ...]:
    """Output; gate and up, which share an input; down. Those two are one product, but apart in a narrow
    layer: whole blocks of memory are faster to open the gate with.
    """
    layers = layers_of(tensors, others)
    gates = [layers[1:2], layers[2:3]] if len(layers[0].weight) < NARROW else [layers[1:3]]
    return layers[:1], *gates, layers[3:]


def _gate_and_up(gated: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each (N, I), from one product or two."""
    return gated if len(gated) > 1 else gated[0].chunk(2, dim=-1)


def heads_of(own: Any, x: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Products (..., heads * D) with the matrices of heads: queries and keys, normed where the family does
    so, and what follows them.
    """
    if not hasattr(own, "q_norm"):
        return x
    heads = x.unflatten(-1, (-1, own.head_dim))
    q, k, rest = heads.tensor_split([num_queries, num_queries + num_keys], dim=-2)
    return torch.cat([norm_of(own.q_norm, q), norm_of(own.k_norm, k), rest], dim=-2).flatten(-2)


class _Turned(torch.autograd.Function):
    """`turn`: x (..., heads * D) -> (..., heads * D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.width = width
        return turn(x, first, second, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        first, second = ctx.saved_tensors
        return turn(grad, first, second, ctx.width, back=True), None, None, None


def _normed(norm: Any, *x: Tensor) -> tuple[RmsNorm, list[Tensor]]:
    return RmsNorm(norm.variance_epsilon), [*x, norm.weight]


def norm_of(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


def join_weights(model: Any) -> None:
    """Lay the matrices of one input below one another in memory, so that their products are one."""
    for parts in matrices_of(model, 0) or []:
        for some in (parts[:3], parts[4:6]):
            join([part.weight for part in some])


def pairs_of(model: Any) -> int:
    """The width of heads whose halves are best computed in pairs, one multiplication of complex numbers each:
    of narrow models, where weights are cheap to move; else 0.
    """
    if type(model) not in MODELS or hasattr(model.layers[0].self_attn, "q_norm"):
        return 0
    weight: Tensor = model.embed_tokens.weight
    exact = weight.dtype == type_of_products(weight) == torch.float32
    narrow = exact and weight.device.type == "cpu" and weight.shape[-1] < NARROW
    return int(model.layers[0].self_attn.head_dim) if narrow else 0


def _layers_now(model: Any, length: int, pairs: int) -> list[list[Parts]] | None:
    """`matrices_of`, found once for all passes of unchanged weights with the same adapter."""
    if type(model) not in MODELS:
        return None
    first: Any = model.layers[0].self_attn.q_proj
    acting = [getattr(first, name, None) for name in ("active_adapters", "disable_adapters")]
    key = ("layers", id(model), length, model.training, str(acting), pairs)
    return derived(lambda: matrices_of(model, length, pairs), [model.embed_tokens.weight], *key)


def matrices_of(model: Any, length: int, pairs: int = 0) -> list[list[Parts]] | None:
    """What each layer's seven matrices compute with: query, key, value, output, gate, up, down; queries and
    keys with `pairs`.
    """
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
        found.append([part._replace(pairs=pairs) for part in parts[:2]] + parts[2:])
    return found


def _matrices(layer: Any) -> Iterator[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
