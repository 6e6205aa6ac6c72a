"""Attention by plain matrix products: on a processor the fast kernel for short rows, both directions.

Torch's fused kernel pays a long time for its backward pass and for one query against a cache. Letters: B
rows, H heads, K key heads (each serves G = H / K query heads), Q queries, T keys, D head width, N = B * K.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.attention_blocks import attend, attend_back, causal_blocks

NAME = "rlhf_plain"

# With more keys than this the squares of plain attention cost more than the fused kernel.
MAX_KEYS = 512


def plain_attention(  # noqa: PLR0913 (transformers' signature of an attention function)
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Softmax(query key^T * scaling + mask) value: (B, H, Q, D), (B, K, T, D), (B, K, T, D) -> (B, Q, H, D).

    The G query heads of a key head stand as rows of one product, so keys and values are not repeated. Without
    a mask several queries are causal and one sees all keys, as in transformers. Dropout and anything
    that transformers' own function knows besides go to that one, and so do more than MAX_KEYS keys.
    """
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    if dropout or keys > MAX_KEYS or more.get("position_bias") is not None or more.get("is_causal") is False:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    group = heads // key_heads
    scale = width**-0.5 if scaling is None else scaling
    # (N, Q * G, D): the queries of a block stand together
    grouped = query.view(rows, key_heads, group, queries, width).transpose(2, 3)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    grouped = grouped.reshape(rows * key_heads, queries * group, width).to(dtype)
    key = key.reshape(rows * key_heads, keys, width).to(dtype)
    value = value.reshape(rows * key_heads, keys, width).to(dtype)
    # not by autocast, which would round the mask's lowest number to minus infinity
    with _no_autocast(kind):
        if attention_mask is None and queries > 1:
            result = _Causal.apply(grouped, key, value, scale, group)
        else:
            mask = _additive(attention_mask, grouped, (rows, key_heads, group, queries, keys))
            products = torch.baddbmm(mask, grouped, key.mT, alpha=scale)
            result = torch.bmm(products.softmax(-1), value)
    result = result.view(rows, key_heads, queries, group, width).transpose(1, 2)
    return result.reshape(rows, queries, heads, width), None


def _no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


