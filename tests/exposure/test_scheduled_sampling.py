"""Scheduled sampling: the schedules' known numbers, what stands in the mixture, and what cannot change it."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config import load_config
from rlhf.exposure.scheduled_sampling import ScheduledSampling, gold_share, slope

SCHEDULES = ("linear", "exponential", "inverse_sigmoid")

# .9997^1000 = exp(1000 ln .9997) = exp(-.300045); 1000 / (1000 + e) and 1000 / (1000 + exp(10)).
KNOWN = [
    ("exponential", 0.9997, 1000, 0.740785),
    ("exponential", 0.9997, 10000, 0.049765),
    ("inverse_sigmoid", 1000, 1000, 0.997289),
    ("inverse_sigmoid", 1000, 10000, 0.043428),
    ("linear", 0.001, 400, 0.6),
    ("linear", 0.001, 2000, 0.0),
]

VOCABULARY, LENGTH = 11, 8
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]])
FIRST = 3  # of the response
PLACES = (torch.arange(2).repeat_interleave(LENGTH - FIRST), torch.arange(FIRST, LENGTH).repeat(2))


def sampling(*, replacement: str = "argmax", passes: int = 1, **more: Any) -> ScheduledSampling:
    settings = {"schedule": "linear", "k": None, "end": 0.25, **more}
    return ScheduledSampling(SimpleNamespace(replacement=replacement, passes=passes, **settings), seed=3)


def predict(inputs: Tensor) -> Tensor:
    """Logits (N, V) that hang on the tokens before each place, the last of them most of all."""
    weights = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    sums = 0.5 * weights[inputs].cumsum(1) + weights[inputs]
    return sums[PLACES[0], PLACES[1] - 1]


@pytest.mark.parametrize(("schedule", "k", "step", "share"), KNOWN)
def test_schedules_have_their_known_values(schedule: str, k: float, step: int, share: float) -> None:
    assert gold_share(schedule, step, k=k) == pytest.approx(share, abs=1e-6)


def test_schedules_have_the_golden_values(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text(encoding="utf-8"))["scheduled_sampling"]
    for schedule in ("exponential", "inverse_sigmoid"):
        case = golden[schedule]
        found = [gold_share(schedule, step, k=case["k"]) for step in case["at"]]
        assert found == pytest.approx(case["eps"], abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 30, 5000])
@pytest.mark.parametrize("end", [0.05, 0.25, 0.9])
def test_a_schedule_without_k_falls_to_its_end_with_the_last_step(
    schedule: str, steps: int, end: float
) -> None:
    one = sampling(schedule=schedule, end=end)
    shares = [one.gold_share(step, steps) for step in range(steps)]
    assert shares[-1] == pytest.approx(end, abs=1e-6)
    assert all(later < earlier for earlier, later in itertools.pairwise(shares))
    k = slope(schedule, end=end, steps=steps - 1)
    # by the definitions, where the number is not too large to be written down
    expected = {"linear": 1.0, "exponential": 1.0, "inverse_sigmoid": k / (k + 1)}
    assert shares[0] == pytest.approx(expected[schedule])


def test_steps_too_many_for_an_exponential_function_give_no_gold() -> None:
    assert gold_share("inverse_sigmoid", 1e6, k=1.0) == 0.0
    assert gold_share("exponential", 1e6, k=0.5) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_falls_below_its_end(schedule: str) -> None:
    one = sampling(schedule=schedule, k=0.5 if schedule != "inverse_sigmoid" else 2.0, end=0.2)
    assert one.gold_share(50, 1000) == 0.2
    assert one.gold_share(0, 1) > 0.6, "a run of one step"


def test_a_linear_schedule_with_a_k_stops_at_its_end() -> None:
    one = sampling(k=0.1, end=0.3)
    assert [one.gold_share(step, 1000) for step in (0, 5, 7, 500)] == pytest.approx([1.0, 0.5, 0.3, 0.3])


@pytest.mark.parametrize("replacement", ["argmax", "sample"])
def test_without_gold_every_response_token_is_the_prediction_before_it(replacement: str) -> None:
    one = sampling(replacement=replacement)
    draws = one.draws(1, 2, LENGTH)
    mixed = one.mixed(predict, TOKENS, PLACES, draws, 0.0)
    assert torch.equal(mixed[:, :FIRST], TOKENS[:, :FIRST]), "prompts stay"
    logits = predict(TOKENS)
    if replacement == "argmax":
        expected = logits.argmax(-1)
    else:  # the first token whose cumulative probability is above the place's number
        cumulative = logits.double().softmax(-1).cumsum(-1)
        expected = (cumulative <= draws[PLACES][:, 1:]).sum(-1)
    assert torch.equal(mixed[PLACES], expected)


def test_with_gold_alone_nothing_changes() -> None:
    one = sampling()
    assert torch.equal(one.mixed(predict, TOKENS, PLACES, one.draws(1, 2, LENGTH), 1.0), TOKENS)


@pytest.mark.parametrize("replacement", ["argmax", "sample"])
def test_as_many_passes_as_tokens_are_sequential_scheduled_sampling(replacement: str) -> None:
    """Bengio's own loop: token after token, each predicted after the mixture that stands before it."""
    length = LENGTH - FIRST
    one = sampling(replacement=replacement, passes=length)
    draws = one.draws(1, 2, LENGTH)
    mixed = one.mixed(predict, TOKENS, PLACES, draws, 0.4)
    expected = TOKENS.clone()
    for column in range(FIRST, LENGTH):
        logits = predict(expected).view(2, length, VOCABULARY)[:, column - FIRST]
        chosen = logits.argmax(-1)
        if replacement == "sample":
            chosen = (logits.double().softmax(-1).cumsum(-1) <= draws[:, column, 1:]).sum(-1)
        expected[:, column] = torch.where(draws[:, column, 0] < 0.4, TOKENS[:, column], chosen)
    assert torch.equal(mixed, expected)
    once = sampling(replacement=replacement).mixed(predict, TOKENS, PLACES, draws, 0.4)
    assert not torch.equal(once, expected), "a single pass predicts after gold"


