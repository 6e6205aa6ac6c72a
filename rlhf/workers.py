"""Passes through a model side by side: on a processor, threads that each compute a pass with a share of the
cores outpace one pass that all cores share, whose many small operations leave most of them waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, device: str = "cpu"
) -> list[Result]:
    """`function` of each item, in order; worker k of W takes items k, k + W, ... in a thread of its own.

    The caller's gradient mode and autocast hold in every thread. The first error of a thread is raised once
    all have ended.
    """
    workers = min(workers, len(items))
    if workers < 2:
        return [function(item) for item in items]
    results: list[Any] = [None] * len(items)
    num_threads = torch.get_num_threads()
    gradients = torch.is_grad_enabled()
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def work(first: int) -> None:
        torch.set_num_threads(max(1, num_threads // workers))
        for index in range(first, len(items), workers):
            results[index] = function(items[index])

    def work_there(first: int) -> None:
        # Not by a context: the end of the outermost one empties the cache of rounded weights that all share.
        torch.autocast_increment_nesting()
        torch.set_autocast_enabled(device, autocast)
        torch.set_autocast_dtype(device, dtype)
        try:
            with torch.set_grad_enabled(gradients):
                work(first)
        finally:
            torch.autocast_decrement_nesting()

    others = [_pool(workers - 1).submit(work_there, first) for first in range(1, workers)]
    try:
        work(0)
    finally:
        wait(others)
        torch.set_num_threads(num_threads)
    for each in others:
        each.result()
    return results


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="pass")
