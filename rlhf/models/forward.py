"""Forward passes over rollouts: log-probs, values and scores at response positions only.

B sequences, P prompt positions, R response positions, L = P + R, N real response tokens, H width, V
vocabulary. Token t of a response is predicted by the hidden state just before it; this file holds the one
shift by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from rlhf.batches import Rollout
from rlhf.models import llama
from rlhf.models.loading import head, logits_of, trunk
from rlhf.models.sharded import through
from rlhf.numerics.kl import divergence
from rlhf.numerics.logprobs import CHUNK_FLOATS, entropy, token_logprobs, token_logprobs_and_entropy
from rlhf.numerics.masked import last_true_index

T = TypeVar("T")
P = ParamSpec("P")


def _through_root(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Have weights that are shared out gathered in the passes that a function makes through its model."""

    @functools.wraps(function)
    def wrapped(model: Any, /, *arguments: P.args, **more: P.kwargs) -> T:
        return through(model, lambda: function(model, *arguments, **more))

    return wrapped


def states_at(model: Any, tokens: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Last hidden states (N, H) at N positions (rows, columns), row after row, of tokens (B, L) padded on
    either side.

    The rows are shifted to the left, so that all padding stands behind them: causal attention then keeps it
    out without a mask, positions count real tokens only, and the pass is as wide as the longest row needs.
    """
    shift = attention_mask.int().argmax(1)
    width = int(attention_mask.sum(1).max())
    index = (shift.unsqueeze(1) + torch.arange(width, device=tokens.device)).clamp(max=tokens.shape[1] - 1)
    tokens, columns, inner = tokens.gather(1, index), columns - shift[rows], trunk(model)
    hidden = llama.hidden_states(inner, tokens, rows, columns)
    if hidden is not None:
        return hidden
    return inner(input_ids=tokens, use_cache=False).last_hidden_state[rows, columns]


@_through_root
def logits_at(model: Any, tokens: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Vocabulary scores (N, V) at the positions of `states_at`."""
    return logits_of(model, states_at(model, tokens, attention_mask, rows, columns))


@_through_root
def response_logprobs(model: Any, rollout: Rollout, *, temperature: float) -> Tensor:
    """Log-probs (B, R) of the response tokens under `logits / temperature`, 0 off the response."""
    logits = _response_logits(model, rollout)
    tokens = rollout.response_tokens[rollout.response_mask]
    return _scattered(token_logprobs(logits, tokens, temperature), rollout.response_mask)


@_through_root
def response_logprobs_and_entropy(
    model: Any, rollout: Rollout, *, temperature: float, learn_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, R) as in `response_logprobs`, and the entropy (B, R) in nats of each token's
    distribution, which has a gradient where `learn_entropy`.
    """
    logits = _response_logits(model, rollout)
    tokens = rollout.response_tokens[rollout.response_mask]
    if learn_entropy:
        logprobs, entropies = token_logprobs(logits, tokens, temperature), entropy(logits, temperature)
    else:
        logprobs, entropies = token_logprobs_and_entropy(logits, tokens, temperature)
    return _scattered(logprobs, rollout.response_mask), _scattered(entropies, rollout.response_mask)


@torch.no_grad()
def response_divergence(model: Any, other: Any, rollout: Rollout) -> Tensor:
    """KL (B, R) in nats of one model's distribution of each response token to another's, 0 off the response.

    Exact, at temperature 1. Vocabulary scores are held for few positions at a time; rows of an embedding that
    one of the models has beyond the other's belong to no token.
    """
    size = min(head(each).weight.shape[0] for each in (model, other))
    states = [_states_before_response(each, rollout) for each in (model, other)]
    pieces = zip(*(each.split(max(1, CHUNK_FLOATS // size)) for each in states), strict=True)
    found = [divergence(logits_of(model, a)[:, :size], logits_of(other, b)[:, :size]) for a, b in pieces]
    return _scattered(torch.cat(found), rollout.response_mask)


@_through_root
def response_values(critic: Any, value_head: nn.Module, rollout: Rollout) -> Tensor:
    """Values (B, R) in float32 of the states before each response token, 0 off the response."""
    states = _states_before_response(critic, rollout)
    return _scattered(_in_float32(value_head, states), rollout.response_mask)


@_through_root
def last_states(model: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, H) in float32 at the last real token of each row, found by mask."""
    return _last_states(model, tokens, attention_mask)


def _last_states(model: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    rows = torch.arange(len(tokens), device=tokens.device)
    return states_at(model, tokens, attention_mask, rows, last_true_index(attention_mask)).float()


@_through_root
def sequence_scores(model: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """A reward model's scores (B,) in float32, read at the last real token."""
    return _in_float32(head(model), _last_states(model, tokens, attention_mask))


def _response_logits(model: Any, rollout: Rollout) -> Tensor:
    return logits_of(model, _states_before_response(model, rollout))


def _states_before_response(model: Any, rollout: Rollout) -> Tensor:
    """Hidden states (N, H) from which the response tokens are predicted, rows after one another."""
    rows, steps = rollout.response_mask.nonzero(as_tuple=True)
    columns = rollout.prompt_length - 1 + steps
    return states_at(model, rollout.tokens, rollout.attention_mask, rows, columns)


def _in_float32(layer: nn.Module, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return layer(states.float()).squeeze(-1)


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Put N values at the true positions of a (B, R) mask, zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
