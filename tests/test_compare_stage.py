"""stage=compare: what it evaluates, the line that it prints, its exit status, and what it refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import load_config
from stages.__main__ import main
from stages.all import ENTRY_POINT
from stages.compare import in_one_line, plan
from tests.stage_runs import LONGEST_RUN, SMALL, read_json

TINY = ("model=tiny", "data=toy")


def test_it_is_an_evaluation_of_both_by_the_runs_own_scorers(tmp_path: Path) -> None:
    stage = tmp_path / "x" / "ppo"
    (stage / "model").mkdir(parents=True)
    (stage / "model" / "config.json").write_text("{}")
    config, words = plan([*TINY, f"runs={tmp_path}", "name=x", f"a={stage}", "b=mine.jsonl", "num_prompts=7"])
    assert config.systems == {"a": f"{stage}/model", "b": {"generations": "mine.jsonl"}}
    assert re.fullmatch(r"x/compare/[0-9a-f]{8}", config.name) and config.num_prompts == 7
    assert config.proxy["path"] == f"{tmp_path}/x/rm/model" and config.gold["kind"] == "classifier"
    assert config.overwrite and words[-1] == "overwrite=true"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x"], "stage=compare needs b=: a checkpoint, stage or run folder"),
        (["b=x", "a="], "stage=compare needs a="),
        (["b=x", "a"], "stage=compare needs a="),
        (["a=x", "b=y", "systems={c: z}"], "systems={c: z}: stage=compare says that itself; give a= and b="),
        (["a=x", "b=y", "baseline=a"], "it is b"),
        (["a=x", "b=y", "gate=win_rate(a, c) > 0"], "systems are a, b"),
        (["a=x", "b=y", "num_promts=3"], "did you mean num_prompts?"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=compare", *TINY, f"runs={tmp_path}", *words]) == 2
    shown, error = capsys.readouterr()
    assert not shown and message in error and error.count("\n") == 1


def test_data_and_model_are_those_of_what_is_compared(tmp_path: Path) -> None:
    for name, data in (("a", "toy"), ("b", "toy"), ("c", "film_reviews")):
        folder = tmp_path / name
        folder.mkdir()
        settings = f"runs: /old\nname: old\ndata: {{name: {data}}}\nmodel: {{path: tiny}}\n"
        (folder / "config.yaml").write_text(settings)
        (folder / "stage.json").write_text("{}")
    a, b, c = (f"{tmp_path}/{name}" for name in "abc")
    config, _ = plan([f"a={a}", f"b={b}/model"])
    assert (config.data.name, config.model.path) == ("toy", "tiny")
    assert config.name.startswith(f"{tmp_path.name}/compare/")
    assert config.proxy["path"] == f"{tmp_path}/rm/model", "where the run lies now"
    config, _ = plan([f"a={a}", f"b={b}", "data.on_bad_row=skip", "model.attention=eager", "name=other"])
    assert (config.data.name, config.model.path, config.data.on_bad_row) == ("toy", "tiny", "skip")
    assert config.name.startswith("other/compare/")
    with pytest.raises(ValueError, match="b was trained with data=film_reviews: say with data= whose"):
        plan([f"a={a}", f"b={c}"])
    config, _ = plan([f"a={a}", f"b={c}", "evaluate.data=film_reviews"])
    assert (config.data.name, config.model.path) == ("film_reviews", "tiny")
    responses = tmp_path / "a" / "generations" / "ppo.jsonl"
    responses.parent.mkdir()
    responses.touch()
    assert plan([f"a={responses}", "b=gpt2"])[0].data.name == "toy"
    (tmp_path / "a" / "config.yaml").write_text("{")
    config, _ = plan([f"a={a}", "b=x/y"])
    assert config.data.name == "film_reviews", "of others nothing is known: the default"


def test_a_stage_or_a_run_stands_for_its_policy(tmp_path: Path) -> None:
    for name in ("x/ppo/model", "x/sft/model", "y/sft/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    x, y, sft = f"{tmp_path}/x", f"{tmp_path}/y", f"{tmp_path}/x/sft"
    config, _ = plan([f"a={x}", f"b={sft}"])
    assert config.systems == {"a": f"{x}/ppo/model", "b": f"{sft}/model"}
    systems = f"systems={{a: {sft}, b: {{path: {x}, best_of: 2}}, c: {y}, d: {sft}/model, e: org/name}}"
    assert load_config("evaluate", [*TINY, systems]).systems == {
        "a": f"{sft}/model",
        "b": {"path": f"{x}/ppo/model", "best_of": 2},
        "c": y,  # no ppo: which of its stages is not guessed
        "d": f"{sft}/model",
        "e": "org/name",
    }


@pytest.mark.slow
def test_two_systems_in_one_line_and_an_exit_status(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate"))
    small = [word for word in SMALL["evaluate"] if not word.startswith(("oracle=", "prefix_lengths="))]
    command = [sys.executable, str(ENTRY_POINT), "stage=compare", f"runs={run.parent}", f"name={run.name}"]
    command += [*small, f"a={run}/sft", f"b={run}/sft/model"]

    def compared(*words: str) -> tuple[int, str]:
        found = subprocess.run([*command, *words], capture_output=True, text=True, timeout=LONGEST_RUN)
        assert "Traceback" not in found.stderr
        return found.returncode, found.stdout

    status, line = compared()
    assert status == 0 and line.startswith("a cannot be told from b by gold (") and line.count("\n") == 1
    assert "win rate 0.500 [0.500, 0.500]; 0 wins, 16 ties, 0 losses" in line
    status, line = compared("gate=win_rate(a, b) > 0.6")
    assert status == 4 and "gate win_rate(a, b) > 0.6 NOT PASSED" in line
    [place] = (run / "compare").glob("*/evaluate/report.json")
    report = read_json(place)
    assert report["gates"][0]["passed"] is False and not (run / "evaluate").exists()
    where = f"b={tmp_path}/nowhere"
    nothing = subprocess.run([*command, where], capture_output=True, text=True, timeout=LONGEST_RUN)
    assert nothing.returncode == 2 and nothing.stderr.count("\n") == 1
    assert nothing.stderr.startswith(f"error: {where} does not exist; name another folder with b=")
    assert f"a={run}/sft" in report["commands"][-1]


def test_the_line_goes_by_the_judge_where_one_was_asked() -> None:
    even = {"mean": 0.6, "low": 0.5, "high": 0.7}
    rate = {"a": "a", "b": "b", "wins": 7, "ties": 1, "losses": 2, "win_rate": 0.75, "low": 0.6, "high": 0.9}
    report = {
        "win_rates": [rate | {"judge": "judge", "length_controlled": even}],
        "differences": [],
        "judge": {"model": "m"},
        "gates": [],
    }
    line = in_one_line(report, "toy")
    assert line.startswith(
        "a beats b by judge (m) on 10 prompts (data=toy); win rate 0.750 [0.600, 0.900]; 7 "
    )
    assert "could not be compared" in in_one_line(report | {"win_rates": []}, "toy")