def test_shares_are_kept_and_replacements_follow_the_model() -> None:
    rows, share = 4000, 0.3
    tokens = torch.zeros(rows, 2, dtype=torch.long)
    places = (torch.arange(rows), torch.ones(rows, dtype=torch.long))
    probabilities = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05])  # never the gold token
    one = sampling(replacement="sample")
    mixed = one.mixed(
        lambda inputs: probabilities.log().expand(rows, -1), tokens, places, one.draws(1, rows, 2), share
    )
    counts = torch.bincount(mixed[:, 1], minlength=5).double()
    expected = rows * ((1 - share) * probabilities.double() + torch.tensor([share, 0, 0, 0, 0]))
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.47, "4 degrees of freedom, p = .001"


def test_a_rows_numbers_hang_on_nothing_but_seed_step_and_place() -> None:
    whole = sampling().draws(5, 4, 9)
    parts = sampling()
    pieces = [parts.draws(5, 1, 9), parts.draws(5, 3, 6)]  # micro-batches with another padding
    assert torch.equal(whole[:1], pieces[0]) and torch.equal(whole[1:, :6], pieces[1])
    assert torch.equal(parts.draws(6, 1, 9), sampling().draws(6, 1, 9)), "a step begins with row 0 again"
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], sampling().draws(6, 1, 9)[0])
    other = ScheduledSampling(sampling().settings, seed=4)
    assert not torch.equal(whole, other.draws(5, 4, 9))
    assert math.isclose(float(whole.mean()), 0.5, abs_tol=0.2) and whole.min() >= 0 and whole.max() < 1


@pytest.mark.parametrize("name", ["linear", "exponential", "inverse_sigmoid"])
def test_an_end_of_one_is_plain_for_every_schedule(name: str) -> None:
    words = ["exposure=scheduled_sampling", f"exposure.schedule={name}", "exposure.end=1"]
    settings = load_config("sft", [*words, "model=tiny", "data=toy"]).exposure
    one = ScheduledSampling(settings, seed=3)
    assert {one.gold_share(step, 10) for step in range(10)} == {1.0}
