"""Over-optimisation: the forms and their fit, the curves, and what is said where gold has turned."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored, summarise
from rlhf.evaluation.overoptimization import curves, fit, predicted, preferred, warnings
from rlhf.evaluation.plots import plot_overoptimization, saved
from rlhf.evaluation.report import overoptimization_section
from rlhf.evaluation.systems import Generation, System
from rlhf.evaluation.tables import curves_table

OPTIONS = {"num_bootstrap": 200, "seed": 0}
KLS = np.array([0.25, 1.0, 4.0, 9.0, 16.0])
RNG = np.random.default_rng(5)


def rows(means: Any, *, prompts: int = 40, noise: float = 0.0, rng: np.random.Generator = RNG) -> Any:
    """Rows (P, K) with these means; noise adds to both mean and rows."""
    return np.asarray(means) + noise * rng.standard_normal((prompts, len(means)))


def test_the_forms_are_those_of_the_paper() -> None:
    # d = 2: 2 (3 - .5 * 2) = 4 and 2 (3 - .5 ln 2) = 5.306853
    assert predicted([2.0], 3.0, 0.5, "best_of_n") == pytest.approx([4.0])
    assert predicted([2.0], 3.0, 0.5, "rl") == pytest.approx([6 - math.log(2)])
    for form in ("best_of_n", "rl"):
        assert predicted([0.0], 3.0, 0.5, form) == pytest.approx([0.0])


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.4), (1.0, 0.9), (3.0, 0.1)])
def test_a_curve_of_the_form_is_found_again(form: str, alpha: float, beta: float) -> None:
    found = fit(rows(predicted(np.sqrt(KLS), alpha, beta, form)), rows(KLS), form, **OPTIONS)
    assert found is not None
    assert found["alpha"]["mean"] == pytest.approx(alpha) and found["beta"]["mean"] == pytest.approx(beta)
    assert found["left"] == pytest.approx(0, abs=1e-9)
    steps = np.linspace(0, 40, 400_001)
    heights = predicted(steps, alpha, beta, form)
    if steps[heights.argmax()] < 40:
        assert found["highest_kl"]["mean"] == pytest.approx(steps[heights.argmax()] ** 2, rel=1e-3)
        assert found["highest_gain"]["mean"] == pytest.approx(heights.max(), rel=1e-6)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_the_interval_of_a_fit_covers_the_truth(form: str) -> None:
    rng, covered = np.random.default_rng(1), np.zeros(2)
    truth, sets = (1.5, 0.3), 300
    means = predicted(np.sqrt(KLS), *truth, form)
    for number in range(sets):
        found = fit(
            rows(means, prompts=80, noise=1.0, rng=rng),
            rows(KLS, prompts=80, noise=0.5, rng=rng),
            form,
            num_bootstrap=300,
            seed=number,
        )
        assert found is not None
        covered += [
            found[name]["low"] <= value <= found[name]["high"]
            for name, value in zip(("alpha", "beta"), truth, strict=True)
        ]
    assert (covered / sets >= 0.915).all() and (covered / sets <= 0.985).all(), covered / sets


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_a_curve_that_only_rises_has_no_highest_place(form: str) -> None:
    found = fit(rows(predicted(np.sqrt(KLS), 1.0, -0.2, form)), rows(KLS), form, **OPTIONS)
    assert found is not None and found["beta"]["mean"] == pytest.approx(-0.2)
    assert found["highest_kl"] == {"mean": None, "low": None, "high": None}
    json.dumps(found, allow_nan=False)


def test_two_points_are_not_fitted() -> None:
    assert fit(rows([1.0, 2.0]), rows([1.0, 4.0]), "rl", **OPTIONS) is None
    # nor three at the same place, nor those that went nowhere
    assert fit(rows([1.0, 2.0, 2.0]), rows([1.0, 4.0, 4.0]), "rl", **OPTIONS) is None
    assert fit(rows([0.0, 1.0, 2.0]), rows([0.0, 1.0, 4.0]), "rl", **OPTIONS) is None


def member(
    name: str, gold: float | None, proxy: float, kl: float, *, prompts: int = 40, **more: Any
) -> Scored:
    """A system whose prompts have about these scores."""
    system = System(name, more.pop("path", name), Decoding(8), **more)
    generations = [Generation(f"p{i}", "r", [1, 2, 3], ended=True, logprob=-1.0) for i in range(prompts)]
    golds = None if gold is None else [gold + 0.1 * (i % 3) for i in range(prompts)]
    return Scored(system, generations, [proxy + 0.1 * (i % 2) for i in range(prompts)], golds, [kl] * prompts)


def report_of(*scored: Scored, reference: str | None = "sft") -> dict[str, Any]:
    entries = {each.system.name: summarise(each, reference=reference, **OPTIONS) for each in scored}
    report = {"systems": entries, "baseline": "sft", "reference": reference}
    return report | {"overoptimization": curves(report, scored, **OPTIONS)}


def run_of(golds: list[float | None], proxies: list[float], name: str = "ppo") -> list[Scored]:
    numbers = range(1, len(golds) + 1)
    names = [*(f"{name}_{10 * n}" for n in numbers[:-1]), name]
    return [
        member(own, gold, proxy, float(n), curve=name, update=10 * n, origin="sft")
        for own, n, gold, proxy in zip(names, numbers, golds, proxies, strict=True)
    ]


def test_what_gold_prefers_is_named_and_the_turn_is_warned_of() -> None:
    sft = member("sft", 0.0, 0.0, 0.0)
    report = report_of(sft, *run_of([1.0, 2.0, 1.5, 0.5], [1.0, 2.0, 3.0, 4.0]))
    [curve] = report["overoptimization"].values()
    assert curve["form"] == "rl" and [point["update"] for point in curve["points"]] == [10, 20, 30, 40]
    best = preferred(curve)
    assert best is not None and best["system"] == "ppo_20"
    assert best["gold"]["mean"] == pytest.approx(2.0)
    assert best["gold_less_last"]["mean"] == pytest.approx(1.5)
    told = warnings(report["overoptimization"])
    assert told == {
        "ppo": "over-optimised: since ppo_20, which is the better one, gold fell by 1.50 [1.50, 1.50] while "
        "the proxy rose by 2.00"
    }
    row = curves_table(report)[1]
    assert row[4].startswith("< 1.00") and row[:2] == ["ppo", "1.00 to 4.00"]
    assert row[-3:] == ["ppo_20", "2.00 [2.00, 2.00]", "1.50 [1.50, 1.50]"]
    turns = [*predicted(np.sqrt([1, 2, 3, 4]), 3.0, 2.0, "rl")]  # highest at exp(.5)^2 = 2.718
    row = curves_table(report_of(sft, *run_of(turns, [1.0, 2.0, 3.0, 4.0])))[1]
    assert row[4] == "2.72 [2.72, 2.72]" and row[5] == "3.30 [3.30, 3.30]"  # 2 exp(.5)
    assert "## Over-optimisation" in overoptimization_section(report)


@pytest.mark.parametrize(
    ("golds", "proxies"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),  # it is the last that gold prefers
        ([1.0, 3.0, 2.0], [1.0, 4.0, 3.0]),  # the proxy fell too
        ([None, None, None], [1.0, 2.0, 3.0]),  # nobody knows
    ],
)
def test_what_is_no_over_optimisation_is_not_warned_of(
    golds: list[float | None], proxies: list[float]
) -> None:
    sft = member("sft", None if golds[0] is None else 0.0, 0.0, 0.0)
    report = report_of(sft, *run_of(golds, proxies))
    assert warnings(report["overoptimization"]) == {}
    if golds[0] is None:
        assert report["overoptimization"]["ppo"]["fit"] is None
        assert curves_table(report)[1][-3:] == ["-", "-", "-"]


def test_best_of_n_is_a_curve_at_its_known_kl() -> None:
    sft = member("sft", 0.0, 0.0, 0.0)
    best = [
        member(
            f"best_{n}",
            math.log(n),
            math.log(n),
            9.0,
            path="sft",
            curve="best",
            best_of=n,
            pool=8,
            origin="sft",
        )
        for n in (2, 4, 8)
    ]
    [curve] = report_of(sft, *best)["overoptimization"].values()
    assert curve["form"] == "best_of_n" and curve["fit"] is not None
    assert report_of(sft, *best[:2])["overoptimization"] == {}
    # Gao et al.: log n - (n - 1) / n
    assert [point["kl"] for point in curve["points"]] == pytest.approx(
        [0.193147, 0.636294, 1.204442], abs=1e-6
    )


def test_there_is_no_fit_where_kl_does_not_begin_at_the_baseline() -> None:
    systems = [member("sft", 0.0, 0.0, 2.0), *run_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
    assert report_of(*systems)["overoptimization"]["ppo"]["fit"] is not None
    elsewhere = report_of(*systems, reference="base")["overoptimization"]["ppo"]
    best = preferred(elsewhere)
    assert elsewhere["fit"] is None and best is not None and best["system"] == "ppo"
    warm = replace(systems[0], system=replace(systems[0].system, decoding=Decoding(8, temperature=0.5)))
    assert report_of(warm, *systems[1:])["overoptimization"]["ppo"]["fit"] is None
    rising = curves_table({"overoptimization": report_of(*systems)["overoptimization"]})[1]
    assert rising[4:6] == ["> 3.00", "-"]
    others = [replace(each, system=replace(each.system, origin="base")) for each in systems[1:]]
    assert report_of(systems[0], *others)["overoptimization"]["ppo"]["fit"] is None


def test_the_plot_takes_curves_with_and_without_gold(tmp_path: Any) -> None:
    sft = member("sft", 0.0, 0.0, 0.0)
    report = report_of(
        sft, *run_of([1.0, 2.0, 1.5, 0.5], [1.0, 2.0, 3.0, 4.0]), *run_of([0.5], [1.0], "other")
    )
    assert (tmp_path / saved(plot_overoptimization(report), tmp_path / "curve.png")).stat().st_size > 10_000
