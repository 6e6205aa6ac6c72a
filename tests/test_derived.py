"""Weights are rounded once for passes that share them, and anew after they have changed."""

import torch

from rlhf.derived import rounded, unchanged_weights
from rlhf.engine import Engine
from rlhf.workers import side_by_side

WEIGHT = torch.linspace(-1, 1, 12).view(4, 3)


def test_inside_the_scope_there_is_one_copy_for_all_threads() -> None:
    with unchanged_weights():
        copies = side_by_side(lambda _: rounded(WEIGHT, torch.bfloat16), range(4), workers=2)
        assert copies[0].equal(WEIGHT.bfloat16()) and all(copy is copies[0] for copy in copies)
        with unchanged_weights():
            assert rounded(WEIGHT, torch.bfloat16) is copies[0]
        assert rounded(WEIGHT, torch.bfloat16) is copies[0]
        assert rounded(WEIGHT, torch.float32) is WEIGHT
        part, other = rounded(WEIGHT[:2], torch.bfloat16), rounded(WEIGHT, torch.float16)
        assert part.shape == (2, 3) and other.dtype == torch.float16


def test_a_weight_that_changed_between_two_scopes_is_rounded_anew() -> None:
    weight, engine = WEIGHT.clone(), Engine(torch.device("cpu"), torch.bfloat16)
    for _ in range(2):
        with engine.autocast():
            assert rounded(weight, torch.bfloat16).equal(weight.bfloat16())
        assert rounded(weight, torch.bfloat16).equal(weight.bfloat16())
        weight.neg_()


def test_memory_that_another_weight_takes_over_does_not_bring_back_an_older_copy() -> None:
    with unchanged_weights():
        for value in range(20):  # each is freed at once but for what the scope holds
            assert rounded(torch.full((64, 64), float(value)), torch.bfloat16)[0, 0] == value
