"""The rollout sampler: one decode loop for training and evaluation.

B sequences, P prompt positions, R response positions, V vocabulary. A row that has ended leaves the batch and
the cache. The randomness of a row is a row of uniform numbers drawn beforehand, so the tokens do not depend
on how rows are batched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.batches import PromptBatch, Rollout, join, left_pad, position_ids
from rlhf.decoding import Decoding
from rlhf.models.loading import logits_of, trunk
from rlhf.sampling import replay
from rlhf.sampling.beam import beam_search
from rlhf.sampling.cache import new_cache
from rlhf.sampling.decoding import check_finite, penalised, truncated

# Copying the cache costs about as much as a step saves once this share of its rows has ended.
SHARE_ENDED_BEFORE_DROP = 0.1

# The same where steps are replayed: for other rows one is captured anew, and fewer rows save a GPU less.
SHARE_ENDED_BEFORE_CAPTURE = 0.5

# Rows are drawn from in pieces of this many logits: on a processor 4 MB, so that the passes over them stay in
# the cache; on a GPU, whose passes are few kernels each, many.
FLOATS_PER_DRAW = 1 << 20
FLOATS_PER_DRAW_GPU = 1 << 25

# Tokens whose probabilities are first summed as one, to find the block that a uniform number falls into.
BLOCK = 256


def draw_uniforms(num_rows: int, max_new_tokens: int, seed: int) -> Tensor:
    """Uniform numbers (B, R) in [0, 1), float64: all the randomness of a rollout."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, max_new_tokens, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(  # noqa: PLR0913 (a model, its special tokens, prompts, decoding and randomness)
    model: Any,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    eos_token_id: int,
    pad_token_id: int,
    uniforms: Tensor,
    num_return_sequences: int = 1,
    begun: Sequence[list[int]] | None = None,
    heard: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Sample one response to each prompt, or search for it with several beams.

    `prompts` are token lists, `uniforms` is (B, R). A response ends with its first EOS or is cut at
    `max_new_tokens`. With beams every prompt stands `num_return_sequences` times in a row, for as many of the
    responses that one search finds, the best first. `begun` are tokens at the end of each prompt that
    penalties take for response. `heard` is called with each row and token when it is drawn; beams are silent.
    """
    assert uniforms.shape == (len(prompts), decoding.max_new_tokens), uniforms.shape
    batch = left_pad(prompts, pad_token_id, device=model.device)
    with evaluating(model):
        if decoding.num_beams > 1:
            assert begun is None, "beams know no response that was begun"
            responses = beam_search(
                model,
                left_pad(prompts[::num_return_sequences], pad_token_id, device=model.device),
                decoding,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                num_return_sequences=num_return_sequences,
            )
            logprobs = [[0.0] * len(tokens) for tokens in responses]  # as greedy: nothing is drawn
        else:
            loop = _Loop(model, batch, _first_of_equals(prompts))
            before = prompts if decoding.penalty_scope == "all" else begun or [[]] * len(prompts)
            numbers = uniforms.to(model.device)
            responses, logprobs = _generate(loop, decoding, eos_token_id, numbers, before, heard)
    return join(batch, responses, pad_token_id, logprobs)


def _first_of_equals(prompts: list[list[int]]) -> list[int]:
    """For each row the first row with the same prompt: the prompt of these is computed once."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]


