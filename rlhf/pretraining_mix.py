"""Texts whose loss is mixed into that of PPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.batches import Rollout, join, left_pad
from rlhf.schemas import Demonstration
from rlhf.text import TextCodec
from rlhf.training_state import permutation


class PretrainingMix:
    """Texts whose loss is mixed in (PTX). Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 2."""

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        codec: TextCodec,
        device: torch.device,
        *,
        max_response_tokens: int,
    ) -> None:
        pairs = [
            (codec.encode_prompt(each.prompt), codec.encode_response(each.response))
            for each in demonstrations
        ]
        fitting = [pair for pair in pairs if len(pair[1]) <= max_response_tokens]
        if not fitting:
            raise ValueError(
                f"ptx_coef: all {len(pairs)} responses of data.demonstrations.train are longer than "
                f"data.max_response_tokens={max_response_tokens}: raise it, or set ptx_coef=0"
            )
        if len(fitting) < len(pairs):
            print(
                f"ptx: {len(pairs) - len(fitting)} of {len(pairs)} texts left out, their responses are "
                f"longer than data.max_response_tokens={max_response_tokens}"
            )
        self.prompts, self.responses = zip(*fitting, strict=True)
        self.pad_token_id, self.device = codec.pad_token_id, device

    def batch(self, size: int, *seed: int) -> Rollout:
        """`size` texts, chosen by the seeds alone."""
        order = permutation(len(self.prompts), *seed).tolist()
        chosen = [order[i % len(order)] for i in range(size)]
        prompts = left_pad([self.prompts[i] for i in chosen], self.pad_token_id, self.device)
        return join(prompts, [self.responses[i] for i in chosen], self.pad_token_id)
