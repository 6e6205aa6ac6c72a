"""Several processes that do the work of one.

All of them run the same program on the same data, and hold the same numbers; only what takes long is shared
out, and its results are gathered again. So nothing depends on how many there are but the time. The first one
alone writes files and speaks.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import os
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")

# What a launcher says; ADDRESS is host:port of the first process, LOCAL_RANK the number on its machine.
RANK, COUNT, ADDRESS, LOCAL_RANK = "RLHF_RANK", "RLHF_COUNT", "RLHF_ADDRESS", "RLHF_LOCAL_RANK"
STORE = "RLHF_STORE"  # our part of the store that a launcher itself holds at ADDRESS, where it does

# A process that waits longer than this for the others takes them for dead.
PATIENCE = datetime.timedelta(hours=6)
PATIENCE_AT_START = datetime.timedelta(minutes=10)
PATIENCE_TO_READ = 30.0  # seconds
SECONDS_IN_SILENCE = 5.0  # of waiting at the start, before it is said

MOST_SAID = 5  # differences between two processes that an error names

# Numbers that travel between processes at a time.
BUCKET = 1 << 24


@dataclass(frozen=True)
class Processes:
    """Which one of how many this process is; `rank` counts from 0."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: every `count`-th."""
        return items[self.rank :: self.count]

    def rounds(self, items: Sequence[T]) -> list[tuple[T, float]]:
        """This process's part of the items, as many as every process has: item 0 stands where one is missing,
        with weight 0 instead of 1.
        """
        own = [(item, 1.0) for item in self.share(items)]
        return own + [(items[0], 0.0)] * (-(-len(items) // self.count) - len(own))

    def gathered(self, mine: Sequence[T], total: int) -> list[T]:
        """What all processes made of their shares, in the order of the `total` items."""
        if self.count == 1:
            return list(mine)
        parts = self.all_of(list(mine))
        return [parts[i % self.count][i // self.count] for i in range(total)]

    def all_of(self, mine: T) -> list[T]:
        """One value of every process, by rank."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(found, mine, group=_group())
        return found

    def sum_gradients(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The sum of all processes' gradients of the parameters; None where no process has one."""
        found = list(gradients)
        if self.count == 1:
            return found
        import torch
        import torch.distributed as dist

        there = [any(flags) for flags in zip(*self.all_of([g is not None for g in found]), strict=True)]
        for index, parameter in enumerate(parameters):
            if there[index] and found[index] is None:
                found[index] = torch.zeros_like(parameter)
        for bucket in buckets([gradient for gradient in found if gradient is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with _together():
                dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        return found

    def check_same(self, value: Any, what: str) -> None:
        """Raise ValueError where the processes hold other values; of mappings, with the keys that differ."""
        values = self.all_of(value)
        differing = [rank for rank, each in enumerate(values) if each != values[0]]
        if differing:
            other = differing[0]
            how = f" ({_differences(values[0], values[other])})" if isinstance(value, dict) else ""
            raise ValueError(
                f"process {other} does not have the {what} of process 0{how}: give every machine the same "
                "command, code, libraries and files"
            )


def _differences(first: dict[str, Any], other: dict[str, Any]) -> str:
    """The keys of two mappings whose values differ, with both, MOST_SAID of them."""
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    said = [f"{key}={other.get(key)} instead of {first.get(key)}" for key in keys[:MOST_SAID]]
    return ", ".join([*said, *([f"{len(keys) - MOST_SAID} more"] if len(keys) > MOST_SAID else [])])


ALONE = Processes()


class OthersEndedError(Exception):
    """Another process has ended, and this one cannot go on alone."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch raises where a connection is closed
        raise OthersEndedError(str(error)) from error


@functools.cache
def processes() -> Processes:
    """This process among those that the launcher started; alone where it started none.

    The first call joins them, and waits until all are there.
    """
    count = int(os.environ.get(COUNT, "1"))
    if count == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    rank, (host, _, port) = int(os.environ[RANK]), os.environ[ADDRESS].rpartition(":")
    try:
        own_part = os.environ.get(STORE)
        with _said_if_it_takes_long(f"waiting for process 0 at {host}:{port} ..."):
            store: Any = dist.TCPStore(
                host,
                int(port),
                is_master=rank == 0 and own_part is None,
                timeout=PATIENCE_AT_START,
                wait_for_workers=False,
            )
        if own_part is not None:
            store = dist.PrefixStore(own_part, store)
        with _said_if_it_takes_long(f"waiting at {host}:{port} for all {count} processes to come ..."):
            _meet(store, rank, count)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=PATIENCE,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"port {port} of this machine is in use: end what uses it, or set main_port= (with another "
                "launcher MASTER_PORT) to a free one"
            ) from error
        raise ValueError(
            f"the {count} processes did not come together at {host}:{port} within {PATIENCE_AT_START}: start "
            "the stage on every machine, and check main_address=, machine_rank=, main_port= and the firewall "
            "between them"
        ) from error
    return Processes(rank, count)


def _meet(store: Any, rank: int, count: int) -> None:
    """Wait until all processes are there; raise ValueError where they were not told of as many, or two have
    the same rank, RuntimeError where they do not come.
    """
    store.add("come", 1)
    agreed = int(store.compare_set("count", "", str(count)))
    if agreed != count:
        store.set("others", str(count))
    if store.add(f"rank {rank}", 1) > 1:
        store.set("twice", str(rank))
    store.add("arrived", 1)
    deadline = time.monotonic() + PATIENCE_AT_START.total_seconds()
    while True:
        if store.check(["others"]):
            others = int(store.get("others")) if agreed == count else agreed
            problem = f"this machine was told of {count} processes, another of {others}: give every machine "
            problem += "the same num_processes= and num_machines="
        elif store.check(["twice"]):
            problem = f"two processes have come as number {int(store.get('twice'))} of {count}: give every "
            problem += "machine a machine_rank= of its own, from 0 on"
        elif store.add("arrived", 0) >= count:
            return
        elif time.monotonic() > deadline:
            raise RuntimeError("not all came")
        else:
            time.sleep(0.05)
            continue
        store.add("read", 1)
        patience = time.monotonic() + PATIENCE_TO_READ
        # the first process holds the store, which the others read
        while rank == 0 and store.add("read", 0) < store.add("come", 0) and time.monotonic() < patience:
            time.sleep(0.05)
        raise ValueError(problem)


@contextlib.contextmanager
def _said_if_it_takes_long(what: str) -> Iterator[None]:
    """Say what is being waited for, by one process of each machine."""
    timer = threading.Timer(SECONDS_IN_SILENCE, print, [what], {"file": sys.__stderr__, "flush": True})
    timer.daemon = True
    if os.environ.get(LOCAL_RANK, "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave() -> None:
    """Part from the others, once all have come here: torch aborts a process that ends while it is joined."""
    processes().all_of(None)
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def by_main(function: Callable[P, T]) -> Callable[P, T]:
    """Have the first process alone do what a function does while the others wait, and give all its result.

    What it raises is raised in all of them. One such function may call another.
    """

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **more: P.kwargs) -> T:
        if _alone.get() or processes().count == 1:
            return function(*arguments, **more)
        everyone = processes()
        result, error = None, None
        if everyone.is_main:
            try:
                with alone():
                    result = function(*arguments, **more)
            except (ValueError, OSError) as raised:
                error = raised
        (said, given), *_ = everyone.all_of((error and str(error), result))
        if said is not None:
            raise ValueError(said) from error
        return typing.cast(T, given)

    return wrapped


_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process does itself what `by_main` leaves to the first one, and waits for none."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@functools.cache
def _group() -> Any:
    """Where objects travel: over the network's own transport, whatever the tensors take."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)


def buckets(
    tensors: Sequence[Tensor], numel: Callable[[Tensor], int] = lambda tensor: tensor.numel()
) -> list[list[Tensor]]:
    """Tensors in groups of about BUCKET numbers, each of one type; `numel` counts those of one."""
    groups: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + numel(tensor) > BUCKET or groups[-1][0].dtype != tensor.dtype:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += numel(tensor)
    return groups
