"""One stage as several processes on this machine, ended together where one of them fails."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlhf.checkpoint import StageFolder
from rlhf.config import PROJECT_DIR
from rlhf.gates import GATE_STATUS
from rlhf.processes import ADDRESS, COUNT, LOCAL_RANK, RANK
from rlhf.sources import nearest_existing

ENTRY_POINT = PROJECT_DIR / "stages" / "__main__.py"
DEFAULT_PORT = 29500
SEVERAL_MACHINES = ("hostfile", "main_address", "main_port", "machine_rank")
HOST = re.compile(r"(\S+)\s+slots=([1-9]\d*)")
SECONDS_TO_END = 20.0  # that processes get after a signal before they are killed


@dataclass(frozen=True)
class Place:
    """Which of all processes run on this machine: `here` of `count`, from rank `first` on."""

    count: int
    here: int
    first: int
    host: str | None  # of the first process, where there are several machines

    @property
    def is_several_machines(self) -> bool:
        return self.here < self.count


def place_of(config: Any) -> Place:
    """How many processes the settings ask for, and which of them are this machine's.

    Raises ValueError where the settings do not fit one another.
    """
    asked = config.num_processes
    if config.engine.name == "single":
        given = {"num_processes": (asked or 1) > 1, "num_machines": config.num_machines > 1}
        given |= {key: bool(getattr(config, key)) for key in SEVERAL_MACHINES}
        for key in (key for key, several in given.items() if several):
            raise ValueError(f"{key}={getattr(config, key)} needs several processes: set engine=ddp or zero2")
        return Place(1, 1, 0, None)
    if config.hostfile is not None:
        return _place_in(config.hostfile, config)
    if asked is None:
        raise ValueError(f"engine={config.engine.name}: give num_processes=, of all machines together")
    if asked % config.num_machines:
        raise ValueError(f"num_processes={asked} is no multiple of num_machines={config.num_machines}")
    if config.machine_rank >= config.num_machines:
        raise ValueError(
            f"machine_rank={config.machine_rank} of num_machines={config.num_machines}: they count from 0"
            + ("; give num_machines= too" if config.num_machines == 1 else "")
        )
    if config.num_machines > 1 and config.main_address is None:
        raise ValueError(f"num_machines={config.num_machines}: give main_address=, the address of machine 0")
    if config.main_address is not None:
        _check_known(config.main_address, f"main_address={config.main_address}")
    here = asked // config.num_machines
    return Place(asked, here, config.machine_rank * here, config.main_address)


def _place_in(hostfile: str, config: Any) -> Place:
    """The place of this machine in a file of lines `host slots=N`, the first host being machine 0."""
    if config.num_processes is not None or config.num_machines > 1 or config.main_address is not None:
        raise ValueError("hostfile= says how many processes and machines there are: leave the other keys out")
    hosts = _hosts_in(hostfile)
    own = _own_names()
    mine = [index for index, (host, _) in enumerate(hosts) if host in own or _address_of(host) in own]
    if len(mine) != 1:
        raise ValueError(
            f"hostfile={hostfile} names this machine {len(mine)} times; it is known as "
            f"{', '.join(sorted(own))}"
        )
    _check_known(hosts[0][0], f"hostfile={hostfile}: the first host, {hosts[0][0]},")
    slots = [count for _, count in hosts]
    return Place(sum(slots), slots[mine[0]], sum(slots[: mine[0]]), hosts[0][0])


def _hosts_in(hostfile: str) -> list[tuple[str, int]]:
    """The hosts of a file with the number of processes of each."""
    path = Path(hostfile).expanduser()
    if not path.exists():
        raise ValueError(f"hostfile={hostfile}: no such file{nearest_existing(path)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(
            f"hostfile={hostfile} cannot be read ({why}): give a file of lines `host slots=N`"
        ) from error
    hosts: list[tuple[str, int]] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            found = HOST.fullmatch(text)
            if found is None:
                raise ValueError(
                    f"hostfile={path}:{number}: {text[:60]!r}; host slots=<number of processes> is expected"
                )
            hosts.append((found[1], int(found[2])))
    return hosts


def _own_names() -> set[str]:
    addresses = {each.address for known in psutil.net_if_addrs().values() for each in known}
    return {socket.gethostname(), socket.getfqdn(), *(each for each in addresses if "." in each)}


def _check_known(host: str, said: str) -> None:
    if _address_of(host) is None:
        raise ValueError(f"{said} leads to no address: give the IP address of machine 0")


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def launch(stage: str, words: list[str], config: Any) -> int:
    """Run a stage as this machine's share of all processes; return the status a shell would."""
    place = place_of(config)
    command = [sys.executable, str(ENTRY_POINT), f"stage={stage}", *words]
    children = start(command, place, config.main_port, start_new_session=True)

    def forward(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        while not any(child.poll() for child in children) and any(c.poll() is None for c in children):
            time.sleep(0.05)
        folder = StageFolder(config.runs, config.name, stage)
        return _ending(children, place, saved=folder.latest_state() is not None)
    finally:
        end(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def start(command: list[str], place: Place, main_port: int | None, **how: Any) -> list[Any]:
    """Start a command as this machine's processes, which join those of the others; `how`: as in Popen."""
    address = _address(place, main_port)
    path = os.pathsep.join(filter(None, [str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]))
    common = {COUNT: str(place.count), ADDRESS: address, "PYTHONPATH": path}
    common["OMP_NUM_THREADS"] = threads_each(place.here)
    own = [
        {RANK: str(place.first + local), LOCAL_RANK: str(local), "CUDA_VISIBLE_DEVICES": gpu_of(local)}
        for local in range(place.here)
    ]
    return [subprocess.Popen(command, env={**os.environ, **common, **each}, **how) for each in own]


def _ending(children: list[subprocess.Popen[bytes]], place: Place, *, saved: bool) -> int:
    """The status of the process that ended first, with a word on it where it could say none itself."""
    local, status = next(
        ((i, child.returncode) for i, child in enumerate(children) if child.returncode), (0, 0)
    )
    if status < 0 or status not in (0, 2, GATE_STATUS, 130):
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        then = " What was saved before is good: resume=true goes on from there" if saved else ""
        print(
            f"error: process {place.first + local} of {place.count} {how}; the others were ended too.{then}",
            file=sys.stderr,
        )
    return status if status >= 0 else 128 - status


def end(children: list[subprocess.Popen[bytes]]) -> None:
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


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(here: int) -> str:
    """OMP_NUM_THREADS of each process of this machine: as set, else its share of the cores."""
    return os.environ.get("OMP_NUM_THREADS", str(max(1, _num_cores() // here)))


def gpu_of(local: int) -> str:
    """CUDA_VISIBLE_DEVICES of a process of this machine: one GPU, or none where there are no more."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return str(local)
    visible = named.split(",")
    return visible[local] if local < len(visible) else ""


def _address(place: Place, main_port: int | None) -> str:
    """host:port where the first process waits for the others; on one machine any free port will do."""
    several = place.is_several_machines
    host, port = place.host or "127.0.0.1", main_port or (DEFAULT_PORT if several else 0)
    if place.first > 0:
        return f"{host}:{port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if several else host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"main_address={host} is not an address of this machine, which is the only one: leave it "
                    "out, or give num_machines="
                ) from error
            raise ValueError(
                f"main_port={port} cannot be used ({error.strerror}): end what uses it, or set main_port= to "
                "a free one on every machine"
            ) from error
        return f"{host}:{probe.getsockname()[1]}"
