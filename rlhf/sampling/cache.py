"""The sampler's cache of keys and values: it grows in strides, so a step writes one position and copies none.

B rows, K key heads, T positions, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, DynamicLayer

# Positions by which the room grows.
STRIDE = 16


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (B, K, T, D), views of a room (2, B, K, T + some, D)."""

    room: Tensor
    place: Tensor | None = None  # (1,): once `fasten` has set it, where the next position is written

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new positions; return those of all positions, or, fastened, the whole room."""
        if self.place is not None:
            for room, states in zip(self.room, (key_states, value_states), strict=True):
                room.index_copy_(-2, self.place, states.to(room.dtype))
            return self.room[0], self.room[1]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[-1])
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if stop > self.room.shape[3]:
            larger = self.room.new_empty(*self.room.shape[:3], stop + STRIDE, self.room.shape[-1])
            larger[..., :start, :] = self.room[..., :start, :]
            self.room = larger
        self.room[0, ..., start:stop, :] = key_states
        self.room[1, ..., start:stop, :] = value_states
        return self._show(stop)

    def fasten(self, length: int, place: Tensor) -> None:
        """Make the room `length` positions long, zeros behind those that are written. `update` then takes one
        position at a time, writes it where `place` says, and leaves the room where it lies; the length of the
        sequence is then that of the room.
        """
        start = self.get_seq_length()
        if start < length:
            larger = self.room.new_zeros(*self.room.shape[:3], length, self.room.shape[-1])
            larger[..., :start, :] = self.room[..., :start, :]
            self.room = larger
        self.place = place
        self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; an index that stands several times makes as many rows."""
        length = self.get_seq_length()
        self.room = self.room[:, indices]
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.room[..., :length, :]
        return self.keys, self.values


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for a model; layers with a sliding window stay transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
