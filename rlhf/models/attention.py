"""Attention by plain matrix products: on a processor the fast kernel for short rows, both directions.

Torch's fused kernel pays a long time for its backward pass and for one query against a cache. Letters: B
rows, H heads, K key heads (each serves G = H / K query heads), Q queries, T keys, D head width, N = B * K.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf_plain"

# With more keys than this the squares of plain attention cost more than the fused kernel.
MAX_KEYS = 512

# Heads of less width than this make products of so few columns that their transposes are faster.
NARROW = 32

# Queries that are computed at a time where attention is causal: no product with keys that none of them sees.
BLOCK = 32
BLOCK_NARROW = 16


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
    with torch.autocast(kind, enabled=False):
        if attention_mask is None and queries > 1:
            result = _Causal.apply(grouped, key, value, scale, group)
        else:
            mask = _additive(attention_mask, grouped, (rows, key_heads, group, queries, keys))
            products = torch.baddbmm(mask, grouped, key.mT, alpha=scale)
            result = torch.bmm(products.softmax(-1), value)
    result = result.view(rows, key_heads, queries, group, width).transpose(1, 2)
    return result.reshape(rows, queries, heads, width), None


class _Causal(torch.autograd.Function):
    """Causal attention of q (N, Q * G, D) to k, v (N, T, D): the last query sees all keys, the one before all
    but the last, and so on.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (the tensors of the equation)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: int
    ) -> Tensor:
        size = BLOCK if q.shape[2] >= NARROW else BLOCK_NARROW
        blocks = _blocks(q.shape[1] // group, k.shape[1], group, size)
        result, weights = torch.empty_like(q), []
        for rows, keys in blocks:
            mask = _future((rows.stop - rows.start) // group, keys, group, q.dtype, q.device)
            seen = torch.baddbmm(mask.expand(len(q), -1, -1), q[:, rows], k[:, :keys].mT, alpha=scale)
            weights.append(seen.softmax(-1))
            result[:, rows] = _product(weights[-1], v[:, :keys])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.blocks = scale, blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        exact = torch.promote_types(q.dtype, torch.float32)
        sums: list[Tensor] = []  # of k and v
        for (rows, keys), weight in reversed(list(zip(ctx.blocks, weights, strict=True))):
            grad_weight = torch.bmm(grad[:, rows], v[:, :keys].mT)
            grad_products = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_q[:, rows] = _product(grad_products, k[:, :keys])
            parts = [torch.bmm(q[:, rows].mT, grad_products), torch.bmm(grad[:, rows].mT, weight)]
            for total, part in zip(sums, parts, strict=False):
                total[..., :keys] += part
            sums = sums or [part.to(exact) for part in parts]  # the last block comes first, and sees all keys
        grad_k, grad_v = (total.mT for total in (sums[0].mul_(ctx.scale), sums[1]))
        return grad_q.mul_(ctx.scale), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _blocks(queries: int, keys: int, group: int, size: int) -> list[tuple[slice, int]]:
    """Rows of each block of `size` queries, and the number of keys that its last query sees."""
    stops = [min(start + size, queries) for start in range(0, queries, size)]
    starts = [0, *stops]
    return [
        (slice(start * group, stop * group), keys - queries + stop)
        for start, stop in zip(starts, stops, strict=False)
    ]


@functools.lru_cache(maxsize=256)
def _future(queries: int, keys: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to a block's products (queries * group, T): minus infinity where the key is ahead."""
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    return torch.zeros_like(ahead, dtype=dtype).masked_fill_(ahead, -torch.inf).repeat_interleave(group, 0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, M, T) b (N, T, D)."""
    if b.shape[-1] >= NARROW:
        return torch.bmm(a, b)
    return torch.bmm(b.mT.contiguous(), a.mT).mT


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
