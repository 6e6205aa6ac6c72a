"""A decoding step captured as a CUDA graph: a GPU is done with a step's hundreds of kernels sooner than a
program has asked for them one by one.

B rows, V vocabulary, T positions that the cache has room for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.models.loading import logits_of, trunk
from rlhf.models.lora import type_of_products
from rlhf.sampling.cache import RoomyLayer

# Families whose forward with a mask of four dimensions, and without asking the GPU for a value, is tested.
FAMILIES = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")
MOVING_ROPE = ("dynamic", "longrope")  # whose tables follow the longest position

# Positions by which the room of replayed steps grows; each time one is captured anew.
ROOM_STRIDE = 256


def can_replay(model: Any, cache: Any) -> bool:
    """Whether decoding steps can be replayed: on a GPU, with a cache that has room, in a family where nothing
    depends on values that the program would have to wait for.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        model.device.type == "cuda"
        and config.model_type in FAMILIES
        and config._attn_implementation in ("sdpa", "eager")
        and rope.get("rope_type") not in MOVING_ROPE
        and getattr(config, "quantization_config", None) is None
        and all(type(layer) is RoomyLayer for layer in cache.layers)
    )


class Step:
    """One more token for each of B rows. All that it reads and writes keeps its place in memory.

    The first call computes as ever, the second captures what the first one did, and from then on it is
    replayed. The weights must stay where they are meanwhile.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor, positions: Tensor) -> None:
        """`mask` (B, L) of the cached tokens and the next one, whose `positions` (B, 1) are given; L <= T."""
        rows, length = mask.shape
        self.model, self.cache = model, cache
        self.room = -(-length // ROOM_STRIDE) * ROOM_STRIDE
        self.tokens, self.positions = torch.zeros_like(positions), positions.clone()
        self.place = torch.tensor([length - 1], device=mask.device)
        kind = type_of_products(model.get_input_embeddings().weight)
        size, lowest = (rows, 1, 1, self.room), torch.finfo(kind).min
        self.mask = torch.full(size, lowest, dtype=kind, device=mask.device)
        self.mask[:, 0, 0, :length].masked_fill_(mask.bool(), 0)
        for layer in cache.layers:
            layer.fasten(self.room, self.place)
        self.logits: Tensor
        self.computed = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) behind the tokens (B, 1); the next call writes over them."""
        self.tokens.copy_(tokens)
        if self.graph is None and self.computed and tokens.device.type == "cuda":
            self.graph = self._captured()
        if self.graph is None:
            self._compute()
            self.computed = True
        else:
            self.graph.replay()
        return self.logits

    def _compute(self) -> None:
        self.mask.index_fill_(-1, self.place, 0)
        output = trunk(self.model)(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = logits_of(self.model, output.last_hidden_state[:, -1])
        self.positions += 1
        self.place += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; memory that torch held unused, an earlier graph's too, is given back first."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.mask.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._compute()
        return graph
