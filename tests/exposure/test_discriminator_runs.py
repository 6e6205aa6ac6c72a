"""Whole runs of stage=ppo reward=discriminator: killed and resumed, with several processes, and evaluated."""

import functools
import re
import shutil
from pathlib import Path

import pytest

from tests.stage_runs import SMALL, read_json, read_lines, run_stage, run_until, same_results
from tests.test_processes import close, copy_of
from tests.test_resume import die_writing, kill_and_resume, saved, start_of
from tests.test_zero import words_under

pytestmark = pytest.mark.slow

OWN = ["reward=discriminator", "reward.pretrain_updates=6", "reward.batch_size=12", "reward.replay_size=40"]
OWN += ["reward.steps=2", "critic=null", "save_every=1"]
ADAPTERS = {name: [f"adapter={name}", "adapter.r=4"] for name in ("lora", "qlora")}
ADAPTERS["none"] = ["adapter=none"]


def same_judges(folder: Path, other: Path) -> bool:
    files = [path / "discriminator" / "model.safetensors" for path in (folder, other)]
    return files[0].read_bytes() == files[1].read_bytes()


# adapter, what the killed run is in the middle of writing, other settings
RUNS = [
    ("qlora", "random.safetensors", ["algo=reinforce", "reinforce_baseline=greedy"]),
]


@pytest.mark.parametrize(("adapter", "file", "settings"), RUNS)
def test_killed_anywhere_it_ends_bit_for_bit_as_uninterrupted(
    tiny_run: Path, tmp_path: Path, adapter: str, file: str, settings: list[str]
) -> None:
    own = [*ADAPTERS[adapter], *OWN, *settings]
    whole, words = start_of("ppo", tiny_run, tmp_path / "whole")
    finished = run_stage("ppo", *words, *own)
    assert finished.status == 0, finished.output

    folder, words = start_of("ppo", tiny_run, tmp_path / "parts")
    words += own
    pretraining = (folder.path / "config.yaml").exists
    assert run_until(pretraining, "ppo", *words).status == -9
    # a state has two of each file: the second one of update 3 is the discriminator's
    killed = run_stage("ppo", *words, "resume=true", first=functools.partial(die_writing, file, 6))
    assert killed.status == -9, killed.output
    assert [*(folder.path / "state").glob(f".step_3.*.tmp/discriminator/{file}")]
    assert saved(folder, "step_2")()

    kill_and_resume(folder, words, within=8.0, seed=adapter)
    assert same_results(folder.path, whole.path) and same_judges(folder.path, whole.path)
    assert (folder.path / "samples.jsonl").read_bytes() == (whole.path / "samples.jsonl").read_bytes()
    assert not (folder.path / "state").exists()


@pytest.mark.parametrize(
    ("engine", "adapter", "settings"),
    [
        ("ddp", "none", ["reward.batch_size=1", "engine.micro_batch_size=2"]),  # one has nothing to compute
        ("zero2", "lora", ["gradient_checkpointing=true"]),
        ("zero3", "none", []),
    ],
)
def test_two_processes_have_the_numbers_of_one(
    tiny_run: Path, tmp_path: Path, engine: str, adapter: str, settings: list[str]
) -> None:
    own = [*ADAPTERS[adapter], *OWN, "reward.pretrain_updates=3", *settings, "updates=3"]
    alone, several = (copy_of(tiny_run, tmp_path / name, "ppo") for name in ("alone", "several"))
    assert run_stage("ppo", *words_under(alone, "ppo", "single", 1), *own).status == 0
    result = run_stage("ppo", *words_under(several, "ppo", engine, 2), *own)
    assert result.status == 0, result.output
    ours, theirs = (read_lines(run / "ppo" / "metrics.jsonl") for run in (several, alone))
    assert all(close(mine, other) for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["discriminator_loss"] == pytest.approx(other["discriminator_loss"], abs=1e-5)


def test_the_trained_discriminator_is_a_scorer_of_evaluate(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    words = [f"runs={run.parent}", f"name={run.name}", "force=true"]
    result = run_stage("ppo", *words, *SMALL["ppo"], *OWN, "adapter=lora", "adapter.r=4")
    assert result.status == 0, result.output
    assert re.search(r"(ok|FAILED) +discriminator tells some apart", result.output)
    judge = run / "ppo" / "discriminator"
    record = read_json(run / "ppo" / "stage.json")
    assert record["products"]["discriminator"]["kind"] == "reward_model"
    assert record["results"]["discriminator_accuracy"] > 0

    followed = run_stage("evaluate", *words, *SMALL["evaluate"], "reward=model")
    assert followed.status == 0, followed.output
    proxy = f"proxy={{kind: model, path: '{judge}'}}"
    scored = run_stage("evaluate", *words, *SMALL["evaluate"], "overwrite=true", proxy)
    assert scored.status == 0, scored.output
    parents = read_json(run / "evaluate" / "stage.json")["parents"]
    assert [judge.name for parent in parents if parent["path"] == str(judge)] == ["discriminator"]

    refused = run_stage("evaluate", *words, *SMALL["evaluate"], "overwrite=true", "reward=discriminator")
    assert "it is trained in stage=ppo" in refused.error
    refused = run_stage("evaluate", *words, *SMALL["evaluate"], "overwrite=true", f"systems={{a: '{judge}'}}")
    assert "written by stage ppo: a reward model; a policy is due here" in refused.error
    other = run.parent / "other"
    shutil.copytree(run / "sft", other / "sft")
    again = [f"runs={run.parent}", "name=other", "force=true", *SMALL["ppo"], "updates=1", "critic=null"]
    used = run_stage("ppo", *again, f"reward.path={judge}")
    assert used.status == 0, used.output
