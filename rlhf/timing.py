"""Where seconds go: a clock of phases, the least of several tries, the shares of operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rlhf.engine import Engine

NUM_OPERATIONS = 8
PHASES = ("sample", "score", "experience", "learn")


class Clock:
    """Seconds spent in each phase, the device's work included."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def run(self, phase: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        _wait(self.engine)
        started = time.perf_counter()
        result = function(*arguments, **more)
        _wait(self.engine)
        self.seconds[phase] += time.perf_counter() - started
        return result


def seconds_of(engine: Engine, function: Callable[[], Any]) -> float:
    """The least seconds of three calls, after one that is not timed."""
    times = []
    for _ in range(4):
        clock = Clock(engine)
        clock.run(PHASES[0], function)
        times.append(clock.seconds[PHASES[0]])
    return min(times[1:])


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def operations_of(engine: Engine, function: Callable[[], Any]) -> dict[str, float]:
    """The shares of the seconds of `function` that its longest operations take, as the profiler sees them.

    On a processor those of this thread's part of the work.
    """
    on_gpu = engine.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        function()
        _wait(engine)
    return shares(profiler.key_averages(), on_gpu=on_gpu)


def shares(events: Sequence[Any], *, on_gpu: bool) -> dict[str, float]:
    """The shares of all seconds of the longest of a profiler's operations.

    What one takes on the GPU stands beside it, and again under the names of its kernels, which do not count.
    """
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = [each for each in events if each.device_type == DeviceType.CPU]
    seconds = {each.key: getattr(each, attribute) for each in operations}
    longest = sorted(seconds, key=lambda name: -seconds[name])[:NUM_OPERATIONS]
    return {name: seconds[name] / sum(seconds.values()) for name in longest}
