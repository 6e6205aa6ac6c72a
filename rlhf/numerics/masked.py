"""Reductions over the positions that count.

Masks are boolean and True means the position counts. What stands elsewhere, NaN included, reaches neither a
result nor a gradient. Letters: B sequences, T positions, `...` any shape.
"""

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8


def zero_rest(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` (...) in float32, 0 where `mask` (...) is False; the gradient there is exactly 0."""
    assert mask.dtype == torch.bool, f"mask must be boolean, got {mask.dtype}"
    assert values.shape == mask.shape, (values.shape, mask.shape)
    return values.float().masked_fill(~mask, 0.0)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum `values` (...) where `mask` (...) is True, as a float32 scalar."""
    return zero_rest(values, mask).sum()


def masked_mean(values: Tensor, mask: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """Sum where `mask` is True, divided by `denominator` (default: how many positions count).

    Give the count of the whole optimizer step as denominator and the means of its micro-batches add up.
    Without a position that counts the mean is 0 and still backpropagates.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    return masked_sum(values, mask) / denominator


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scale to variance 1 and, unless `keep_mean`, to mean 0, over the positions that count; 0 elsewhere.

    (x - mean) / sqrt(variance), biased variance (divided by n). Shapes (...), (...) -> (...). Pass the whole
    rollout batch: whitening piece by piece gives every piece its own scale.
    """
    exact = values.double().masked_fill(~mask, 0.0)  # the mean of large equal values must be that value
    count = mask.sum().clamp(min=1)
    mean = exact.sum() / count
    centred = (exact - mean).masked_fill(~mask, 0.0)
    whitened = centred * torch.rsqrt(centred.square().sum() / count + VARIANCE_FLOOR)
    return zero_rest(whitened + mean if keep_mean else whitened, mask)


def last_true_index(mask: Tensor) -> Tensor:
    """Return the index of the last True of every row, (B, T) -> (B,); every row must have one."""
    assert mask.dtype == torch.bool and mask.dim() == 2, (mask.dtype, mask.shape)
    assert mask.any(dim=1).all(), "a row without any position that counts has no last one"
    positions = torch.arange(mask.shape[1], device=mask.device)
    return positions.masked_fill(~mask, -1).amax(dim=1)
