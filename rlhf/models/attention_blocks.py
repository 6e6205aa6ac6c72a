"""Attention's products, one block of queries after the other, and their gradients.

N rows times key heads, G query heads of a key head, Q queries, T keys, D head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Heads of less width than this make products of so few columns that their transposes are faster.
NARROW = 32

# Between these a query's sum of powers is exact: what was too small for float32 is below 1e-8 of it.
SOUND_SUMS = (1e-30, 1e30)

# Queries that are computed at a time where attention is causal: no product with keys that none of them sees.
BLOCK = 32
BLOCK_NARROW = 16

Block = tuple[int, int, Tensor]  # rows, how many keys they see, and what is added to their products


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Sequence[Block]
) -> tuple[Tensor, list[Tensor]]:
    """The attention (N, Q * G, D) of q to k and v (N, D, T), and each block's weights.

    Beside narrow products softmax takes long. Powers of two, without the largest taken out first, are faster
    and serve where all their sums are sound.
    """
    if q.shape[2] < NARROW and q.dtype == torch.float32:
        sums = list[Tensor]()
        shares = functools.partial(_powers, sums=sums)
        result, weights = _attend_by(shares, q, k, v, scale / math.log(2), blocks)
        least, most = torch.aminmax(torch.cat(sums, dim=1))
        if float(least) > SOUND_SUMS[0] and float(most) < SOUND_SUMS[1]:
            return result, weights
        del result, weights
    return _attend_by(functools.partial(torch.softmax, dim=-1), q, k, v, scale, blocks)


def _powers(products: Tensor, sums: list[Tensor]) -> Tensor:
    """Powers of two as shares of their sum, which is added to `sums`; in the memory of the products."""
    powers = products.exp2_()
    sums.append(powers.sum(-1, keepdim=True))
    return powers.mul_(sums[-1].reciprocal())


def _attend_by(  # noqa: PLR0913 (the tensors of the equation)
    shares: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Sequence[Block]
) -> tuple[Tensor, list[Tensor]]:
    results, weights = list[Tensor](), list[Tensor]()
    for (_, keys, added), own_q in zip(blocks, _split(q, blocks), strict=True):
        weights.append(shares(torch.baddbmm(added, own_q, k.narrow(-1, 0, keys), alpha=scale)))
        results.append(_product(weights[-1], v.narrow(-1, 0, keys)))
    return torch.cat(results, dim=1), weights


def attend_back(  # noqa: PLR0913 (the tensors of the equation)
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    blocks: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q (N, Q * G, D), k and v (N, D, T), these in float32 at least; those of q and k are
    still to be scaled. The last block sees all keys.
    """
    of_q, sums = list[Tensor](), list[Tensor]()  # of k and v
    exact = torch.promote_types(q.dtype, torch.float32)
    parts = zip(blocks, _split(q, blocks), _split(grad, blocks), weights, strict=True)
    for (_, keys), own_q, own, weight in reversed(list(parts)):
        products = torch.bmm(own, v.narrow(-1, 0, keys))
        torch._softmax_backward_data(products, weight, -1, weight.dtype, grad_input=products)
        of_q.append(_product(products, k.narrow(-1, 0, keys)))
        of_k, of_v = torch.bmm(own_q.mT, products), torch.bmm(own.mT, weight)
        if sums:
            sums[0].narrow(-1, 0, keys).add_(of_k)
            sums[1].narrow(-1, 0, keys).add_(of_v)
        else:
            sums = [of_k.to(exact), of_v.to(exact)]
    return torch.cat(of_q[::-1], dim=1), sums[0], sums[1]


def _split(x: Tensor, blocks: Sequence[Any]) -> tuple[Tensor, ...]:
    """The rows (N, rows, D) of each block."""
    return x.split_with_sizes([block[0] for block in blocks], dim=1)


def causal_blocks(queries: int, keys: int, group: int, like: Tensor) -> list[Block]:
    """Blocks of q (N, Q * G, D)."""
    size = BLOCK if like.shape[2] >= NARROW else BLOCK_NARROW
    stops = [min(start + size, queries) for start in range(0, queries, size)]
    blocks = []
    for start, stop in zip([0, *stops], stops, strict=False):
        seen = keys - queries + stop
        added = _future(stop - start, seen, group, like.dtype, like.device)
        blocks.append(((stop - start) * group, seen, added))
    return blocks


@functools.lru_cache(maxsize=256)
def _future(queries: int, keys: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to a block's products (queries * group, T): minus infinity where the key is ahead."""
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    return torch.zeros_like(ahead, dtype=dtype).masked_fill_(ahead, -torch.inf).repeat_interleave(group, 0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, M, T) times b (N, D, T) transposed."""
    if b.shape[1] >= NARROW:
        return torch.bmm(a, b.mT)
    return torch.bmm(b, a.mT).mT