class _Causal(torch.autograd.Function):
    """Causal attention of q (N, Q * G, D) to k, v (N, T, D): the last query sees all keys, the one before all
    but the last, and so on.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (the tensors of the equation)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: int
    ) -> Tensor:
        blocks = causal_blocks(q.shape[1] // group, k.shape[1], group, q)
        k, v = (each.mT.contiguous() for each in (k, v))
        result, weights = attend(q, k, v, scale, blocks)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.blocks = scale, [block[:2] for block in blocks]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad_q, grad_k, grad_v = attend_back(grad, q, k, v, weights, ctx.blocks)
        grad_k = grad_k.mul_(ctx.scale).mT.to(grad_q.dtype)
        return grad_q.mul_(ctx.scale), grad_k, grad_v.mT.to(grad_q.dtype), None, None


def turn(  # noqa: PLR0913 (the tensors of the equation)
    x: Tensor,
    first: Tensor,
    second: Tensor,
    width: int,
    *,
    back: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotary positions: x (..., heads * D) times cosines, plus its heads with their halves swapped times
    sines, (..., heads * D); `back` the other way, as gradients go.

    Where the numbers of a head's halves stand in pairs the tables are complex: e^(i angle), and back.
    """
    if first.is_complex():
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = None if out is None else torch.view_as_complex(out.unflatten(-1, (-1, 2)))
        return torch.view_as_real(torch.mul(pairs, second if back else first, out=turned)).flatten(-2)
    halves = x.view(*x.shape[:-1], -1, 2, width // 2)
    swapped = torch.cat([halves[..., 1:, :], halves[..., :1, :]], dim=-2).view(x.shape)
    return torch.mul(x, first, out=out).addcmul_(swapped, second, value=-1 if back else 1)


class Wanted:
    """Positions of tokens (B, L) whose states alone are asked for, beside one another as queries (B, Q)."""

    def __init__(self, rows: Tensor, columns: Tensor, shape: torch.Size) -> None:
        self.index = (rows, columns)
        counts = torch.bincount(rows, minlength=shape[0])
        places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        self.slots = (rows, places)
        self.shape = (shape[0], int(counts.max()))
        last_keys = self.spread(columns)
        keys = torch.arange(shape[1], device=rows.device)
        self.mask = (keys <= last_keys.unsqueeze(-1)).unsqueeze(1)  # (B, 1, Q, L)

    def spread(self, x: Tensor) -> Tensor:
        """What stands at the positions (N, ...) as queries (B, Q, ...), zeros where a row has fewer."""
        return x.new_zeros(*self.shape, *x.shape[1:]).index_put(self.slots, x)


class Heads(NamedTuple):
    """Heads beside one another: H queries, K keys, K values, each of width D."""

    num_queries: int
    num_keys: int
    width: int
    scale: float


Tables = tuple[Tensor, Tensor]  # the two of `turn`


def turned_attention(
    x: Tensor, tables: Tables, heads: Heads, queries: tuple[Tensor, Tables, Wanted] | None = None
) -> Tensor:
    """Causal attention of x (B, L, (H + 2 K) D), queries, keys and values beside one another, of which the
    first two are turned first by their tables: (B, L, H D).

    `queries`: those (N, H D) of the wanted positions alone, with their tables; then x (B, L, 2 K D) has none,
    and the result is (N, H D).
    """
    of_wanted, its_tables, wanted = queries or (None, (), None)
    return _TurnedAttention.apply(x, of_wanted, [*tables, *its_tables], heads, wanted)


class _TurnedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (the tensors of the equation)
        ctx: Any,
        x: Tensor,
        of_wanted: Tensor | None,
        tables: list[Tensor],
        heads: Heads,
        wanted: Wanted | None,
    ) -> Tensor:
        rows, length, _ = x.shape
        turning, v = split_values(x, heads)
        q, k = split_values(turn(turning, tables[0], tables[1], heads.width), heads)
        if of_wanted is not None and wanted is not None:
            q = wanted.spread(turn(of_wanted, tables[2], tables[3], heads.width))
        count, group = q.shape[1], heads.num_queries // heads.num_keys
        q = _grouped(q, heads)
        k, v = (
            each.view(rows, length, -1, heads.width).permute(0, 2, 3, 1).reshape(-1, heads.width, length)
            for each in (k, v)
        )
        if wanted is None:
            blocks = causal_blocks(count, length, group, q)
        else:
            sizes = (rows, heads.num_keys, group, count, length)
            blocks = [(q.shape[1], length, _additive(wanted.mask, q, sizes))]
        result, weights = attend(q, k, v, heads.scale, blocks)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.tables, ctx.heads, ctx.wanted, ctx.blocks = tables, heads, wanted, [block[:2] for block in blocks]
        result = result.view(rows, heads.num_keys, count, -1).transpose(1, 2).reshape(rows, count, -1)
        return result if wanted is None else result[wanted.slots]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        heads, wanted, (q, k, v, *weights) = ctx.heads, ctx.wanted, ctx.saved_tensors
        tables = [table * heads.scale for table in ctx.tables]  # few numbers beside those of many rows
        rows, length, of_wanted = len(q) // heads.num_keys, k.shape[2], None
        grad = _grouped(grad if wanted is None else wanted.spread(grad), heads)
        of_q, *others = attend_back(grad, q, k, v, weights, ctx.blocks)
        of_q = of_q.view(rows, heads.num_keys, -1, heads.num_queries // heads.num_keys * heads.width)
        of_q = of_q.transpose(1, 2)  # (B, Q, K, G D)
        of_k, of_v = (
            each.view(rows, heads.num_keys, heads.width, length).permute(0, 3, 1, 2) for each in others
        )
        size = (0 if wanted else heads.num_queries) + heads.num_keys
        turned = q.new_empty(rows, length, size * heads.width)
        of_x = q.new_empty(rows, length, (size + heads.num_keys) * heads.width)
        (q_place, k_place), (turning, v_place) = split_values(turned, heads), split_values(of_x, heads)
        k_place.view(of_k.shape).copy_(of_k)
        v_place.view(of_v.shape).copy_(of_v)
        if wanted is None:
            q_place.view(of_q.shape).copy_(of_q)
        else:
            of_wanted = of_q[wanted.slots].flatten(1)
            of_wanted = turn(of_wanted, tables[2], tables[3], heads.width, back=True)
        turn(turned, tables[0], tables[1], heads.width, back=True, out=turning)
        return of_x, of_wanted, None, None, None


def split_values(x: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """What stands before the last K heads of x (..., heads * D), and these."""
    size = heads.num_keys * heads.width
    before, last = x.split_with_sizes([x.shape[-1] - size, size], dim=-1)
    return before, last


def _grouped(q: Tensor, heads: Heads) -> Tensor:
    """Queries (B, Q, H D) as (B K, Q G, D): those of one key head stand together."""
    q = q.view(*q.shape[:2], heads.num_keys, -1).transpose(1, 2)
    return q.reshape(len(q) * heads.num_keys, -1, heads.width)


def _additive(mask: Tensor | None, like: Tensor, sizes: tuple[int, int, int, int, int]) -> Tensor:
    """What is added to the products, broadcastable to (N, Q * G, T): 0, or the lowest number where no key
    may be seen. `sizes`: B, K, G, Q, T.

    Not minus infinity: a row of padding sees no key at all, and its result must stay finite.
    """
    if mask is None:
        return like.new_zeros(())
    if mask.dtype == torch.bool:
        mask = like.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(like.dtype).min)
    rows, key_heads, group, queries, keys = sizes
    wide = mask.expand(rows, -1, -1, -1).unsqueeze(2).expand(sizes).transpose(2, 3)
    return wide.reshape(rows * key_heads, queries * group, keys).to(like.dtype)


AttentionInterface.register(NAME, plain_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
