"""Where the arithmetic happens: device, number type and autocast, chosen once and handed to everything that
computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from rlhf import workers
from rlhf.deepspeed_config import deepspeed_settings
from rlhf.derived import unchanged_weights
from rlhf.pass_sizes import KEPT_TOKENS, SMALL_MODEL, TOKENS_PER_PASS, pass_sizes, processor_has_bf16
from rlhf.processes import ALONE, Processes, processes
from rlhf.settings import WEIGHTS, zero_stage
from rlhf.zero import Root, ShardedAdamW, check_accepted

# So many times as long are a processor's passes that hold nothing for a backward one.
FORWARD_ONLY = 4

MALLOPT_ARENA_MAX = -8  # M_ARENA_MAX in glibc's malloc.h


@dataclass(frozen=True)
class Engine:
    """A device and the number type of matrix products on it; trained weights themselves stay in float32."""

    device: torch.device
    dtype: torch.dtype
    micro_batch_size: int | None = None
    tokens_per_pass: int = TOKENS_PER_PASS
    kept_tokens: int = KEPT_TOKENS
    workers: int = 1
    processes: Processes = ALONE
    deepspeed: dict[str, Any] | None = None
    evens_out: bool = True  # pieces, whose make-up then follows the number of workers and processes

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in `dtype`, to which weights are rounded once, so they must not change inside."""
        rounds = self.dtype != torch.float32
        cast = torch.autocast(self.device.type, dtype=self.dtype) if rounds else contextlib.nullcontext()
        with cast, unchanged_weights():
            yield

    def no_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside `autocast`, for a backward pass: its products have the types that the forward pass gave."""
        return torch.autocast(self.device.type, enabled=False)

    def micro_batches(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Rows of `lengths` tokens, sorted by length and cut into pieces that are computed at a time.

        A piece has at most `micro_batch_size` rows and, unless it is one row, no more tokens than
        `tokens_per_pass` with its padding. Rows of like length go together, so little padding is computed.
        Where several workers or processes share them they are evened out, if the limits allow and the engine
        does so.

        Policy and reference take pieces as short as learning does, though they could hold longer ones: a
        product of more rows rounds differently, and in bfloat16 the first minibatch's ratio would no longer
        be 1.
        """
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        pieces: list[list[int]] = [[]]
        for row in order:
            if pieces[-1] and not self._fits([*pieces[-1], row], lengths):
                pieces.append([])
            pieces[-1].append(row)
        if self.evens_out and self.shares > 1 and len(order) > 1:
            pieces = self._evened(order, lengths, -(-len(pieces) // self.shares) * self.shares) or pieces
        return [torch.tensor(piece, dtype=torch.long) for piece in pieces]

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of every weight, so that all must make the same passes."""
        return zero_stage(self.deepspeed) == WEIGHTS

    @property
    def shares(self) -> int:
        """Workers of all processes, which passes are shared out to."""
        return self.workers * self.processes.count

    def forward_only(self) -> Engine:
        """This engine with passes as long as suit a model that is not learning."""
        times = FORWARD_ONLY if self.device.type == "cpu" else 1
        return replace(self, tokens_per_pass=times * self.tokens_per_pass)

    def _fits(self, piece: Sequence[int], lengths: Sequence[int]) -> bool:
        rows_fit = len(piece) <= (self.micro_batch_size or len(piece))
        return rows_fit and (len(piece) == 1 or len(piece) * lengths[piece[-1]] <= self.tokens_per_pass)

    def _evened(self, order: list[int], lengths: Sequence[int], count: int) -> list[list[int]] | None:
        """The rows in `count` pieces of about as many tokens; None where the rows do not suffice or a piece
        does not fit.
        """
        ends = np.cumsum([lengths[row] for row in order])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right")
        pieces = [piece.tolist() for piece in np.split(np.array(order), cuts)]
        return pieces if all(piece and self._fits(piece, lengths) for piece in pieces) else None

    def side_by_side(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`function` of each item, in order, computed by `workers` threads of this process."""
        return workers.side_by_side(function, items, workers=self.workers, device=self.device.type)

    def adamw(
        self,
        models: Sequence[Sequence[dict[str, Any]]],
        *,
        clip: float,
        epsilon: float,
        roots: Sequence[Root | None] = (),
    ) -> torch.optim.Optimizer:
        """AdamW for the parameter groups, with `lr` and `weight_decay`, of some models.

        Where DeepSpeed shares it out it clips each model's gradient itself; `roots` are those of models whose
        weights are shared out too.
        """
        if self.deepspeed is not None:
            return ShardedAdamW(
                models, self.deepspeed, self.processes, clip=clip, epsilon=epsilon, roots=roots
            )
        groups = [group for model in models for group in model]
        return torch.optim.AdamW(groups, eps=epsilon, fused=True)

    def shared_out(self, function: Callable[[Any], torch.Tensor], items: Sequence[Any]) -> list[torch.Tensor]:
        """`function` of each item, in order, computed by all processes and their workers."""
        mine = self.processes.share(items)
        if self.shards_weights:
            found = [function(item) for item, _ in self.processes.rounds(items)][: len(mine)]
        else:
            found = self.side_by_side(function, mine)
        if self.processes.count == 1:
            return found
        gathered = self.processes.gathered([each.cpu() for each in found], len(items))
        return [each.to(self.device) for each in gathered]


def build_engine(settings: Any, num_parameters: int, *, full_weights: bool = False) -> Engine:
    """Choose device, number type and the size of passes from the `engine` group.

    `auto` takes CUDA where there is one, and bfloat16 where the device computes it natively and the model has
    at least 20 million parameters. `full_weights`: all of the model's weights are trained.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    _check_same_device(processes().all_of(device.type))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # an installed DeepSpeed need not look, and say so
        _share_freed_memory()
    if settings.dtype == "auto":
        use_bf16 = num_parameters >= SMALL_MODEL and has_native_bf16(device)
        dtype = torch.bfloat16 if use_bf16 else torch.float32
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    sizes = pass_sizes(settings, num_parameters, on_processor=device.type == "cpu", full_weights=full_weights)
    deepspeed = deepspeed_settings(settings)
    if deepspeed is not None:
        check_accepted(deepspeed)
    return Engine(
        device,
        dtype,
        settings.micro_batch_size,
        sizes.tokens_per_pass,
        sizes.kept_tokens,
        min(sizes.workers, torch.get_num_threads()),
        processes(),
        deepspeed,
    )


def find_device(name: str) -> torch.device:
    """The device that `engine.device` names; raises ValueError where this machine has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[kind].is_available():
        raise ValueError(
            f"engine.device={name}, but this machine shows no {kind.upper()} device; use engine.device=cpu"
        )
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"engine.device={name}, but this process sees {count} GPUs, counted from 0; use "
            "engine.device=cuda"
        )
    return device


def _check_same_device(kinds: Sequence[str]) -> None:
    """Raise ValueError unless all processes, by rank, have the same kind of device."""
    other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"process {other} computes on {kinds[other]}, process 0 on {kinds[0]}: start no more "
            "processes on a machine than it has GPUs (num_processes=, slots=), or set engine.device=cpu"
        )


def _share_freed_memory() -> None:
    """Let all threads take memory from one place: glibc gives each its own, where what one has freed is of no
    use to the others.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(MALLOPT_ARENA_MAX, 1)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return processor_has_bf16()


def peak_memory(device: str) -> int:
    """The most bytes held so far: on the GPU where `engine.device` leads there, else by this process."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(_gpu(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu(device: str) -> str:
    return "cuda" if device == "auto" else device


def memory_limit(device: str) -> float:
    """GiB that a process may come to hold: those of the GPU where `engine.device` leads there, else those
    that are free now.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(_gpu(device)).total_memory / 2**30
    return psutil.virtual_memory().available / 2**30


def held_memory(device: str) -> int:
    """The bytes held now: on the GPU where `engine.device` leads there, else by this process."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.memory_allocated(_gpu(device))
    return psutil.Process().memory_info().rss


def seed_everything(seed: int) -> None:
    """Seed every random generator that this project or its libraries draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random generator, made of tensors and plain values only."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back to a state of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
