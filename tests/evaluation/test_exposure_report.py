"""The comparison over seeds: means, lowest and highest, one table, two plots, failed checks."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored, common_length, compare, summarise
from rlhf.evaluation.exposure import Evidence, PrefixQuality
from rlhf.evaluation.exposure_report import (
    FIRST_COLUMNS,
    combined,
    comparison_table,
    differences_table,
    write_comparison,
)
from rlhf.evaluation.hacking import signals
from rlhf.evaluation.systems import Generation, System
from rlhf.evaluation.tables import exposure_table

OPTIONS = {"num_bootstrap": 200, "seed": 0}
NUM_PROMPTS = 12


def report_of(shift: float) -> dict[str, Any]:
    """A report of two systems, the second `shift` better than the first."""

    def one(name: str, more: float) -> Scored:
        rows = [
            Generation(f"p{i}", f"r{i}", [1, 2, 3, i, 5], ended=True, logprob=-1.0)
            for i in range(NUM_PROMPTS)
        ]
        scores = [i % 5 + more for i in range(NUM_PROMPTS)]
        own, gold = ([[level] * 3] * NUM_PROMPTS for level in (1.0 + more, 1.0))
        evidence = Evidence(
            own, gold, [[-1.0] * 5] * NUM_PROMPTS, None, [PrefixQuality(4, [(0, 0)] * 12, None)]
        )
        near = {"rouge_l": [0.25 + more / 10] * NUM_PROMPTS}
        return Scored(System(name, name, Decoding(8)), rows, scores, scores, [more] * 12, evidence, near)

    systems = [one("sft", 0.0), one("r|l", shift)]
    entries = {each.system.name: summarise(each, reference="sft", **OPTIONS) for each in systems}
    return {
        "name": "x",
        "num_prompts": NUM_PROMPTS,
        "baseline": "sft",
        "reference": "sft",
        "oracle": "base",
        "preferences_simulated": False,
        "notes": [],
        "failed_checks": [],
        "gates": [],
        "seen_prompts": 0,
        "overlap": [],
        "overoptimization": {},
        "judge": None,
        "excess_error_length": common_length(list(entries.values())),
        "systems": entries,
        **compare(systems, "sft", **OPTIONS),
        "signals": {
            each.system.name: signals(each, entries[each.system.name], systems[0]) for each in systems
        },
        "warnings": {"r|l": ["it is <b>"]},
        "verdict": "none",
        "versions": {"torch": "2"},
    }


def test_one_seed_stays_as_it_is() -> None:
    report = report_of(0.5)
    assert combined([report]) == report


def test_numbers_are_means_and_intervals_the_lowest_and_highest_seed() -> None:
    report = combined([report_of(shift) for shift in (0.5, 1.0, 3.0)])
    entry = report["systems"]["r|l"]
    assert entry["gold"]["mean"] == pytest.approx(report["systems"]["sft"]["gold"]["mean"] + 1.5)
    assert entry["gold"]["high"] - entry["gold"]["low"] == pytest.approx(2.5)
    assert (entry["kl"], entry["kl_low"], entry["kl_high"]) == (1.5, 0.5, 3.0)
    assert entry["overlap"]["rouge_l"] == pytest.approx({"mean": 0.4, "low": 0.3, "high": 0.55})
    # own errors 1.5, 2 and 4 times the gold ones
    last = entry["exposure"]["excess_error"][-1]
    assert last["length"] == 3 and last["excess"] == pytest.approx({"mean": 150, "low": 50, "high": 300})
    [rate] = [each for each in report["win_rates"] if each["judge"] == "gold"]
    assert (rate["a"], rate["win_rate"], rate["low"], rate["high"]) == ("r|l", 1.0, 1.0, 1.0)
    [near] = [each for each in report["differences"] if each["judge"] == "rouge_l"]
    assert (near["mean"], near["low"], near["high"]) == pytest.approx((0.15, 0.05, 0.3))


def test_a_judge_that_one_seed_lacks_is_nobodys_else() -> None:
    one, two = report_of(0.5), report_of(1.0)
    assert [each["judge"] for each in one["differences"]] == ["gold", "proxy", "rouge_l"]
    del one["differences"][0]
    del two["systems"]["sft"], one["strengths"]["gold"]
    together = combined([one, two])
    assert list(together["systems"]) == ["r|l"] and list(together["strengths"]) == ["proxy"]
    found = {each["judge"]: each["mean"] for each in together["differences"]}
    assert found == pytest.approx({"proxy": 0.75, "rouge_l": 0.075})


def test_a_mean_without_a_value_in_one_seed_has_no_highest() -> None:
    one, two = ({"mean": mean, "low": low, "high": None} for mean, low in ((None, 3.2), (5.0, 4.0)))
    assert combined([one, two]) == {"mean": None, "low": 5.0, "high": None}
    one, two = ({"kl": kl, "kl_low": kl, "kl_high": kl} for kl in (None, 5.0))
    assert combined([one, two]) == {"kl": None, "kl_low": None, "kl_high": None}


def test_lengths_are_those_that_all_seeds_have(tmp_path: Path) -> None:
    seeds = {}
    for seed, horizon in ((1, 4), (2, 2)):
        report = report_of(seed)
        for entry in report["systems"].values():
            errors = entry["exposure"]["excess_error"]
            entry["exposure"]["excess_error"] = [{**errors[0], "length": n} for n in range(2, horizon + 1)]
        report["excess_error_length"] = horizon
        seeds[seed] = tmp_path / str(seed)
        seeds[seed].mkdir()
        (seeds[seed] / "report.json").write_text(json.dumps(report), encoding="utf-8")
    found = write_comparison(tmp_path / "exposure", seeds, [], "c")
    assert found["excess_error_length"] == 2
    assert [each["length"] for each in found["systems"]["sft"]["exposure"]["excess_error"]] == [2]
    header, _, other = comparison_table(found)
    assert dict(zip(header, other, strict=True))["excess error, %, to 2 tokens"] == "150.00 [100.00, 200.00]"
    lengths = [[{"length": 4, "x": 1.0}, {"length": 8, "x": 3.0}], [{"length": 8, "x": 5.0}]]
    assert combined(lengths) == [{"length": 8, "x": 4.0}]


def test_what_one_seed_lacks_is_missing_and_lists_are_cut() -> None:
    found = combined([{"a": None, "b": [1, 2, 3]}, {"a": 1.0, "b": [3, 4]}])
    assert found == {"a": None, "b": [2, 3]}
    assert combined([{"name": "x", "yes": True}] * 2) == {"name": "x", "yes": True}


def test_one_table_has_everything() -> None:
    report = report_of(0.5)
    header, sft, other = comparison_table(report)
    assert tuple(header[: len(FIRST_COLUMNS)]) == FIRST_COLUMNS
    assert header[len(FIRST_COLUMNS) :] == exposure_table(report)[0][1:]
    row = dict(zip(header, other, strict=True))
    assert row["system"] == "r|l" and row["ROUGE-L"] == "0.30 [0.30, 0.30]"
    assert row["excess error, %, to 3 tokens"] == "50.00 [50.00, 50.00]"
    assert dict(zip(header, sft, strict=True))["wins (gold)"] == "-"
    differences = differences_table(report)
    assert differences[0] == ["system", "gold", "proxy", "ROUGE-L"]
    assert differences[1] == ["r|l", *["+0.500 [+0.500, +0.500]"] * 2, "+0.050 [+0.050, +0.050]"]


@pytest.mark.parametrize("shifts", [(0.5,), (0.5, 1.0)])
def test_the_report_is_written_whole(tmp_path: Path, shifts: tuple[float, ...]) -> None:
    seeds, trained = {}, tmp_path / "run" / "rloo" / "ppo"
    for seed, shift in enumerate(shifts, start=3):
        seeds[seed] = tmp_path / f"seed_{seed}"
        seeds[seed].mkdir()
        (seeds[seed] / "report.json").write_text(json.dumps(report_of(shift)), encoding="utf-8")
    checks = [{"name": f"c{i}", "passed": bool(i), "value": "v", "meaning": "<m>"} for i in range(2)]
    trained.mkdir(parents=True)
    (trained / "stage.json").write_text(json.dumps({"stage": "ppo", "checks": checks}), encoding="utf-8")
    folder = tmp_path / "run" / "exposure"
    report = write_comparison(folder, seeds, [trained], "./launch.sh stage=exposure")
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in ("diversity", "excess_error"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"](plots/{name}.png)" in text
    assert "r\\|l" in text and "failed check: rloo/ppo: c0: v (&lt;m&gt;)" in text and "c1" not in text
    assert ("lowest and the highest seed" in text) == (len(shifts) > 1)
    assert all(str(path / "report.md") in text for path in seeds.values())
    page = (folder / "report.html").read_text(encoding="utf-8")
    warning = "seed 4: it is &lt;b&gt;" if len(shifts) > 1 else "r|l: it is &lt;b&gt;"
    assert (
        warning in page
        and "rloo/ppo" in page
        and "r|l" in page
        and "<script" not in page
        and page.count("<svg") >= 4
    )
