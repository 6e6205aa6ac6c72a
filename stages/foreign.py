"""Processes that another launcher started: torchrun's, accelerate's, DeepSpeed's own."""

from __future__ import annotations

import os
from typing import Any

from rlhf.processes import ADDRESS, COUNT, LOCAL_RANK, RANK, STORE, alone, processes
from stages.common import make_inputs
from stages.launch import gpu_of, threads_each

FOREIGN = "RLHF_FOREIGN"  # set where the variables of `rlhf.processes` were taken over from another launcher
THEIRS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
THEIRS_BEGIN = ("TORCHELASTIC_", "ACCELERATE_", "GROUP_", "ROLE_", "CROSS_")
LEFT_OUT = {"hostfile": None, "main_address": None, "main_port": None, "machine_rank": 0, "num_machines": 1}


def is_foreign() -> bool:
    """Whether another launcher started this process as one of several."""
    return FOREIGN in os.environ


def taken_over(words: list[str]) -> list[str]:
    """The words of a command with the number of processes that another launcher started, whose variables
    give way to ours: libraries would act on them too. What it did not start as one of several stays as it is.

    To be called before torch is imported, which then sees the process's own GPU alone. Raises ValueError
    where a variable is missing.
    """
    count, local = _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    if count == 1 or RANK in os.environ:
        return words
    rank = _number("RANK")
    address, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    here_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    here = _number(here_name, 1)
    _check_counts("RANK", rank, "WORLD_SIZE", count)
    if here_name in os.environ:
        _check_counts("LOCAL_RANK", local, here_name, here)
    else:
        _check_counts("LOCAL_RANK", local, "WORLD_SIZE", count)
    if not address:
        raise ValueError(f"WORLD_SIZE={count}, but MASTER_ADDR is not set: start the stage by ./launch.sh")
    own = {RANK: str(rank), COUNT: str(count), LOCAL_RANK: str(local), FOREIGN: "1"}
    own[ADDRESS] = f"{address}:{port}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        own[STORE] = f"rlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    own["CUDA_VISIBLE_DEVICES"] = gpu_of(local)
    own["OMP_NUM_THREADS"] = threads_each(here)
    for name in [name for name in os.environ if name in THEIRS or name.startswith(THEIRS_BEGIN)]:
        del os.environ[name]
    os.environ.update(own)
    words = [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
    said = any(word.startswith("num_processes=") for word in words)
    return words if said else [*words, f"num_processes={count}"]


def _check_counts(name: str, rank: int, of: str, count: int) -> None:
    if not 0 <= rank < count:
        raise ValueError(
            f"{name}={rank} of {of}={count}: the launcher that sets them counts from 0; else use ./launch.sh"
        )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name}={text}: the launcher that sets WORLD_SIZE gives a whole number; else use ./launch.sh"
        ) from None


def check_stage(stage: str) -> None:
    """Raise ValueError for a program that starts processes itself."""
    if stage in ("all", "bench", "exposure", "overoptimization"):
        raise ValueError(
            f"stage={stage} starts processes itself, and WORLD_SIZE={os.environ[COUNT]} says that another "
            "launcher did: run ./launch.sh, or with that launcher one stage after the other"
        )


def check_fits(config: Any) -> None:
    """Raise ValueError where the settings say otherwise than the launcher that started this process."""
    count = os.environ[COUNT]
    if config.engine.name == "single":
        raise ValueError(
            f"engine=single is one process, but WORLD_SIZE={count}: set engine=ddp or zero2, or start one "
            "process alone"
        )
    if str(config.num_processes) != count:
        raise ValueError(
            f"num_processes={config.num_processes}, but the launcher started WORLD_SIZE={count}: leave "
            "num_processes= out"
        )
    for key, default in LEFT_OUT.items():
        if getattr(config, key) != default:
            raise ValueError(
                f"{key}={getattr(config, key)} is for ./launch.sh, and WORLD_SIZE={count} says that another "
                f"launcher started this process, which says so itself: leave {key}= out"
            )


def make_inputs_once(config: Any) -> None:
    """Have one process of each machine make the inputs of a stage while the others wait."""
    together = processes()
    if os.environ[LOCAL_RANK] == "0":
        with alone():
            make_inputs(config)
    together.all_of(None)
