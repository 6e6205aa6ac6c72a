"""Passes side by side: the results and errors of passes one after the other."""

import threading

import pytest
import torch
from torch import Tensor, nn

from rlhf.workers import side_by_side

LAYER = nn.Linear(5, 3)
INPUTS = [torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)) for rows in (4, 1, 7, 2, 3)]


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert side_by_side(lambda x: x * x, list(range(7)), workers=workers) == [x * x for x in range(7)]
    assert side_by_side(lambda x: x, [], workers=workers) == []


def test_every_worker_has_a_thread_and_its_share_of_torchs() -> None:
    before = torch.get_num_threads()
    barrier = threading.Barrier(2, timeout=60)

    def seen(_: int) -> tuple[int, int]:
        barrier.wait()
        return threading.get_ident(), torch.get_num_threads()

    torch.set_num_threads(4)
    try:
        (here, share), (there, other_share) = side_by_side(seen, [0, 1], workers=2)
        assert here == threading.get_ident() != there
        assert share == other_share == 2 and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gradients", [True, False])
def test_gradient_mode_and_autocast_of_the_caller_hold_in_every_thread(gradients: bool) -> None:
    def state(x: Tensor) -> tuple[bool, torch.dtype]:
        return LAYER(x).requires_grad, LAYER(x).dtype

    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.bfloat16):
        assert side_by_side(state, INPUTS, workers=2) == [(gradients, torch.bfloat16)] * 5
    assert side_by_side(state, INPUTS, workers=2) == [(True, torch.float32)] * 5


def test_an_error_of_any_thread_is_raised_after_all_have_ended() -> None:
    ended: list[int] = []

    def function(x: int) -> None:
        if x == 1:
            raise ValueError("the second one")
        ended.append(x)

    with pytest.raises(ValueError, match="the second one"):
        side_by_side(function, [0, 1, 2], workers=2)
    assert ended == [0, 2]
    before = torch.get_num_threads()
    assert side_by_side(str, [0, 1], workers=2) == ["0", "1"] and torch.get_num_threads() == before


def test_weights_are_rounded_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    clear = torch.clear_autocast_cache

    def note() -> None:
        cleared.append(1)
        clear()

    monkeypatch.setattr(torch, "clear_autocast_cache", note)

    def function(x: Tensor) -> None:
        y = LAYER(x)
        with torch.autocast("cpu", enabled=False):
            y.float().sum().backward()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        side_by_side(function, INPUTS, workers=2)
        assert not cleared
    assert cleared == [1]