def _generate(  # noqa: PLR0913 (a loop, what it draws with, and who hears of it)
    loop: _Loop,
    decoding: Decoding,
    eos_token_id: int,
    uniforms: Tensor,
    before: Sequence[list[int]],
    heard: Callable[[int, int], None] | None,
) -> tuple[list[list[int]], list[list[float]]]:
    """The tokens of every row up to its first EOS, and their log-probs; penalties see `before` too."""
    responses: list[list[int]] = [[] for _ in uniforms]
    logprobs: list[list[float]] = [[] for _ in uniforms]
    for step in range(decoding.max_new_tokens):
        logits = loop.next_logits()
        rows = loop.rows.tolist()
        chosen, chosen_logprobs = choose_tokens(
            logits, uniforms[loop.rows, step], decoding, [before[row] + responses[row] for row in rows]
        )
        for row, token, logprob in zip(rows, chosen.tolist(), chosen_logprobs.tolist(), strict=True):
            if not responses[row] or responses[row][-1] != eos_token_id:
                responses[row].append(token)
                logprobs[row].append(logprob)
                if heard is not None:
                    heard(row, token)
        loop.advance(chosen, chosen == eos_token_id)
        if loop.all_ended():
            break
    return responses, logprobs


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Leave training mode for a while: with gradient checkpointing a model in it ignores the cache."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def choose_tokens(
    logits: Tensor, uniforms: Tensor, decoding: Decoding, seen: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Choose the next tokens (B,) from logits (B, V), and their log-probs (B,) under the distribution drawn
    from. `seen`: each row's tokens that penalties know of.

    Arg-max (log-prob 0), or inversion of the cumulative distribution at `uniforms`.
    """
    floats = FLOATS_PER_DRAW if logits.device.type == "cpu" else FLOATS_PER_DRAW_GPU
    size = max(1, floats // logits.shape[-1])
    starts = range(0, len(logits), size)
    pieces = [
        _draw(logits[i : i + size].float(), uniforms[i : i + size], decoding, seen[i : i + size])
        for i in starts
    ]
    tokens, logprobs = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(
    logits: Tensor, uniforms: Tensor, decoding: Decoding, seen: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    logits = penalised(logits, seen, decoding)
    check_finite(logits)
    if decoding.greedy:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    probabilities = torch.softmax(truncated(logits, decoding), dim=-1)
    tokens = _invert(probabilities, uniforms.unsqueeze(-1))
    return tokens.squeeze(-1), probabilities.gather(-1, tokens).squeeze(-1).log()


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens (B, 1) at which cumulative probabilities (B, V) pass `uniforms` (B, 1).

    First the block is found, then the token in it.
    """
    blocks = pad(probabilities, (0, -probabilities.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)
    targets = uniforms * ends[:, -1:]
    block = _first_above(ends, targets)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    return block * BLOCK + _first_above(inside, targets - pad(ends, (1, 0)).gather(-1, block))


def _first_above(cumulative: Tensor, targets: Tensor) -> Tensor:
    """The first place (B, 1) where sums (B, N) exceed `targets` (B, 1); at the latest the last one that adds
    anything, since a target may be rounded up to the total.
    """
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.searchsorted(cumulative, targets, right=True).minimum(last)


class _Loop:
    """The rows that still generate: their cache, attention mask and last tokens."""

    def __init__(self, model: Any, prompts: PromptBatch, first_of_equals: list[int]) -> None:
        self.model = model
        self.cache = new_cache(model)
        self.replays = replay.can_replay(model, self.cache)
        self.step: replay.Step | None = None
        self.rows = torch.arange(len(prompts.tokens), device=prompts.tokens.device)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)
        first = torch.tensor(first_of_equals, device=self.rows.device)
        distinct, copies = first.unique(return_inverse=True)
        self.copies = None if len(distinct) == len(first) else copies
        self.inputs = prompts.tokens[distinct]
        self.mask = prompts.attention_mask[distinct]
        self.positions = position_ids(self.mask)

    def next_logits(self) -> Tensor:
        """Logits (B, V) of the last position; equal prompts are computed once, then copied to their rows."""
        logits = self._forward()
        if self.copies is not None:
            logits, self.mask, self.positions = (
                each[self.copies] for each in (logits, self.mask, self.positions)
            )
            self.cache.batch_select_indices(self.copies)
            self.copies = None
        return logits

    def _forward(self) -> Tensor:
        if self.replays and self.cache.get_seq_length():
            if self.step is None or self.mask.shape[1] > self.step.room:
                self.step = replay.Step(self.model, self.cache, self.mask, self.positions)
            return self.step(self.inputs)
        output = trunk(self.model)(
            input_ids=self.inputs,
            attention_mask=self.mask.long(),
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_of(self.model, output.last_hidden_state[:, -1].contiguous())

    def advance(self, tokens: Tensor, ended: Tensor) -> None:
        """Append the chosen tokens; drop ended rows once there are enough of them."""
        self.ended |= ended
        self.inputs = tokens.unsqueeze(-1)
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        enough = SHARE_ENDED_BEFORE_CAPTURE if self.replays else SHARE_ENDED_BEFORE_DROP
        if float(self.ended.float().mean()) >= enough and not self.all_ended():
            self.step = None
            keep = (~self.ended).nonzero().squeeze(-1)
            self.cache.batch_select_indices(keep)
            self.inputs, self.positions, self.mask = self.inputs[keep], self.positions[keep], self.mask[keep]
            self.rows, self.ended = self.rows[keep], self.ended[keep]

    def all_ended(self) -> bool:
        """Whether no row generates any more."""
        return bool(self.ended.all())
