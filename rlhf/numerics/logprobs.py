"""Log-probabilities of tokens and entropies from logits, in float32 without a float32 copy of the logits.

Rollout, old, new and reference passes all use `token_logprobs`, with the same temperature. Work goes over
chunks of flattened rows, forward and backward, so the extra memory is chunk x V floats. Letters: N flattened
rows, V vocabulary, `...` any shape.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# floats of a chunk where `chunk` is not given: 16 MB, near the size of a processor's cache
CHUNK_FLOATS = 1 << 22


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> Tensor:
    """Return log_softmax(logits / temperature)[tokens] in float32, differentiable in the logits.

    Shapes: logits (..., V) of any float type, tokens (...) -> (...). `tokens` must be valid ids at padded
    positions too. The gradient has the type of the logits; rows that receive a zero gradient are skipped and
    stay exactly 0. Contiguous logits are not copied.
    """
    return _token_logprobs(logits, tokens, temperature, chunk)[0]


def token_logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `token_logprobs` and `entropy` do, by one pass; the entropy has no gradient."""
    return _token_logprobs(logits, tokens, temperature, chunk, with_entropy=True)


def _token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, chunk: int | None, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    assert logits.shape[:-1] == tokens.shape, (logits.shape, tokens.shape)
    assert temperature > 0, temperature
    rows, chunk = logits.reshape(-1, logits.shape[-1]), chunk or _default_chunk(logits)
    chosen, entropies = _TokenLogprobs.apply(rows, tokens.reshape(-1), temperature, chunk, with_entropy)
    return chosen.view(tokens.shape), entropies.view(tokens.shape) if with_entropy else entropies


def entropy(logits: Tensor, temperature: float = 1.0, *, chunk: int | None = None) -> Tensor:
    """Return the entropy in nats of softmax(logits / temperature), differentiable, (..., V) -> (...).

    -sum p log p; a token whose logit is -inf adds 0.
    """
    assert temperature > 0, temperature
    chunks = logits.reshape(-1, logits.shape[-1]).split(chunk or _default_chunk(logits))
    entropies = [
        checkpoint(_row_entropy, rows, temperature, use_reentrant=False, preserve_rng_state=False)
        for rows in chunks
    ]
    return torch.cat(entropies).view(logits.shape[:-1])


def _default_chunk(logits: Tensor) -> int:
    return max(1, CHUNK_FLOATS // logits.shape[-1])


def _cooled(rows: Tensor, temperature: float) -> Tensor:
    return rows.float() if temperature == 1 else rows.float() / temperature


def _row_entropy(rows: Tensor, temperature: float) -> Tensor:
    return _entropy_of(torch.log_softmax(_cooled(rows, temperature), dim=-1))


def _entropy_of(logprobs: Tensor) -> Tensor:
    # the clamp makes a token that was ruled out add 0, not 0 * inf
    return -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp(min=torch.finfo(torch.float32).min))


class _TokenLogprobs(torch.autograd.Function):
    """Autograd would keep every chunk's float32 softmax until backward; this computes it again instead."""

    @staticmethod
    def forward(  # noqa: PLR0913 (a static method of autograd's)
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, chunk: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature, ctx.chunk = temperature, chunk
        chosen = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        entropies = torch.empty_like(chosen if with_entropy else chosen[:0])
        ctx.mark_non_differentiable(entropies)
        for start in range(0, len(tokens), chunk):
            piece = slice(start, start + chunk)
            logprobs = torch.log_softmax(_cooled(logits[piece], temperature), dim=-1)
            chosen[piece] = logprobs.gather(1, tokens[piece, None])[:, 0]
            if with_entropy:
                entropies[piece] = _entropy_of(logprobs)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        """d chosen / d logits = (onehot(token) - softmax) / temperature, for rows whose gradient is not 0."""
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for rows in grad.nonzero()[:, 0].split(ctx.chunk):
            scale = grad[rows, None] / ctx.temperature
            piece = torch.softmax(_cooled(logits[rows], ctx.temperature), dim=-1).mul_(-scale)
            piece.scatter_add_(1, tokens[rows, None], scale)
            grad_logits[rows] = piece.to(grad_logits.dtype)
        return grad_logits, None, None, None, None
