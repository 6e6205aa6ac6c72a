"""Attention by plain matrix products: on a processor the fast kernel for short rows, both directions.

Torch's fused kernel pays a long time for its backward pass and for one query against a cache. Letters: B
rows, H heads, K key heads (each serves G = H / K query heads), Q queries, T keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    products = torch.baddbmm(
        _additive(attention_mask, query, keys, group),
        query.reshape(rows * key_heads, group * queries, width),
        key.reshape(rows * key_heads, keys, width).transpose(1, 2),
        alpha=width**-0.5 if scaling is None else scaling,
    )
    result = torch.bmm(products.softmax(-1).to(value.dtype), value.reshape(rows * key_heads, keys, width))
    return result.view(rows, heads, queries, width).transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None, query: Tensor, keys: int, group: int) -> Tensor:
    """What is added to the products, broadcastable to (B * K, G * Q, T): 0, or the lowest number where no key
    may be seen.

    Not minus infinity: a row of padding sees no key at all, and its result must stay finite.
    """
    rows, heads, queries, _ = query.shape
    if mask is None and queries == 1:
        return query.new_zeros(())
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
        return query.new_zeros(queries, keys).masked_fill_(hidden, lowest).repeat(group, 1)
    if mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill_(~mask, lowest)
    key_heads = heads // group
    wide = mask.expand(rows, -1, -1, -1).unsqueeze(2).expand(-1, key_heads, group, queries, keys)
    return wide.reshape(rows * key_heads, group * queries, keys)


AttentionInterface.register(NAME, plain_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
