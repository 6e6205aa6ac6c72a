"""gate=: which conditions are understood, when they hold, and what is refused."""

from typing import Any

import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored, compare, summarise
from rlhf.evaluation.gates import outcome
from rlhf.evaluation.judge import Judgement
from rlhf.evaluation.systems import Generation, System
from rlhf.gates import parse_gates

OPTIONS = {"num_bootstrap": 200, "seed": 0}
NAMES = ["sft", "ppo"]


def scored(name: str, gold: list[float], *, kl: float) -> Scored:
    rows = [Generation(f"p{i}", "r", [1, 2, 3, 4], ended=i != 0, logprob=0.0) for i in range(len(gold))]
    return Scored(System(name, name, Decoding(8)), rows, None, gold, [kl] * len(gold))


# ppo wins 6, ties 2 and loses 2 of 10: win rate .7, mean difference (6 - 2) / 10
BOTH = [scored("sft", [0.0] * 10, kl=0.0), scored("ppo", [1.0] * 6 + [0.0] * 2 + [-1.0] * 2, kl=2.5)]


def results(text: str) -> list[Any]:
    entries = {each.system.name: summarise(each, reference="sft", **OPTIONS) for each in BOTH}
    judged = {"ppo": Judgement([1.0, 0.5, None], consistent=2, asked=2, unreadable=1, first=1, verdicts=1)}
    report = {"systems": entries, **compare(BOTH, "sft", judged, **OPTIONS)}
    return [outcome(gate, report, BOTH, **OPTIONS) for gate in parse_gates(text, NAMES)]


@pytest.mark.parametrize(
    ("text", "passed", "found"),
    [
        ("win_rate(ppo,sft)>0.6", True, "0.700 ["),
        ("win_rate(ppo, sft) >= .7", True, "0.700 ["),
        ("win_rate(ppo, sft, gold) > 0.7", False, "0.700 ["),
        ("win_rate(sft, ppo) < 0.31", True, "0.300 ["),
        ("win_rate(ppo, sft).low > 0.69", False, "0.700 ["),
        ("difference(ppo, sft) > 0.39", True, "0.400 ["),
        ("difference(ppo, sft).high < 0.5", False, "0.400 ["),
        ("kl(ppo) < 3", True, "2.500 ["),
        ("gold(ppo)>3.9e-1", True, "0.400 ["),
        ("share_ended(ppo) > 0.95", False, "0.900"),
        ("length(ppo) <= 4", True, "4.000"),
        ("proxy(ppo) > -100", False, "not measured"),
        ("win_rate(ppo, sft, proxy) > 0", False, "not measured"),
        ("win_rate(ppo, sft, judge) > 0.74", True, "0.750 ["),
        ("win_rate(sft, ppo, judge) < 0.26", True, "0.250 ["),
    ],
)
def test_a_gate_says_what_holds_and_what_was_found(text: str, passed: bool, found: str) -> None:
    [result] = results(text)
    assert result.passed is passed and result.found.startswith(found) and result.gate == text


def test_several_conditions_are_joined_by_and() -> None:
    assert [each.passed for each in results("kl(ppo) < 3 and kl(ppo) > 3 and gold(sft) < 1")] == [
        True,
        False,
        True,
    ]
    assert parse_gates(None, NAMES) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("win_rate(ppo, sft)", "gate=win_rate(ppo, sft): 'win_rate(ppo, sft) > 0.6'"),
        ("", "is expected"),
        ("winrate(ppo, sft) > 0.5", "did you mean win_rate?"),
        ("win_rate(ppo) > 0.5", "win_rate is of 2 systems"),
        ("kl(ppo, sft) > 0.5", "kl is of 1 systems"),
        ("win_rate(ppo, stf) > 0.5", "did you mean sft? systems are sft, ppo"),
        ("win_rate(ppo, sft, glod) > 0.5", "did you mean gold?"),
        ("judge(ppo) > 0.5", "judge is none of"),
        ("difference(ppo, sft, judge) > 0", "the judge gives no scores; ask for win_rate(ppo, sft, judge)"),
        ("length(ppo).low > 0.5", ".low and .high are ends"),
        ("kl(ppo).mean > 0.5", ".mean"),
        ("kl(ppo) > 1.2.3", "1.2.3 is no number"),
        ("kl(ppo) > 1 and", "is expected"),
        ("__import__('os')", "is expected"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="gate=") as found:
        parse_gates(text, NAMES)
    assert message in str(found.value)
