"""Penalties on what was said before, and truncations of the distribution that the next token is drawn from.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.decoding import Decoding


def check_finite(logits: Tensor) -> None:
    """Raise ValueError unless every row (B, V) has a likeliest token."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise ValueError(
            "the model's logits are not finite: its weights have blown up, or engine.dtype is too coarse for "
            "them; go on from an earlier checkpoint with a lower learning_rate"
        )


def penalised(logits: Tensor, seen: Sequence[list[int]], decoding: Decoding) -> Tensor:
    """Logits (B, V) with both penalties; `seen`: the tokens of each row that they know of."""
    if decoding.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, decoding.repetition_penalty)
    if decoding.no_repeat_ngram_size:
        logits = forbid_repeated_ngrams(logits, seen, decoding.no_repeat_ngram_size)
    return logits


def penalise_repetition(logits: Tensor, seen: Sequence[list[int]], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (B, V) of tokens seen before by `penalty`.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1
    """
    known = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in enumerate(seen):
        known[row, tokens] = True
    return torch.where(known, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid_repeated_ngrams(logits: Tensor, seen: Sequence[list[int]], size: int) -> Tensor:
    """Logits (B, V) with minus infinity for every token that would end an n-gram of `size`
    tokens seen before.

    Paulus et al. 2017, https://arxiv.org/abs/1705.04304, section 2.5
    """
    banned = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in enumerate(seen):
        last = tokens[len(tokens) - size + 1 :]
        starts = range(len(tokens) - size + 1)
        banned[row, [tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == last]] = True
    return logits.masked_fill(banned & ~banned.all(-1, keepdim=True), -torch.inf)


def truncated(logits: Tensor, decoding: Decoding) -> Tensor:
    """Logits (B, V) with minus infinity for all but, in this order, the `top_k` likeliest tokens, the nucleus
    of mass `top_p`, those at least `min_p` times as likely as the likeliest, the typical ones of mass
    `typical_p`.

    Holtzman et al. 2020, https://arxiv.org/abs/1904.09751; Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082; Meister et al. 2023, https://arxiv.org/abs/2202.00666.
    """
    if decoding.top_k:
        floor = logits.topk(min(decoding.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if decoding.top_p < 1:
        logits = _of_mass(logits, -logits, decoding.top_p)
    if decoding.min_p > 0:
        probabilities = logits.softmax(-1)
        least = decoding.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    if decoding.typical_p < 1:
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
        logits = _of_mass(logits, (-logprobs - entropy).abs(), decoding.typical_p)
    return logits


def _of_mass(logits: Tensor, surprise: Tensor, mass: float) -> Tensor:
    """Logits (B, V) of the tokens of least `surprise` that have `mass` together, minus infinity elsewhere."""
    order = surprise.argsort(dim=-1, stable=True)
    probabilities = logits.softmax(-1).gather(-1, order)
    outside = probabilities.cumsum(-1) - probabilities >= mass
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
