"""MIXER: responses that begin with gold tokens, ever fewer of them, and go on with the policy's own.

The gold ones are learned by cross-entropy, the own ones by REINFORCE. Ranzato et al. 2016,
https://arxiv.org/abs/1511.06732. B episodes, R response positions, T the most tokens of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.batches import Rollout, join, left_pad
from rlhf.decoding import Decoding
from rlhf.records import PromptRecord
from rlhf.reference_scorers import check_references
from rlhf.sampling.policy import Policy


def num_sampled(update: int, *, updates: int, delta: int, max_tokens: int) -> int:
    """How many tokens at the end of a reference are the policy's own in an update, counted from 1.

    They grow by `delta` at a time, or by several where `updates` are few, to all `max_tokens` in the last of
    `updates`, and stay all after it.
    """
    levels = -(-max_tokens // delta)
    return delta * min(levels, -(-update * levels // updates))


class Mixer:
    """The gold beginnings of responses, from the prompts' references, and the samples that go on."""

    def __init__(self, settings: Any, records: Sequence[PromptRecord]) -> None:
        check_references("mixer.updates", records)
        self.settings = settings

    def respond(
        self, policy: Policy, records: Sequence[PromptRecord], decoding: Decoding, *, update: int, seed: int
    ) -> tuple[Rollout, Tensor]:
        """A rollout whose responses begin with gold tokens, and which tokens (B, R) these are."""
        codec, longest = policy.codec, decoding.max_new_tokens
        own = num_sampled(
            update, updates=self.settings.updates, delta=self.settings.delta, max_tokens=longest
        )
        references = [codec.encode_response(record.reference or "")[:longest] for record in records]
        gold = [tokens[: max(0, len(tokens) - own)] for tokens in references]
        prompts = [codec.encode_prompt(record.prompt) for record in records]
        sampled = policy.go_on(
            [prompt + given for prompt, given in zip(prompts, gold, strict=True)],
            replace(decoding, max_new_tokens=longest - min(map(len, gold))),
            seed=seed,
        )
        responses = [(given + rest)[:longest] for given, rest in zip(gold, sampled.responses(), strict=True)]
        rollout = join(
            left_pad(prompts, codec.pad_token_id, sampled.tokens.device), responses, codec.pad_token_id
        )
        lengths = torch.tensor([len(given) for given in gold], device=rollout.tokens.device)
        places = torch.arange(rollout.response_mask.shape[1], device=lengths.device)
        return rollout, places < lengths.unsqueeze(1)
