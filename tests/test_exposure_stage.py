"""stage=exposure: which stages it runs with which words, what it leaves alone, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import resolved_yaml
from stages.__main__ import main
from stages.all import ENTRY_POINT
from stages.experiments import Step, plan, why_unfit
from tests.stage_runs import LONGEST_RUN, OWN, read_json

METHODS = [
    *("scheduled_linear", "scheduled_exponential", "scheduled_inverse_sigmoid"),
    *("reinforce", "rloo", "adversarial", "ppo"),
]


def steps_of(tmp_path: Path, *words: str) -> list[Step]:
    _, [steps] = plan("exposure", ["model=tiny", "data=toy", "name=x", f"runs={tmp_path}", *words])
    return steps


def finish(step: Step) -> None:
    """Leave what says that a step is finished."""
    step.folder.mkdir(parents=True)
    (step.folder / "stage.json").write_text("{}", encoding="utf-8")
    (step.folder / "config.yaml").write_text(resolved_yaml(step.config), encoding="utf-8")


def test_every_method_is_a_stage_of_its_own_on_the_same_models(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, "sft.epochs=2", "ppo.updates=5")
    labels = [step.label.removeprefix("methods.") for step in steps]
    assert labels == ["sft", "collect", "rm", *METHODS, "evaluate"]
    by_label = dict(zip(labels, steps, strict=True))
    run = tmp_path / "x"
    assert {step.config.seed for step in steps} == {1}
    assert len({step.folder for step in steps}) == len(steps)
    for name in METHODS[:3]:
        config = by_label[name].config
        assert (config.policy, config.epochs) == ("tiny", 2) and by_label[name].folder == run / name / "sft"
        assert config.exposure.schedule == name.removeprefix("scheduled_")
    for name in METHODS[3:]:
        config = by_label[name].config
        assert config.policy == f"{run}/sft/model" and config.updates == 5
        assert config.batch_size == by_label["ppo"].config.batch_size
    assert by_label["adversarial"].config.critic is None
    assert by_label["reinforce"].config.reward["kind"] == by_label["rloo"].config.reward["kind"] == "rouge_l"
    ppo = by_label["ppo"].config
    assert ppo.reward == {"kind": "model", "path": f"{run}/rm/model"} and ppo.critic == f"{run}/rm/model"
    evaluate = by_label["evaluate"].config
    decodings = [name for name in evaluate.systems if name.startswith("sft_")]
    assert list(evaluate.systems) == ["base", "sft", *decodings, *METHODS] and len(decodings) == 7
    assert evaluate.systems["rloo"] == f"{run}/rloo/ppo/model"
    assert evaluate.systems["sft_beam"] == {"path": f"{run}/sft/model", "decoding": {"num_beams": 4}}
    assert (evaluate.baseline, evaluate.proxy["path"]) == ("sft", f"{run}/rm/model")


def test_overoptimization_is_ppo_with_every_coefficient_and_best_of_n(tmp_path: Path) -> None:
    words = ["model=tiny", "data=toy", "name=x", f"runs={tmp_path}", "kl_coefs=[0.1,0]", "updates=12"]
    folder, [steps] = plan("overoptimization", words)
    assert folder == tmp_path / "x" / "overoptimization"
    labels = ["sft", "collect", "rm", "methods.kl_0.1", "methods.kl_0.0", "evaluate"]
    assert [step.label for step in steps] == labels
    *_, first, second, evaluate = steps
    for step, coef in ((first, 0.1), (second, 0.0)):
        assert (step.config.kl.coef, step.config.keep_every, step.config.updates) == (coef, 3, 12)
        assert step.folder == tmp_path / "x" / f"kl_{coef}" / "ppo"
        assert step.config.reward == {"kind": "model", "path": f"{tmp_path}/x/rm/model"}
    assert evaluate.folder == folder / "evaluate"
    assert evaluate.config.proxy == {"kind": "model", "path": f"{tmp_path}/x/rm/model"}
    assert evaluate.config.systems == {
        "sft": f"{tmp_path}/x/sft/model",
        "best_of": {"path": f"{tmp_path}/x/sft/model", "best_of": [2, 4, 8, 16]},
        "kl_0.1": {"checkpoints": str(first.folder)},
        "kl_0.0": {"checkpoints": str(second.folder)},
    }
    for step in steps:
        keys = [word.partition("=")[0] for word in step.words]
        assert len(keys) == len(set(keys)) and "model=tiny" in step.words
    *_, own, _ = plan("overoptimization", [*words, "keep_every=5"])[1][0]
    assert own.config.keep_every == 5


def test_each_seed_has_a_run_of_its_own(tmp_path: Path) -> None:
    folder, seeds = plan("exposure", ["model=tiny", "data=toy", "name=x", f"runs={tmp_path}", "seeds=[3,5]"])
    assert folder == tmp_path / "x" / "exposure"
    for seed, steps in zip((3, 5), seeds, strict=True):
        assert {step.config.seed for step in steps} == {seed}
        assert all((tmp_path / "x" / f"seed_{seed}") in step.folder.parents for step in steps)


def test_methods_and_decodings_can_be_left_out_and_added(tmp_path: Path) -> None:
    words = [f"methods.{name}=null" for name in METHODS if name != "rloo"]
    more = "methods.mine=stage=ppo algo=reinforce reward=bleu mixer.updates=3"
    *_, rloo, mine, evaluate = steps_of(tmp_path, *words, more, "decodings=[greedy]")
    assert (rloo.label, mine.label) == ("methods.rloo", "methods.mine")
    assert (mine.config.reward["kind"], mine.config.mixer.updates) == ("bleu", 3)
    assert list(evaluate.config.systems) == ["base", "sft", "sft_greedy", "rloo", "mine"]


def test_without_preferences_no_reward_model_is_trained(tmp_path: Path) -> None:
    words = ["data=tldr", "data.ranked.train=null", "methods.ppo=null", "gold={kind: rouge_l}"]
    steps = steps_of(tmp_path, *words)
    labels = [step.label for step in steps]
    assert labels[:2] == ["sft", "methods.scheduled_linear"] and "rm" not in labels
    assert all(step.config.critic is None for step in steps if step.stage == "ppo")
    with pytest.raises(ValueError, match=r"methods.ppo needs a reward model, and data=tldr has neither"):
        steps_of(tmp_path, *words[:2])
    with pytest.raises(
        ValueError, match=r"evaluate: data=tldr has nothing to train .* gold='{kind: rouge_l}'"
    ):
        steps_of(tmp_path, *words[:3])
    own = steps_of(tmp_path, "data=tldr")
    assert [step.label for step in own][:3] == ["sft", "rm", "methods.scheduled_linear"]


def test_what_is_finished_is_left_alone_and_what_stands_on_new_parts_runs_again(tmp_path: Path) -> None:
    for step in steps_of(tmp_path):
        if step.label not in ("methods.rloo", "evaluate"):
            finish(step)
    with pytest.raises(ValueError, match=r"x/sft is finished: resume=true keeps it, overwrite=true"):
        steps_of(tmp_path)
    due = [step.label for step in steps_of(tmp_path, "resume=true") if not step.finished]
    assert due == ["methods.rloo", "evaluate"]
    assert not any(step.finished for step in steps_of(tmp_path, "overwrite=true"))
    with pytest.raises(ValueError, match=r"reinforce/ppo is finished with other settings \(kl.coef\)"):
        steps_of(tmp_path, "resume=true", "kl.coef=0.2")

    steps = steps_of(tmp_path, "resume=true", "rm.overwrite=true", "rm.resume=false")
    again = [step for step in steps if not step.finished]
    labels = [step.label.removeprefix("methods.") for step in again]
    assert labels == ["rm", *METHODS[3:], "evaluate"]
    new = {"rloo", "evaluate", "rm"}
    for label, step in zip(labels, again, strict=True):
        assert (step.words[-1] == "overwrite=true") == (label not in new), label

    (tmp_path / "x" / "rloo" / "ppo" / "state").mkdir(parents=True)  # begun, on the old reward model
    steps = steps_of(tmp_path, "resume=true", "rm.overwrite=true", "rm.resume=false")
    assert [step.words[-1] for step in steps if step.label == "methods.rloo"] == ["overwrite=true"]
    [rloo] = [step for step in steps_of(tmp_path, "resume=true") if step.label == "methods.rloo"]
    assert not rloo.finished and rloo.words[-1] != "overwrite=true", "it goes on"


def test_systems_that_were_added_are_evaluated_with_the_others(tmp_path: Path) -> None:
    for step in steps_of(tmp_path, "decodings=[greedy]"):
        finish(step)
    due = [step for step in steps_of(tmp_path, "resume=true") if not step.finished]
    assert [(step.label, step.words[-1]) for step in due] == [("evaluate", "overwrite=true")]
    with pytest.raises(ValueError, match=r"evaluate is finished with other settings \(.*num_prompts"):
        steps_of(tmp_path, "resume=true", "evaluate.num_prompts=3")


def test_a_model_that_failed_its_checks_is_not_built_on(tmp_path: Path) -> None:
    steps = steps_of(tmp_path)
    rm = steps[2]
    finish(rm)
    check = {"name": "accuracy", "passed": False, "value": "0.51", "meaning": "too low"}
    (rm.folder / "stage.json").write_text(json.dumps({"checks": [check]}), encoding="utf-8")
    found = why_unfit(rm, steps[3:])
    assert found == "methods.ppo stands on rm, which failed its checks: accuracy: 0.51 (too low)"
    assert why_unfit(rm, steps[-1:]) is None, "what is compared is shown as it is"
    assert why_unfit(steps_of(tmp_path, "resume=true", "force=true")[2], steps[3:]) is None


@pytest.mark.parametrize("stage", ["all", "exposure"])
def test_the_data_of_the_last_stage_is_looked_at_before_the_first_runs(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "no prompt of ours"}\n', encoding="utf-8")
    words = [f"stage={stage}", "model=tiny", "data=toy", f"runs={tmp_path}/runs"]
    late, unlabelled = tmp_path / "late.jsonl", tmp_path / "unlabelled.jsonl"
    late.write_text('{"prompt": "a", "reference": "b"}\n' * 20 + '{"prompt": "cut sh', encoding="utf-8")
    unlabelled.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n', encoding="utf-8")
    for key, place, message in (
        ("data.prompts.evaluate", "nowhere.jsonl", "nowhere.jsonl"),
        ("data.prompts.evaluate", rows, "rows.jsonl:1"),
        ("data.prompts.evaluate", late, "late.jsonl:21"),
        ("data.demonstrations.eval", late, "late.jsonl:21"),
        ("data.labelled.gold", unlabelled, "unlabelled.jsonl:2"),
    ):
        assert main([*words, f"{key}={place}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert key in error or "gold.train" in error
    assert not (tmp_path / "runs").exists()


def test_missing_references_are_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "c"}\n', encoding="utf-8")
    words = [
        "stage=exposure",
        "model=tiny",
        "data=toy",
        f"runs={tmp_path}/runs",
        f"data.prompts.ppo={prompts}",
    ]
    mixer = ["methods.reinforce=null", "methods.rloo=null"]
    mixer.append("methods.m=stage=ppo algo=reinforce mixer.updates=2")
    for method, message in ((["methods.ppo=null"], "reward: rouge_l"), (mixer, "mixer.updates")):
        assert main([*words, *method]) == 2
        error = capsys.readouterr().err
        assert f"{message} needs references, and 1 of 2 prompts have none" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_what_stood_on_a_model_that_was_replaced_since_runs_again(tmp_path: Path) -> None:
    for step in steps_of(tmp_path):
        finish(step)
    model = tmp_path / "x" / "sft" / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    parent = {"key": "policy", "path": str(model), "sha256": "of another"}
    record = tmp_path / "x" / "rloo" / "ppo" / "stage.json"
    record.write_text(json.dumps({"parents": [parent]}), encoding="utf-8")
    due = [step for step in steps_of(tmp_path, "resume=true") if not step.finished]
    assert [step.label for step in due] == ["methods.rloo", "evaluate"]
    assert [step.words[-1] for step in due] == ["overwrite=true"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["methods.mine=algo=rloo"],
            "methods.mine=algo=rloo: 'stage=sft ...' or 'stage=ppo ...' is expected",
        ),
        (["methods.mine=stage=rm"], "methods.mine=stage=rm: 'stage=sft ...' or 'stage=ppo ...' is expected"),
        (
            ["methods.ppo=stage=ppo kl.coeff=1"],
            "methods.ppo: kl.coeff is not a key of stage ppo; did you mean",
        ),
        (["decodings=[beem]"], "decodings: beem: did you mean beam?"),
        (["methods.roo=null"], "methods.roo=null: did you mean rloo?"),
        (["methods.sft=stage=sft"], "methods.sft: a name of its own is expected"),
        (["methods.sft_beam=stage=sft"], "methods.sft_beam: a name of its own is expected"),
        (["methods.x/y=stage=sft"], "methods.x/y: a name of its own is expected"),
        (["methods.x=stage=ppo runs=/etc"], "methods.x: runs=/etc: the comparison says that itself"),
        (["seed=2"], "seed=2: the comparison says that itself; give seeds='[1, 2]'"),
        (["ppo.seed=2"], "ppo.seed=2: the comparison says that itself; give seeds="),
        (["systems={a: b}"], "systems={a: b}: the comparison says that itself; give methods.<name>="),
        (["seeds=[]"], "seeds=[]: give at least one, and each once"),
        (["seeds=[1,1]"], "seeds=[1, 1]: give at least one, and each once"),
        (["seeds=[a]"], "seeds"),
        (["kl_coefs=[0.1,0.1]"], "kl_coefs=[0.1, 0.1]: give each once"),
        (["kl_coefs=0.1"], "kl_coefs=0.1: a list of numbers is expected"),
        (["ppo.keep_every=3", "ppo.updates=3"], "keep_every=3 of updates=3 keeps nothing on the way"),
        (["best_of=[4]", "methods.best_of_4=stage=ppo"], "systems: two would be called best_of_4"),
        (["kl_coefs=[-1]"], "methods.kl_-1.0: kl.coef=-1.0: a number that is not negative is expected"),
        (["best_of=[2,2]"], "systems.best_of.best_of=[2, 2]: a number of samples is expected, or a list"),
        (["methods.best_of=stage=ppo"], "methods.best_of: a name of its own is expected"),
        (["ppo.updates=0"], "methods.reinforce: updates=0: a number that is at least 1 is expected"),
        (["epohcs=2"], "epohcs is not a key of any stage; did you mean epochs?"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_that_names_the_part(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=exposure", "model=tiny", "data=toy", f"runs={tmp_path}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_show_prints_commands_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=exposure", "show=true", "model=tiny", "data=toy", f"runs={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(line.startswith("./launch.sh stage=") for line in lines[:-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_overoptimization_runs_goes_on_and_reports(tmp_path: Path) -> None:
    words = [
        "tracker=none",
        f"runs={tmp_path}",
        "name=x",
        "force=true",
        "kl_coefs=[0.5,0]",
        "best_of=[1,2,4]",
    ]
    words += [f"{stage}.{word}" for stage, own in OWN.items() for word in own]
    command = [sys.executable, str(ENTRY_POINT), "stage=overoptimization", "model=tiny", "data=toy", *words]
    first = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_RUN * 4)
    assert first.returncode == 0, first.stdout + first.stderr
    report = read_json(tmp_path / "x" / "overoptimization" / "report.json")
    curves = report["overoptimization"]
    assert list(curves) == ["best_of", "kl_0.5", "kl_0.0"]
    assert [point["update"] for point in curves["kl_0.0"]["points"]] == [2, 4, 6]
    assert all(point["proxy"] is not None for curve in curves.values() for point in curve["points"])
    text = (tmp_path / "x" / "overoptimization" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Over-optimisation: x") and re.search(
        r"\| kl\\_0.0 \| [-\d.]+ to [-\d.]+ \|", text
    ), text

    again = subprocess.run([*command, "resume=true"], capture_output=True, text=True, timeout=LONGEST_RUN * 4)
    assert again.returncode == 0 and again.stdout.count("finished in") == 6, again.stdout + again.stderr
    assert read_json(tmp_path / "x" / "overoptimization" / "report.json")["overoptimization"] == curves


@pytest.mark.slow
def test_the_cheap_setting_runs_goes_on_and_reports(tmp_path: Path) -> None:
    words = ["tracker=none", f"runs={tmp_path}", "name=x", "decodings=[beam]", "force=true"]
    words += [f"methods.{name}=null" for name in METHODS if name not in ("scheduled_linear", "rloo")]
    small = {stage: [f"{stage}.{word}" for word in own] for stage, own in OWN.items()}
    command = [sys.executable, str(ENTRY_POINT), "stage=exposure", "model=tiny", "data=toy", *words]
    command += [word for own in small.values() for word in own]
    first = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_RUN * 4)
    assert first.returncode == 0, first.stdout + first.stderr
    report = read_json(tmp_path / "x" / "exposure" / "report.json")
    assert list(report["systems"]) == ["base", "sft", "sft_beam", "scheduled_linear", "rloo"]
    for entry in report["systems"].values():
        assert {"rouge_l", "bleu"} <= entry["overlap"].keys() and entry["exposure"]["diversity"]
    assert "| rloo | " in (tmp_path / "x" / "exposure" / "report.md").read_text(encoding="utf-8")

    shutil.rmtree(tmp_path / "x" / "rloo")
    shutil.rmtree(tmp_path / "x" / "exposure")
    again = subprocess.run([*command, "resume=true"], capture_output=True, text=True, timeout=LONGEST_RUN * 4)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished in") == 4, "all but rloo and the evaluation"
    assert read_json(tmp_path / "x" / "exposure" / "report.json")["systems"] == report["systems"]
