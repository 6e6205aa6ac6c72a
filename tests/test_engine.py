"""Rows are computed in pieces of like length, each row once, none over the limits."""

import os
import platform
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rlhf.engine import Engine, _check_same_device, find_device
from rlhf.processes import Processes


def engine(rows_at_most: int | None, tokens: int, workers: int) -> Engine:
    return Engine(torch.device("cpu"), torch.float32, rows_at_most, tokens, workers=workers)


LENGTHS = [random.Random(1).randint(1, 700) for _ in range(200)]


@pytest.mark.parametrize("rows_at_most", [None, 1, 3, 64])
@pytest.mark.parametrize("tokens", [512, 16384])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_pieces_hold_every_row_once_in_order_of_length(
    tokens: int, rows_at_most: int | None, workers: int
) -> None:
    pieces = engine(rows_at_most, tokens, workers).micro_batches(LENGTHS)
    order = torch.cat(pieces).tolist()
    assert sorted(order) == list(range(len(LENGTHS)))
    assert [LENGTHS[i] for i in order] == sorted(LENGTHS)
    for piece in pieces:
        padded = len(piece) * max(LENGTHS[i] for i in piece)
        assert len(piece) <= (rows_at_most or len(LENGTHS))
        assert len(piece) == 1 or padded <= tokens


def test_pieces_are_as_full_as_the_limits_allow() -> None:
    def sizes(rows_at_most: int | None, lengths: list[int]) -> list[int]:
        return [len(piece) for piece in engine(rows_at_most, 512, 1).micro_batches(lengths)]

    assert sizes(None, [128] * 10) == [4, 4, 2]
    assert sizes(None, [5120] * 3) == [1, 1, 1]
    assert sizes(2, [1] * 5) == [2, 2, 1]


def test_passes_without_gradients_are_longer_on_a_processor_and_have_no_more_rows_than_allowed() -> None:
    plain, few = (engine(rows, 512, 1).forward_only() for rows in (None, 3))
    assert [len(piece) for piece in plain.micro_batches([128] * 20)] == [16, 4]
    assert [len(piece) for piece in few.micro_batches([128] * 5)] == [3, 2]
    gpu = Engine(torch.device("cuda"), torch.float32, tokens_per_pass=512)
    assert gpu.forward_only() == gpu


NUM_ARENAS = """
import ctypes, tempfile, threading
import torch
from rlhf.config import load_config
from rlhf.engine import build_engine

def count():
    libc, file = ctypes.CDLL(None), tempfile.NamedTemporaryFile()
    libc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return file.read().count(b"<heap nr=")

build_engine(load_config("ppo", ["model=tiny", "data=toy"]).engine, 1)
before, together = count(), threading.Barrier(4)
use = lambda: (together.wait(), torch.ones(1000), together.wait())
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(count() - before)
"""


@pytest.mark.parametrize(("wanted", "more"), [(None, False), ("8", True)])
def test_threads_take_memory_from_one_place_where_nothing_else_is_asked_for(
    wanted: str | None, more: bool
) -> None:
    if platform.libc_ver()[0] != "glibc":
        return  # others have no such places
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment |= {"MALLOC_ARENA_MAX": wanted} if wanted else {}
    found = subprocess.run(
        [sys.executable, "-c", NUM_ARENAS], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout.split()[-1]) > 0) == more


def test_pieces_that_are_not_evened_out_are_the_same_for_any_number_of_workers_and_processes() -> None:
    def pieces(workers: int, count: int) -> list[list[int]]:
        some = Engine(torch.device("cpu"), torch.float32, None, 512, workers=workers)
        some = replace(some, processes=Processes(0, count), evens_out=False)
        return [piece.tolist() for piece in some.micro_batches([80] * 32)]

    assert pieces(1, 1) == pieces(2, 1) == pieces(1, 3)
    assert [len(piece) for piece in pieces(2, 3)] == [6, 6, 6, 6, 6, 2]


def test_every_worker_gets_as_much_as_the_others() -> None:
    def sizes(workers: int, tokens: int, lengths: list[int]) -> list[int]:
        return [len(piece) for piece in engine(None, tokens, workers).micro_batches(lengths)]

    assert sizes(2, 512, [80] * 32) == [5, 5, 6, 5, 5, 6]
    assert sizes(2, 4096, [80] * 32) == [16, 16]
    assert sizes(2, 4096, [10] * 12 + [60, 60]) == [12, 2]
    assert sizes(3, 4096, [80] * 2) == [2], "the rows do not suffice"


def test_a_process_without_a_gpu_beside_one_that_has_one_is_named() -> None:
    _check_same_device(["cuda", "cuda"])
    with pytest.raises(ValueError, match=r"process 2 computes on cpu, process 0 on cuda.*num_processes="):
        _check_same_device(["cuda", "cuda", "cpu"])


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for place in ("torch.cuda.is_available", "torch.backends.mps.is_available"):
        monkeypatch.setattr(place, lambda: False)
    expected = rf"engine.device={name}, but this machine shows no (CUDA|MPS) device; use engine.device=cpu"
    with pytest.raises(ValueError, match=expected):
        find_device(name)
    assert find_device("auto").type == find_device("cpu").type == "cpu"


def test_a_gpu_beyond_those_of_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert find_device("cuda:1").index == 1
    with pytest.raises(ValueError, match=r"engine.device=cuda:2, but this process sees 2 GPUs"):
        find_device("cuda:2")
