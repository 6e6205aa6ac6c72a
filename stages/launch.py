"""One stage as several processes on this machine, ended together where one of them fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from rlhf.config import PROJECT_DIR
from rlhf.processes import ADDRESS, COUNT, RANK

ENTRY_POINT = PROJECT_DIR / "stages" / "__main__.py"
DEFAULT_PORT = 29500
SECONDS_TO_END = 20.0  # that processes get after a signal before they are killed


def num_processes(config: Any) -> int:
    """How many processes the settings ask for, on all machines together.

    Raises ValueError where they do not fit one another.
    """
    asked = config.num_processes
    if config.engine.name == "single":
        if (asked or 1) > 1 or config.num_machines > 1:
            key = "num_processes" if (asked or 1) > 1 else "num_machines"
            raise ValueError(f"{key}={getattr(config, key)} needs several processes: set engine=ddp")
        return 1
    if asked is None:
        raise ValueError(f"engine={config.engine.name}: give num_processes=, of all machines together")
    if asked % config.num_machines:
        raise ValueError(f"num_processes={asked} is no multiple of num_machines={config.num_machines}")
    if config.machine_rank >= config.num_machines:
        raise ValueError(
            f"machine_rank={config.machine_rank} of num_machines={config.num_machines}: they count from 0"
        )
    if config.num_machines > 1 and config.main_address is None:
        raise ValueError(f"num_machines={config.num_machines}: give main_address=, the address of machine 0")
    return asked


def launch(stage: str, words: list[str], config: Any) -> int:
    """Run a stage as this machine's share of `num_processes`; return the status a shell would."""
    count = num_processes(config)
    here = count // config.num_machines
    first = config.machine_rank * here
    address = _address(config)
    path = os.pathsep.join(filter(None, [str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))
    common = {COUNT: str(count), ADDRESS: address, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    command = [sys.executable, str(ENTRY_POINT), f"stage={stage}", *words]
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, RANK: str(first + local), "CUDA_VISIBLE_DEVICES": gpu},
            start_new_session=True,
        )
        for local, gpu in enumerate(_gpus(here))
    ]

    def forward(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        while not any(child.poll() for child in children) and any(c.poll() is None for c in children):
            time.sleep(0.05)
        return _ending(children, first, count)
    finally:
        _end(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending(children: list[subprocess.Popen[bytes]], first: int, count: int) -> int:
    """The status of the process that ended first, with a word on it where it could say none itself."""
    local, status = next(
        ((i, child.returncode) for i, child in enumerate(children) if child.returncode), (0, 0)
    )
    if status < 0 or status not in (0, 2, 130):
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        print(
            f"error: process {first + local} of {count} {how}; the others were ended too. The last "
            "checkpoint is good: resume=true goes on from there",
            file=sys.stderr,
        )
    return status if status >= 0 else 128 - status


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: kindly, then by force."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _gpus(count: int) -> list[str]:
    """The GPU that each process of this machine sees as its only one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named is not None else [str(number) for number in range(count)]
    return [visible[local] if local < len(visible) else "" for local in range(count)]


def _address(config: Any) -> str:
    """host:port where the first process waits for the others; on one machine any free port will do."""
    host = config.main_address or "127.0.0.1"
    port = config.main_port or (DEFAULT_PORT if config.num_machines > 1 else 0)
    if config.machine_rank > 0:
        return f"{host}:{port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if config.num_machines > 1 else host, port))
        except OSError as error:
            raise ValueError(
                f"main_port={port} cannot be used ({error.strerror}): end what uses it, or set main_port= to "
                "a free one on every machine"
            ) from error
        return f"{host}:{probe.getsockname()[1]}"
