"""A policy that can be asked: a language model with its text rules and the device it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.batches import Rollout
from rlhf.engine import Engine
from rlhf.models.packed import packed
from rlhf.models.roles import adapters_merged
from rlhf.records import Prompt
from rlhf.sampling.sampler import Decoding, draw_uniforms, sample
from rlhf.text import TextCodec


@contextlib.contextmanager
def ready_to_sample(model: Any, engine: Engine) -> Iterator[None]:
    """The engine's number type, adapters merged, and weights laid out for products of few rows."""
    with engine.autocast(), adapters_merged(model), packed(model, engine):
        yield


@dataclass(frozen=True)
class Policy:
    """A language model, the codec that turns its prompts into tokens, and its engine."""

    model: Any
    codec: TextCodec
    engine: Engine

    def respond(self, prompts: Sequence[Prompt], decoding: Decoding, *, seed: int) -> Rollout:
        """Sample one response per prompt, adapters merged meanwhile; seed and place decide a row's tokens."""
        tokens = [self.codec.encode_prompt(prompt) for prompt in prompts]
        with ready_to_sample(self.model, self.engine):
            return sample(
                self.model,
                tokens,
                decoding,
                eos_token_id=self.codec.eos_token_id,
                pad_token_id=self.codec.pad_token_id,
                uniforms=draw_uniforms(len(tokens), decoding.max_new_tokens, seed),
            )

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses of a rollout as text."""
        return [self.codec.decode_response(tokens) for tokens in rollout.responses()]

    def ended(self, rollout: Rollout) -> list[bool]:
        """Whether each response ended with EOS; the others were cut."""
        return [tokens[-1] == self.codec.eos_token_id for tokens in rollout.responses()]
