"""Scheduled sampling: responses are learned after a mixture of gold tokens and the model's own.

Bengio et al. 2015, https://arxiv.org/abs/1506.03099; in two passes for Transformers, Mihaylova and Martins
2019, https://arxiv.org/abs/1906.07651; in more, Duckworth et al. 2019, https://arxiv.org/abs/1906.04331.
B rows, L tokens, N response tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.decoding import Decoding
from rlhf.sampling.sampler import choose_tokens

BISECTIONS = 100


def gold_share(schedule: str, step: float, *, k: float) -> float:
    """The probability eps that a token of the input stays gold after `step` optimizer steps.

    linear: max(0, 1 - k step); exponential: k^step; inverse_sigmoid: k / (k + exp(step / k)).
    """
    if schedule == "linear":
        return max(0.0, 1.0 - k * step)
    if schedule == "exponential":
        return k**step
    odds = math.log(k) - step / k  # of gold, as a logarithm: exp(step / k) may be too large a number
    return 1.0 / (1.0 + math.exp(-odds)) if odds > 0 else math.exp(odds) / (1.0 + math.exp(odds))


def slope(schedule: str, *, end: float, steps: int) -> float:
    """The k with which a schedule comes down to `end` after `steps` steps: 0 < end < 1, or linear."""
    if schedule == "linear":
        return (1.0 - end) / steps
    if schedule == "exponential":
        return end ** (1.0 / steps)
    low, high = -50.0, 50.0  # of log k, in which the share grows
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = middle - steps * math.exp(-middle) < math.log(end / (1.0 - end))
        low, high = (middle, high) if below else (low, middle)
    return math.exp(high)


class ScheduledSampling:
    """What the `exposure` group says, and the random numbers of a step.

    A row's numbers follow from seed, step and its place among the step's rows: no padding, micro-batch or
    process changes them, and a resumed run draws them again.
    """

    def __init__(self, settings: Any, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.step, self.num_rows = -1, 0

    def gold_share(self, step: int, steps: int) -> float:
        """The share of gold tokens in a run's step 0, ..., steps - 1: 1 in the first one, or near it, never
        below `end`, and without a `k` just that in the last one.
        """
        settings = self.settings
        if settings.end == 1:  # plain
            return 1.0
        k = settings.k or slope(settings.schedule, end=settings.end, steps=max(1, steps - 1))
        return max(gold_share(settings.schedule, step, k=k), settings.end)

    def draws(self, step: int, num_rows: int, length: int) -> Tensor:
        """Uniform numbers (B, L, 2) in float64 for the step's next B rows: whether a token stays, which takes
        its place.
        """
        if step != self.step:
            self.step, self.num_rows = step, 0
        rows = range(self.num_rows, self.num_rows + num_rows)
        self.num_rows = rows.stop
        drawn = [np.random.default_rng((self.seed, step, row)).random((length, 2)) for row in rows]
        return torch.from_numpy(np.stack(drawn))

    def mixed(
        self,
        predict: Callable[[Tensor], Tensor],
        tokens: Tensor,
        places: tuple[Tensor, Tensor],
        draws: Tensor,
        gold_share: float,
    ) -> Tensor:
        """Inputs (B, L) of which response tokens are gold with probability `gold_share` and else predictions.

        `predict` gives logits (N, V) of the tokens at `places` (rows (N,), columns (N,)) from inputs (B, L).
        Each pass predicts after the inputs of the one before, the first after gold: with as many as a
        response has tokens, every prediction follows the very inputs that stand before it.
        """
        uniforms = draws[places[0].cpu(), places[1].cpu()].to(tokens.device)
        gold, inputs = tokens[places], tokens
        decoding = Decoding(1, greedy=self.settings.replacement == "argmax")
        with torch.no_grad():
            for _ in range(self.settings.passes):
                chosen, _ = choose_tokens(predict(inputs), uniforms[:, 1], decoding, [[]] * len(gold))
                inputs = tokens.index_put(places, torch.where(uniforms[:, 0] < gold_share, gold, chosen))
        return inputs
