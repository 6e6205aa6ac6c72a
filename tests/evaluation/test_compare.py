"""Comparisons: a system against itself, swapped order, KL, and the sentence that sums it up."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored, compare, main_system, summarise, verdict
from rlhf.evaluation.systems import Generation, System

OPTIONS = {"num_bootstrap": 300, "seed": 0}


def scored(name: str, gold: list[float] | None, **more: Any) -> Scored:
    decoding = Decoding(8, **more.pop("decoding", {}))
    system = System(name, more.pop("path", name), decoding, more.pop("best_of", 1))
    texts = more.pop("tokens", [[1, 2, 3]] * 4)
    generations = [Generation("p", "r", tokens, ended=i > 0, logprob=-1.0) for i, tokens in enumerate(texts)]
    return Scored(system, generations, more.pop("proxy", None), gold, more.pop("log_ratios", None))


def report_of(*systems: Scored, baseline: str, reference: str = "none") -> dict[str, Any]:
    entries = {s.system.name: summarise(s, reference=reference, **OPTIONS) for s in systems}
    told = {"num_prompts": 100, "warnings": {}, "overoptimization": {}}
    return {"systems": entries, "baseline": baseline, **told, **compare(systems, baseline, **OPTIONS)}


def test_a_system_against_its_equal_wins_half() -> None:
    report = report_of(scored("a", [1.0, 2.0, 3.0, 4.0]), scored("b", [1.0, 2.0, 3.0, 4.0]), baseline="b")
    (rate,) = report["win_rates"]
    assert (rate["win_rate"], rate["low"], rate["high"]) == (0.5, 0.5, 0.5)
    assert (rate["wins"], rate["ties"], rate["losses"]) == (0, 4, 0)
    assert report["differences"][0]["mean"] == 0


def test_swapped_order_gives_the_complement() -> None:
    a, b = scored("a", [1.0, 5.0, 3.0, 4.0]), scored("b", [2.0, 2.0, 3.0, 1.0])
    (ours,), (theirs,) = (compare([a, b], name, **OPTIONS)["win_rates"] for name in ("b", "a"))
    # wins: 5 > 2 and 4 > 1; tie: 3 = 3; loss: 1 < 2; (2 + 1/2) / 4
    assert (ours["wins"], ours["ties"], ours["losses"], ours["win_rate"]) == (2, 1, 1, 0.625)
    assert (theirs["a"], theirs["b"]) == ("b", "a")
    assert (theirs["wins"], theirs["ties"], theirs["losses"]) == (1, 1, 2)
    assert theirs["win_rate"] == pytest.approx(1 - ours["win_rate"])
    assert theirs["low"] == pytest.approx(1 - ours["high"])


def test_the_win_rate_at_equal_length_goes_by_characters() -> None:
    def system(name: str, lengths: list[int]) -> Scored:
        rows = [Generation("p", "x" * length, [1, 2], ended=True, logprob=-1.0) for length in lengths]
        golds = [float(length) for length in lengths]
        return Scored(System(name, name, Decoding(8)), rows, None, golds, None)

    longer = [5, 6, 7, 8, 7, 8] * 10  # the judge goes by length alone
    (rate,) = compare([system("a", longer), system("b", [6] * 60)], "b", **OPTIONS)["win_rates"]
    assert rate["win_rate"] == 0.75
    assert rate["length_controlled"]["mean"] == pytest.approx(0.5, abs=0.1)


def test_only_judges_that_there_are_are_asked() -> None:
    both = [scored(name, [1.0] * 4, proxy=[2.0] * 4) for name in "ab"]
    assert [rate["judge"] for rate in compare(both, "a", **OPTIONS)["win_rates"]] == ["gold", "proxy"]
    alone = [scored(name, None, proxy=[2.0] * 4) for name in "ab"]
    assert [rate["judge"] for rate in compare(alone, "a", **OPTIONS)["win_rates"]] == ["proxy"]


def test_summary_by_hand() -> None:
    tokens = [[1, 2, 3, 1, 2], [1], [1, 2, 3, 4, 1, 2, 3, 4], [5, 6]]
    entry = summarise(scored("a", [1.0, 2.0, 3.0, 6.0], tokens=tokens), reference="x", **OPTIONS)
    assert entry["gold"]["mean"] == 3.0 and entry["proxy"] is None
    assert entry["length"] == 4.0  # (5 + 1 + 8 + 2) / 4
    assert entry["share_ended"] == 0.75
    # 4-grams: 2 of 2 differ; none; 4 of 5 differ (1234 twice); none. (0 + 0 + 1/5 + 0) / 4
    assert entry["rep_4"] == pytest.approx(0.05)
    assert entry["kl"] is None and not entry["kl_is_bound"]


def test_kl_is_the_mean_log_ratio_of_own_samples() -> None:
    entry = summarise(scored("a", None, log_ratios=[0.0, 1.0, 2.0, 5.0]), reference="x", **OPTIONS)
    assert entry["kl"] == 2.0 and entry["kl_low"] < 2.0 < entry["kl_high"]
    same = summarise(scored("a", None, log_ratios=[0.0] * 4), reference="a", **OPTIONS)
    assert (same["kl"], same["kl_low"], same["kl_high"]) == (0.0, 0.0, 0.0)


def test_best_of_n_of_the_reference_has_its_bound_and_of_another_policy_no_kl() -> None:
    best = scored("best", None, path="sft", best_of=4, log_ratios=[9.0] * 4)
    entry = summarise(best, reference="sft", **OPTIONS)
    assert entry["kl"] == pytest.approx(0.636294) and entry["kl_is_bound"]  # ln 4 - 3/4
    entry = summarise(best, reference="another", **OPTIONS)
    assert entry["kl"] is None and not entry["kl_is_bound"]


@pytest.mark.parametrize("decoding", [{"min_p": 0.1}, {"num_beams": 4}, {"no_repeat_ngram_size": 3}])
def test_best_of_n_that_is_not_drawn_from_the_reference_has_no_bound(decoding: dict[str, Any]) -> None:
    best = scored("best", None, path="sft", best_of=4, decoding=decoding)
    entry = summarise(best, reference="sft", **OPTIONS)
    assert entry["kl"] is None and not entry["kl_is_bound"]


@pytest.mark.parametrize(
    ("ppo", "words"),
    [
        ([4.0, 5.0, 6.0, 7.0], "ppo is better than sft by the gold scorer: +3.00"),
        ([-2.0, -1.0, 0.0, 1.0], "ppo is WORSE than sft"),
        ([1.0, 2.0, 3.0, 4.0], "ppo cannot be told from sft"),
    ],
)
def test_the_verdict_says_better_worse_or_unknown(ppo: list[float], words: str) -> None:
    sft = scored("sft", [1.0, 2.0, 3.0, 4.0])
    trained = scored("ppo", ppo, log_ratios=[1.5] * 4)
    found = verdict(report_of(trained, sft, baseline="sft"))
    assert words in found and "KL of 1.50 nats" in found


def test_the_verdict_without_ppo_is_on_the_last_of_the_others() -> None:
    systems = [scored(name, [value] * 4) for name, value in (("a", 1.0), ("b", 3.0), ("base", 2.0))]
    assert verdict(report_of(*systems, baseline="base")).startswith("b is better than base")


def test_the_verdict_is_on_the_checkpoint_that_gold_prefers() -> None:
    systems = [scored(name, [value] * 4) for name, value in (("sft", 1.0), ("run_8", 3.0), ("run", 2.0))]
    points = [
        {"system": name, "update": update, "gold": {"mean": gain}}
        for name, update, gain in (("run_8", 8, 2.0), ("run", 16, 1.0))
    ]
    report = report_of(*systems, baseline="sft") | {"overoptimization": {"run": {"points": points}}}
    assert main_system(report) == "run_8" and verdict(report).startswith("run_8")
    assert "run_8, which gold prefers on these prompts, is better than sft" in verdict(report)
    assert main_system(report | {"overoptimization": {}}) == "run"
    best_of = {"overoptimization": {"run": {"points": [point | {"update": None} for point in points]}}}
    assert verdict(report | best_of).startswith("run is better than sft"), "the last one, whom nobody chose"
    assert main_system(report | {"baseline": "run_8"}) == "run"


def test_the_verdict_is_held_back_by_few_prompts_and_tells_of_judges_and_signs() -> None:
    sft, ppo = scored("sft", [1.0, 2.0, 3.0, 4.0]), scored("ppo", [4.0, 5.0, 6.0, 7.0])
    report = report_of(sft, ppo, baseline="sft")
    assert verdict(report | {"num_prompts": 1}) == "1 prompt: too few to tell ppo from sft."
    assert verdict(report | {"num_prompts": 9}) == "9 prompts: too few to tell ppo from sft."
    judged = {"a": "ppo", "b": "sft", "judge": "judge", "win_rate": 0.25, "low": 0.1, "high": 0.4}
    judged |= {"wins": 1, "ties": 0, "losses": 3}
    told = report | {"win_rates": [*report["win_rates"], judged], "warnings": {"ppo": ["a", "b"]}}
    assert verdict(told).endswith("Signs of degenerate text, which the report names: 2."), "no reward at all"
    told["proxy"] = "a reward model"
    assert verdict(told) == (
        "ppo is better than sft by the gold scorer: +3.00 [+3.00, +3.00]. By the judge: win rate 0.25 "
        "[0.10, 0.40]. Signs of a hacked reward, which the report names: 2."
    )
    by_judge = told | {"differences": [], "win_rates": [judged]}
    assert verdict(by_judge) == "The judge gave too few verdicts to tell ppo from sft."


def test_the_verdict_needs_a_gold_scorer_and_another_system() -> None:
    systems = [scored(name, None, proxy=[1.0] * 4) for name in ("sft", "ppo")]
    assert verdict(report_of(*systems, baseline="sft")).startswith("No gold scorer: whether ppo is better")
    alone = report_of(scored("sft", [1.0] * 4), baseline="sft")
    assert verdict(alone) == "sft alone: there is no other system to compare it with."


def test_a_prompt_with_several_references_is_asked_once(tmp_path: Path) -> None:
    from stages.common import Stage
    from stages.evaluate import read_prompts

    rows = [{"prompt": f"p{i % 3}", "reference": f"r{i}"} for i in range(6)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [
        "model=tiny",
        "data=toy",
        f"runs={tmp_path}/runs",
        f"data.prompts.evaluate={file}",
        "num_prompts=2",
    ]
    prompts, all_rows = read_prompts(Stage("evaluate", words))
    assert [(each.prompt, each.reference) for each in prompts] == [("p0", "r0"), ("p1", "r1")]
    assert [each.reference for each in all_rows] == ["r0", "r1", "r3", "r4"]
