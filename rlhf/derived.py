"""What passes derive from weights, made once for all passes that share them unchanged."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

_found: dict[Hashable, tuple[list[Tensor | None], Any]] = {}
_lock = threading.RLock()
_scopes: list[None] = []


@contextlib.contextmanager
def unchanged_weights() -> Iterator[None]:
    """Around passes of unchanged weights, in all threads: `derived` gives the same each time."""
    _scopes.append(None)
    try:
        yield
    finally:
        _scopes.pop()
        if not _scopes:
            _found.clear()


def derived(make: Callable[[], Made], weights: Sequence[Tensor | None], *kind: Hashable) -> Made:
    """What `make` makes of weights; `kind` tells apart different things that are made of the same ones."""
    if not _scopes:
        return make()
    places = [None if each is None else (each.data_ptr(), each.shape, each.stride()) for each in weights]
    key = (kind, *places)
    with _lock:  # whoever needs it meanwhile waits for it
        if key not in _found:
            # the weights' memory too, so that no others come to lie there
            _found[key] = ([None if each is None else each.detach() for each in weights], make())
        return _found[key][1]


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another number type; itself where it has that type already."""
    if weight.dtype == dtype:
        return weight
    return derived(lambda: weight.detach().to(dtype), [weight], dtype)
