"""A policy that can be asked: a language model with its text rules and the device it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.batches import Rollout, join, left_pad
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.models.packed import packed
from rlhf.models.roles import adapters_merged
from rlhf.models.sharded import whole_copy
from rlhf.records import Prompt
from rlhf.sampling.sampler import draw_uniforms, sample
from rlhf.text import TextCodec


@contextlib.contextmanager
def ready_to_sample(model: Any, engine: Engine) -> Iterator[Any]:
    """The model to sample from: weights whole, adapters merged, laid out for products of few rows, in the
    engine's number type. All processes enter together.
    """
    with whole_copy(model, engine) as whole, engine.autocast(), adapters_merged(whole), packed(whole, engine):
        yield whole


@dataclass(frozen=True)
class Policy:
    """A language model, the codec that turns its prompts into tokens, and its engine."""

    model: Any
    codec: TextCodec
    engine: Engine

    def respond(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        num_return_sequences: int = 1,
        heard: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """Sample one response per prompt, adapters merged meanwhile; seed and place decide a row's tokens.

        With beams, each prompt standing `num_return_sequences` times in a row, as many of a search's best.
        `heard` is called with each row, of this process, and token when it is drawn.
        """
        tokens = [self.codec.encode_prompt(prompt) for prompt in prompts]
        return self.go_on(tokens, decoding, seed=seed, num_return_sequences=num_return_sequences, heard=heard)

    def go_on(  # noqa: PLR0913 (tokens, how to go on, and who hears of it)
        self,
        tokens: list[list[int]],
        decoding: Decoding,
        *,
        seed: int,
        num_return_sequences: int = 1,
        begun: Sequence[list[int]] | None = None,
        heard: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """`respond` after tokens; `begun`: those at the end of each row that penalties take for response."""
        uniforms = draw_uniforms(len(tokens), decoding.max_new_tokens, seed)
        processes = self.engine.processes
        # neighbours stay together: they may share their prompt
        groups = len(tokens) // num_return_sequences
        ends = [
            rank * groups // processes.count * num_return_sequences for rank in range(processes.count + 1)
        ]
        mine = slice(*ends[processes.rank : processes.rank + 2])
        found: tuple[list[list[int]], list[list[float]]] = ([], [])
        with ready_to_sample(self.model, self.engine) as model:
            if mine.start < mine.stop:
                rollout = sample(
                    model,
                    tokens[mine],
                    decoding,
                    eos_token_id=self.codec.eos_token_id,
                    pad_token_id=self.codec.pad_token_id,
                    uniforms=uniforms[mine],
                    num_return_sequences=num_return_sequences,
                    begun=begun and begun[mine],
                    heard=heard,
                )
                assert rollout.behaviour_logprobs is not None
                found = (rollout.responses(), rollout.behaviour_logprobs.tolist())
                if processes.count == 1:
                    return rollout
        parts = processes.all_of(found)
        responses = [row for rows, _ in parts for row in rows]
        logprobs = [row for _, rows in parts for row in rows]
        pad = self.codec.pad_token_id
        return join(left_pad(tokens, pad, self.engine.device), responses, pad, logprobs)

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses of a rollout as text."""
        return [self.codec.decode_response(tokens) for tokens in rollout.responses()]

    def ended(self, rollout: Rollout) -> list[bool]:
        """Whether each response ended with EOS; the others were cut."""
        return [tokens[-1] == self.codec.eos_token_id for tokens in rollout.responses()]
