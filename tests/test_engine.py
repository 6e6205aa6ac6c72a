"""Rows are computed in pieces of like length, each row once, none over the limits."""

import random

import pytest
import torch

from rlhf.engine import TOKENS_PER_PASS, Engine

LENGTHS = [random.Random(1).randint(1, 700) for _ in range(200)]


@pytest.mark.parametrize("rows_at_most", [None, 1, 3, 64])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pieces_hold_every_row_once_in_order_of_length(device: str, rows_at_most: int | None) -> None:
    pieces = Engine(torch.device(device), torch.float32, rows_at_most).micro_batches(LENGTHS)
    order = torch.cat(pieces).tolist()
    assert sorted(order) == list(range(len(LENGTHS)))
    assert [LENGTHS[i] for i in order] == sorted(LENGTHS)
    for piece in pieces:
        padded = len(piece) * max(LENGTHS[i] for i in piece)
        assert len(piece) <= (rows_at_most or len(LENGTHS))
        assert len(piece) == 1 or padded <= TOKENS_PER_PASS[device]


def test_pieces_are_as_full_as_the_limits_allow() -> None:
    engine = Engine(torch.device("cpu"), torch.float32)
    assert [len(piece) for piece in engine.micro_batches([TOKENS_PER_PASS["cpu"] // 4] * 10)] == [4, 4, 2]
    assert [len(piece) for piece in engine.micro_batches([10 * TOKENS_PER_PASS["cpu"]] * 3)] == [1, 1, 1]
    assert [len(piece) for piece in Engine(engine.device, engine.dtype, 2).micro_batches([1] * 5)] == [
        2,
        2,
        1,
    ]
