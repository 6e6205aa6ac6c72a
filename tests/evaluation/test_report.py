"""The report that people read: the table, the plots, and text of models that stays text."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored, common_length, compare, summarise, verdict
from rlhf.evaluation.exposure import Evidence, PrefixQuality
from rlhf.evaluation.hacking import highest, signals
from rlhf.evaluation.report import training_rows, write_report
from rlhf.evaluation.statistics import Estimate
from rlhf.evaluation.systems import Generation, System
from rlhf.evaluation.tables import COLUMNS, exposure_table, preference_table, print_table, table_rows

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](http://evil.example/p.png)",
    "[click](javascript:alert(1))",
    "a | b\n| c | d |",
    "`code` **bold** _it_ ~~gone~~ $x$",
    "# heading\n\n---\n<img src=x onerror=y>",
    "https://evil.example www.evil.example me@evil.example",
    "&lt;b&gt; \\| back \\` slash",
    "bell \x07 escape \x1b[31m nul \x00 end turned \u202e and \u2066 not back",
)
OPTIONS = {"num_bootstrap": 100, "seed": 0}


@pytest.fixture
def systems() -> list[Scored]:
    """Return two systems whose prompts and responses try to be markup."""

    def one(name: str, shift: float) -> Scored:
        rows = [Generation(text, text, [1, 2, 3, 4, 5], ended=True, logprob=-1.0) for text in HOSTILE]
        scores = [float(i) + shift for i in range(len(rows))]
        return Scored(System(name, name, Decoding(8)), rows, None, scores, [shift] * len(rows))

    return [one("sft", 0.0), one("p|po", 0.5)]


def report_of(systems: list[Scored]) -> dict[str, Any]:
    entries = {s.system.name: summarise(s, reference="sft", **OPTIONS) for s in systems}
    report = {
        "name": "a|<b>",
        "num_prompts": len(systems[0].generations),
        "baseline": "sft",
        "reference": "sft",
        "proxy": "a proxy",
        "highest": [],
        "lineage": [["stage", "from"], ["x/sft", "base=<b>"]],
        "preferences_simulated": True,
        "notes": ["no oracle: <b>"],
        "failed_checks": ["systems.sft: samples end: <b>"],
        "gates": [],
        "seen_prompts": 0,
        "overlap": [],
        "overoptimization": {},
        "judge": None,
        "excess_error_length": common_length(list(entries.values())),
        "systems": entries,
        **compare(systems, "sft", **OPTIONS),
        "commands": ["./launch.sh stage=evaluate"],
        "versions": {"torch": "2"},
    }
    found = {s.system.name: signals(s, entries[s.system.name], systems[0]) for s in systems}
    report |= {"signals": found, "warnings": {"p|po": ["<b>it is long</b>"]}}
    return report | {"verdict": verdict(report)}


def test_text_of_models_stays_text(systems: list[Scored], tmp_path: Path) -> None:
    report = report_of(systems) | {"highest": highest(replace(systems[1], proxy=systems[1].gold))}
    write_report(tmp_path, report, systems, curves=None, num_samples=len(HOSTILE))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for sign in (
        "<script",
        "<img",
        "<b>",
        "://evil",
        "www.evil",
        "me@evil",
        "~~gone",
    ):
        assert sign not in text, sign
    assert not re.findall(r"(?<!\\)\]\((?!plots/)", text)
    assert not [mark for mark in text if mark < " " and mark != "\n"]
    assert "turned and not back" in text
    assert f"The {len(HOSTILE)} responses of `p|po` that the proxy likes best" in text
    assert "| x/sft | base=&lt;b&gt; |" in text
    assert "&lt;script&gt;" in text and "\\[click\\]" in text and "\\*\\*bold\\*\\*" in text
    samples = text.split("## Samples")[1].split("## Where it comes from")[0]
    rows = [
        line for line in samples.splitlines() if line.startswith("| ") and not line.startswith("| system")
    ]
    assert len(rows) == 2 * len(HOSTILE)
    for row in rows:  # four cells, whatever the text
        assert row.replace("\\\\", "").replace("\\|", "").count("|") == 5, row
    assert not [line for line in samples.splitlines() if line.startswith(("# ", "---"))]


def test_a_very_long_text_is_cut_in_the_table_of_samples(systems: list[Scored], tmp_path: Path) -> None:
    long = Generation("p" * 2001, "r" * 100_000, [1, 2, 3, 4, 5], ended=True, logprob=-1.0)
    systems = [replace(each, generations=[long, *each.generations[1:]]) for each in systems]
    report = report_of(systems)
    write_report(tmp_path, report, systems, curves=None, num_samples=2)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"**{'p' * 2000} ... (2001 characters)** ..." in text
    assert text.count(f"| {'r' * 2000} ... (100000 characters) |") == 2
    assert "r" * 100_000 in (tmp_path / "generations" / "sft.jsonl").read_text(encoding="utf-8")
    assert "## Exposure bias" in text and "Excess error: how" not in text, "nothing of it was measured"


def test_the_files_are_there_and_the_plots_are_pictures(systems: list[Scored], tmp_path: Path) -> None:
    curves = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "score": i / 2, "kl": 0.1 * i, "length": 20.0} for i in range(5)]
    curves.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = report_of(systems)
    write_report(tmp_path, report, systems, curves=curves, num_samples=2)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in ("scores", "diversity", "training"):
        picture = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000
        assert f"](plots/{name}.png)" in text
    assert "excess_error.png" not in text and "- no oracle: &lt;b&gt;\n" in text
    assert "simulated" in text and text.count("| system | response |") == 2


def test_only_ppo_has_curves(systems: list[Scored], tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "score": 1, "kl": 0, "length": 3}\n')
    assert training_rows(metrics) == [{"step": 2, "score": 1, "kl": 0, "length": 3}]
    metrics.write_text('{"step": 1, "loss": 2.0}\n')
    write_report(tmp_path, report_of(systems), systems, curves=metrics, num_samples=1)
    assert "training.png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_table_by_hand(systems: list[Scored], capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(systems)
    report["systems"]["sft"] |= {
        "kl": 0.636,
        "kl_is_bound": True,
        "gold": {"mean": 1.234, "low": -1.0, "high": 2},
    }
    baseline, other = table_rows(report)
    # every response is 5 tokens, two 4-grams that differ, and four 2-grams that all responses share: 4 / 36
    assert baseline == ["sft", "1.23 [-1.00, 2.00]", "-", "<= 0.64", "5.0", "100%", "0.000", "0.11", "-"]
    assert (other[3], other[8]) == ("0.50", "1.00 [0.70, 1.00]")
    print_table([list(COLUMNS), *table_rows(report)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len({line.index("1") for line in lines[1:2]}) == 1
    assert lines[0].split()[:3] == ["system", "gold", "proxy"]


def test_the_table_of_exposure_bias_by_hand(systems: list[Scored], tmp_path: Path) -> None:
    same, shorter = ([[1.0] * n] * 10 for n in (3, 2))
    pairs = [(-1.0, -2.0)] * 10
    evidence = [
        Evidence(same, same, [[0.0]], Estimate(0.5, 0.4, 0.6), [PrefixQuality(4, pairs, None)]),
        Evidence(shorter, shorter, None, None, []),
    ]
    with_both = [replace(s, evidence=e) for s, e in zip(systems, evidence, strict=True)]
    report = report_of(with_both)
    header, first, second = exposure_table(report)
    assert header[1:3] == ["excess error, %, to 2 tokens", "log-prob after 4 gold less own tokens"]
    assert not any(name.startswith("gold score after") for name in header), "nothing was scored"
    # five tokens without repetition; four bigrams that all eight share, 4 / 32; exp(0)
    nothing = "0.00 [0.00, 0.00]"
    assert first[:4] == ["sft", nothing, "1.00 [1.00, 1.00]", nothing]
    assert first[5:] == ["1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]", "0.50 [0.40, 0.60]"]
    assert second[:4] == ["p|po", nothing, "-", nothing] and second[6:] == ["-", "-"]
    assert all(len(row) == len(header) for row in (first, second))
    write_report(tmp_path, report, with_both, curves=None, num_samples=1)
    assert "Excess error: how much farther" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "](plots/excess_error.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "excess_error.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_who_beats_whom_by_hand(systems: list[Scored], tmp_path: Path) -> None:
    report = report_of(systems)
    header, first, second = preference_table(report, "gold")
    assert header[0] == "system" and (first[0], second[0]) == ("p|po", "sft"), "the strongest first"
    won = len(HOSTILE)
    assert first[2:4] == [f"{won} / 0 / 0", "1.00 [0.70, 1.00]"] and second[2:] == ["-"] * 4
    assert second[1].endswith("[-inf, inf]")
    assert first[4] == "-", "fewer than ten prompts tell nothing about length"
    assert first[5] == "2", "the difference is the same for every prompt"
    strength = report["strengths"]["gold"]["p|po"]["mean"]
    assert strength == pytest.approx(math.log((won + 0.5) / 0.5) / 2, abs=1e-4)  # with a tie more
    assert strength == pytest.approx(-report["strengths"]["gold"]["sft"]["mean"])
    write_report(tmp_path, report, systems, curves=None, num_samples=1)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Who beats whom" in text and "By gold:" in text and "By proxy:" not in text
