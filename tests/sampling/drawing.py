"""Prompts for the sampler's tests, and a call of it."""

from typing import Any

from rlhf.batches import Rollout
from rlhf.decoding import Decoding
from rlhf.sampling.sampler import draw_uniforms, sample
from tests.models.families import EOS, PAD

# Prompts of 1 to 7 tokens: every batch has padding on the left.
PROMPTS = [[1, 5, 9, 30, 12, 7, 40], [8], [1, 22, 6], [31, 11, 19, 4, 25], [9, 9], [1, 40, 13, 17]]
NEVER = 99  # a token id outside the vocabulary


def sampled(
    model: Any, prompts: list[list[int]], decoding: Decoding, *, seed: int = 0, **more: Any
) -> Rollout:
    uniforms = more.pop("uniforms", draw_uniforms(len(prompts), decoding.max_new_tokens, seed))
    eos = more.pop("eos", EOS)
    return sample(model, prompts, decoding, eos_token_id=eos, pad_token_id=PAD, uniforms=uniforms)
