"""The tensors that flow between the phases of the pipeline, each field's shape stated and checked.

B sequences, P prompt positions, R response positions, L = P + R. Prompts are padded on the left, responses on
the right; masks are boolean and true on real tokens. Position t of a (B, R) tensor is the t-th generated
token everywhere: `logprobs[t]` scores it, `values[t]` belongs to the state before it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts: tokens (B, P), attention_mask (B, P)."""

    tokens: Tensor
    attention_mask: Tensor

    def __post_init__(self) -> None:
        _check(self.tokens.shape == self.attention_mask.shape, "tokens and attention_mask differ in shape")
        _check(self.attention_mask.dtype == torch.bool, "attention_mask is not boolean")
        _check(bool(self.attention_mask[:, -1].all()), "prompts are not padded on the left")


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses: tokens (B, L), attention_mask (B, L), response_mask (B, R), EOS
    included.

    `behaviour_logprobs` (B, R), from the sampler alone, are the log-probs of the tokens under the
    distribution that they were drawn from, decoding penalties included; 0 off the response.
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    behaviour_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self.tokens.shape == self.attention_mask.shape, "tokens and attention_mask differ in shape")
        num_prompt = self.tokens.shape[1] - self.response_mask.shape[1]
        _check(num_prompt > 0, "a rollout needs at least one prompt position")
        same = torch.equal(self.attention_mask[:, num_prompt:], self.response_mask)
        _check(same, "response_mask differs from the attention mask of the response")
        _check(bool(self.response_mask[:, 0].all()), "a response has no token")

    @property
    def prompt_length(self) -> int:
        """Number of prompt positions P."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def response_tokens(self) -> Tensor:
        """The generated tokens (B, R)."""
        return self.tokens[:, self.prompt_length :]

    def responses(self) -> list[list[int]]:
        """The generated tokens of each row without padding, EOS included."""
        rows = zip(self.response_tokens.tolist(), self.response_mask.sum(1).tolist(), strict=True)
        return [tokens[:length] for tokens, length in rows]

    def lengths(self) -> list[int]:
        """Tokens of each row without padding."""
        return self.attention_mask.sum(1).tolist()

    def sequences(self) -> list[list[int]]:
        """Prompt and response tokens of each row without padding."""
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.attention_mask, strict=True)]

    def rows(self, index: Tensor) -> Rollout:
        """Select rows (an index on the processor will do) and drop padding columns that none needs."""
        attention_mask, response_mask = self.attention_mask[index], self.response_mask[index]
        first = int(attention_mask[:, : self.prompt_length].int().argmax(1).min())
        width = int(response_mask.sum(1).max())
        stop = self.prompt_length + width
        return Rollout(
            self.tokens[index, first:stop],
            attention_mask[:, first:stop],
            response_mask[:, :width],
            None if self.behaviour_logprobs is None else self.behaviour_logprobs[index, :width],
        )


@dataclass(frozen=True)
class Experience:
    """A rollout with what learning needs: (B, R) tensors that are 0 off the response, and scores (B,)."""

    rollout: Rollout
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        shape = self.rollout.response_mask.shape
        for field in fields(self):
            if field.name in ("rollout", "scores"):
                continue
            _check(getattr(self, field.name).shape == shape, f"{field.name} is not (B, R) = {tuple(shape)}")
        _check(self.scores.shape == shape[:1], "scores is not (B,)")

    def rows(self, index: Tensor) -> Experience:
        """Select rows; the response is cut to the longest of them, so every field stays (B, R)."""
        rollout = self.rollout.rows(index)
        width = rollout.response_mask.shape[1]
        names = [f.name for f in fields(self) if f.name not in ("rollout", "scores")]
        return Experience(
            rollout=rollout,
            scores=self.scores[index],
            **{name: getattr(self, name)[index][:, :width] for name in names},
        )


def left_pad(prompts: list[list[int]], pad_token_id: int, device: torch.device | None = None) -> PromptBatch:
    """Pad token lists on the left to a PromptBatch (B, P)."""
    width = max(len(tokens) for tokens in prompts)
    tokens = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = True
    return PromptBatch(tokens.to(device), mask.to(device))


def join(
    prompts: PromptBatch,
    responses: list[list[int]],
    pad_token_id: int,
    logprobs: list[list[float]] | None = None,
) -> Rollout:
    """Attach given responses (EOS included), and the log-probs of their tokens, to their prompts."""
    width = max(len(tokens) for tokens in responses)
    tokens = torch.full((len(responses), width), pad_token_id, dtype=torch.long)
    behaviour = torch.zeros((len(responses), width))
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = torch.tensor(response, dtype=torch.long)
        if logprobs is not None:
            behaviour[row, : len(response)] = torch.tensor(logprobs[row][: len(response)])
    lengths = torch.tensor([len(response) for response in responses])
    device = prompts.tokens.device
    mask = (torch.arange(width) < lengths.unsqueeze(1)).to(device)
    return Rollout(
        torch.cat([prompts.tokens, tokens.to(device)], 1),
        torch.cat([prompts.attention_mask, mask], 1),
        mask,
        None if logprobs is None else behaviour.to(device),
    )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) that count real tokens only, so that left padding does not shift a model's
    positions.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _check(condition: bool, message: str) -> None:
    assert condition, message
