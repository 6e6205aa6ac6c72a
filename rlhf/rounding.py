"""Trained weights rounded to the number type of products, once for all passes that share them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_copies: dict[tuple[int, torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}
_lock = threading.Lock()
_scopes: list[None] = []


@contextlib.contextmanager
def rounded_once() -> Iterator[None]:
    """Around passes of unchanged weights, in all threads: `rounded` gives the same copy each time."""
    _scopes.append(None)
    try:
        yield
    finally:
        _scopes.pop()
        if not _scopes:
            _copies.clear()


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another number type; itself where it has that type already."""
    if weight.dtype == dtype:
        return weight
    key = (weight.data_ptr(), weight.shape, dtype)
    with _lock:  # whoever needs it meanwhile waits for this copy
        if key not in _copies:
            copy = weight.detach().to(dtype)
            if not _scopes:
                return copy
            _copies[key] = (weight, copy)  # the weight itself too, so that no other comes to lie there
        return _copies[key][1]
