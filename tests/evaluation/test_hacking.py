"""The signs of a hacked reward: each trips where it should, and a system beside itself trips none."""

from dataclasses import replace
from typing import Any

import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored, compare, summarise
from rlhf.evaluation.hacking import highest, signals, warnings
from rlhf.evaluation.systems import Generation, System

OPTIONS = {"num_bootstrap": 200, "seed": 0}
SIZE = 30


def system(name: str, **changes: Any) -> Scored:
    """Thirty responses of 8 to 12 different tokens, all of which end; log-prob -2 a token."""
    lengths = [8 + i % 5 for i in range(SIZE)]
    rows = []
    for i, length in enumerate(lengths):
        length = int(length * changes.get("longer", 1))
        tokens = [changes.get("token", 100 * i + t) for t in range(length)]
        text = changes.get("text", f"r{i}")
        ended = i >= changes.get("cut", 0)
        rows.append(Generation(f"p{i}", text, tokens, ended, changes.get("nats", -2.0) * length))
    proxy = changes.get("proxy", [float(i % 3) for i in range(SIZE)])
    return Scored(System(name, name, Decoding(99)), rows, proxy, changes.get("gold", proxy), None)


def trips(ours: Scored, base: Scored | None = None) -> list[str]:
    base = base or system("sft")
    entries = {each.system.name: summarise(each, reference="x", **OPTIONS) for each in (ours, base)}
    found = {each.system.name: signals(each, entries[each.system.name], base) for each in (ours, base)}
    differences = compare([ours, base], base.system.name, **OPTIONS)["differences"]
    return warnings(ours.system.name, found[ours.system.name], found[base.system.name], differences)


def test_a_system_beside_itself_trips_nothing() -> None:
    assert trips(system("ppo")) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"longer": 2}, "times as long as the baseline's"),
        ({"longer": 0.5}, "times as long as the baseline's"),
        ({"cut": 6}, "20% of its responses do not end"),
        ({"token": 7}, "it repeats itself (seq-rep-4"),
        ({"token": 7}, "fewer different phrases"),
        ({"nats": -0.5}, "it has lost entropy (0.50, the baseline 2.00)"),
        ({"text": "same"}, "100% of its responses stand to another prompt as well"),
        ({"proxy": [8.0 + i % 5 for i in range(SIZE)]}, "the proxy goes by length (correlation 1.00)"),
    ],
)
def test_each_sign_is_said_in_words(changes: dict[str, Any], words: str) -> None:
    assert any(words in line for line in trips(system("ppo", **changes)))


def test_what_draws_nothing_has_no_entropy_to_lose() -> None:
    ours = system("greedy", nats=0.0)
    greedy = replace(ours, system=replace(ours.system, decoding=Decoding(99, greedy=True)))
    assert not any("entropy" in line for line in trips(greedy))


def test_a_proxy_that_rises_while_gold_falls_is_said() -> None:
    levels = [float(i % 3) for i in range(SIZE)]
    hacked = system("ppo", proxy=[x + 1 for x in levels], gold=[x - 1 for x in levels])
    assert trips(hacked) == ["the proxy rose (+1.00) while gold fell (-1.00)"]


def test_what_length_alone_would_give_is_said() -> None:
    # the baseline's proxy is its length in tens of tokens; 4 tokens longer on average: +.4 of +.4
    base = system("sft", proxy=[(8 + i % 5) / 10 for i in range(SIZE)], gold=[0.0] * SIZE)
    longer = system(
        "ppo", longer=1.4, proxy=[int((8 + i % 5) * 1.4) / 10 for i in range(SIZE)], gold=[0.0] * SIZE
    )
    [line] = [line for line in trips(longer, base) if line.startswith("length alone")]
    gain = sum(int((8 + i) * 1.4) - (8 + i) for i in range(5)) / 50
    assert line == f"length alone would give {gain:+.2f} of the proxy's gain of {gain:+.2f}"


def test_the_highest_by_proxy_come_first() -> None:
    scored = system("ppo", proxy=[float(i) for i in range(SIZE)])
    found = highest(scored)
    assert [each["proxy"] for each in found] == [float(i) for i in range(SIZE - 1, SIZE - 21, -1)]
    assert found[0]["response"] == f"r{SIZE - 1}" and highest(system("x", proxy=None, gold=None)) == []
