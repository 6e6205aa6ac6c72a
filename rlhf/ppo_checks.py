"""What a PPO run checks of itself, before its first weight changes and at its end."""

from __future__ import annotations

import torch

from rlhf.batches import Experience
from rlhf.checks import Check


def start_checks(experience: Experience, dtype: torch.dtype, eos_token_id: int) -> list[Check]:
    """Of the first experience: KL 0 to the reference, EOS where responses end, rewards that differ."""
    mask = experience.rollout.response_mask
    difference = float((experience.logprobs - experience.ref_logprobs)[mask].abs().max())
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    spread = float(experience.scores.std(correction=0))
    last = mask.sum(1, keepdim=True) - 1
    eos = (experience.rollout.response_tokens == eos_token_id) & mask
    ended = eos.sum(1)
    ends_at_eos = bool(((ended == 0) | ((ended == 1) & eos.gather(1, last)[:, 0])).all())
    return [
        Check(
            "policy equals reference at the start",
            difference <= tolerance,
            f"largest log-prob difference {difference:.1e}",
            "the KL penalty must start at 0: is policy the SFT model itself?",
        ),
        Check(
            "responses end at their first EOS",
            ends_at_eos,
            f"{float((ended == 1).float().mean()):.0%} ended",
            "tokens after EOS would be scored and learned",
        ),
        Check(
            "rewards differ",
            spread > 0,
            f"standard deviation {spread:.3f}",
            "one score for every response leaves nothing to learn",
        ),
    ]


def end_checks(first: dict[str, float], last: dict[str, float], dtype: torch.dtype) -> list[Check]:
    """Of the metrics of the first and the last update: ratio 1 on the first minibatch and, where the `first`
    is known, a score that rose.
    """
    ratio = abs(last["first_ratio"] - 1)
    found = [
        Check(
            "first minibatch has ratio 1",
            ratio < (1e-5 if dtype == torch.float32 else 0.02),
            f"off by {ratio:.1e}",
            "old log-probs must come from the weights that learn",
        )
    ]
    if first:
        rose = Check(
            "score rose",
            last["score"] > first["score"],
            f"{first['score']:.2f} to {last['score']:.2f} at KL {last['kl']:.2f}",
            "more updates, a higher learning_rate or a lower kl.coef",
        )
        found.append(rose)
    return found
