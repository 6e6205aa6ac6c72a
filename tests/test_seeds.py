"""stage=all seeds=[...]: one chain a seed, what they say together, and seeds that fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import all as chain
from stages import seeds
from stages.__main__ import main
from tests.stage_runs import read_json

TINY = ("model=tiny", "data=toy")


def test_every_seed_has_a_chain_of_its_own(tmp_path: Path) -> None:
    folder, words = seeds.plan([*TINY, f"runs={tmp_path}", "name=x", "ppo.updates=3", "seeds=[4,7]"])
    assert folder == tmp_path / "x" / "seeds" and list(words) == [4, 7]
    configs = chain.load_configs(words[7])
    assert {config.seed for config in configs.values()} == {7} and configs["ppo"].updates == 3
    assert configs["ppo"].policy == f"{tmp_path}/x/seed_7/sft/model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=[1,1]"], "seeds=[1, 1]: give at least one, and each once"),
        (["seeds=[]"], "give at least one"),
        (["seeds=[a]"], "seeds"),
        (["seeds=[1,2]", "seed=3"], "seed=3: seeds=[1,2] says that already"),
        (["seeds=[1,2]", "ppo.seed=3"], "ppo.seed=3: seeds=[1,2] says that already"),
        (["seeds=[1,2]", "epohcs=3"], "did you mean epochs?"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=all", *TINY, f"runs={tmp_path}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_means_the_spread_and_every_seed_are_reported_and_failures_shown(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shifts = {1: 0.0, 2: 1.0, 3: -0.5}  # of the gold score of ppo

    def run(configs: dict[str, Any], words: list[str]) -> tuple[int, str | None]:
        """Leave what a chain leaves: of seed 4 not the policy."""
        config = configs["evaluate"]
        run = Path(config.runs) / config.name
        names = ("sft", "collect", "rm") if config.seed == 4 else ("sft", "collect", "rm", "ppo", "evaluate")
        for name in names:
            (run / name).mkdir(parents=True)
            shutil.copy(tiny_run / name / "stage.json", run / name / "stage.json")
        if config.seed == 4:
            return 2, "ppo"
        report = read_json(tiny_run / "evaluate" / "report.json")
        for difference in report["differences"]:
            if (difference["a"], difference["judge"]) == ("ppo", "gold"):
                difference["mean"] = 2 + shifts[config.seed]
        report["gates"] = [{"gate": "g>0", "passed": True, "found": "1"}]
        (run / "evaluate" / "report.json").write_text(json.dumps(report), encoding="utf-8")
        return 0, None

    monkeypatch.setattr(chain, "run", run)
    assert main(["stage=all", *TINY, f"runs={tmp_path}", "name=x", "seeds=[1,2,3,4]"]) == 2
    shown = capsys.readouterr().out
    report = read_json(tmp_path / "x" / "seeds" / "report.json")
    assert [gate["gate"] for gate in report["gates"]] == [f"g>0 (seed {seed})" for seed in (1, 2, 3)]
    assert report["by_seed"]["ppo"] == [2.0, 3.0, 1.5] and report["failed_seeds"] == {"4": "ppo"}
    # the mean of 2, 3 and 1.5, and their standard deviation, sqrt((.0278 + .6944 + .4444) / 2)
    assert "+2.167 (sd 0.764)" in shown and "stage ppo failed" in shown
    text = (tmp_path / "x" / "seeds" / "report.md").read_text(encoding="utf-8")
    assert "- seed 4: stage ppo failed, and is in no mean" in text and "+3.000" in text
    verdict = (
        "ppo less sft by gold: +2.17 on average over 3 seeds (standard deviation 0.76, from +1.50 to +3.00)."
    )
    assert report["verdict"] == f"{verdict} The chain of seed 4 failed." and report["verdict"] in shown
    page = (tmp_path / "x" / "seeds" / "report.html").read_text(encoding="utf-8")
    assert (
        report["verdict"] in page and "Every seed" in page and "seed_4/rm" in page and "<script" not in page
    )
    assert "Means over the seeds" in page and 'id="samples"' not in page


def test_a_seed_that_fails_anew_is_not_told_by_its_old_report(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "x" / "seed_1"
    shutil.copytree(tiny_run, run)
    monkeypatch.setattr(chain, "run", lambda configs, words: (2, "evaluate"))  # before it began
    assert main(["stage=all", *TINY, f"runs={tmp_path}", "name=x", "seeds=[1]", "overwrite=true"]) == 2
    assert not (tmp_path / "x" / "seeds" / "report.json").exists()
    assert capsys.readouterr().err.endswith("every chain failed, that of seed 1 in stage evaluate\n")
    old = tmp_path / "x" / "seeds"
    old.mkdir()
    assert main(["stage=all", *TINY, f"runs={tmp_path}", "name=x", "seeds=[1]", "overwrite=true"]) == 2
    assert capsys.readouterr().err.endswith(f"in stage evaluate; {old} is of an earlier run\n")


def test_one_system_in_several_seeds_has_the_lowest_and_the_highest(tiny_run: Path, tmp_path: Path) -> None:
    from rlhf.evaluation.seeds_report import write_seeds_report

    first, second = (read_json(tiny_run / "evaluate" / "report.json") for _ in range(2))
    second["systems"]["ppo"]["gold"]["mean"] += 1
    report = write_seeds_report(tmp_path / "seeds", {1: first, 2: second}, {}, {}, "command")
    mean = first["systems"]["ppo"]["gold"]["mean"]
    found = report["systems"]["ppo"]["gold"]
    assert found == pytest.approx({"mean": mean + 0.5, "low": mean, "high": mean + 1})
