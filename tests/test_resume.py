"""A run that was killed goes on where it stood, and ends bit for bit as one that was not."""

import functools
import importlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoint import StageFolder
from tests.stage_runs import SMALL, read_json, run_stage, run_until, same_results

pytestmark = pytest.mark.slow
# What the killed stage stands on.
BEFORE = {"sft": (), "collect": ("sft",), "rm": ("sft", "collect"), "ppo": ("sft", "collect", "rm")}


def start_of(stage: str, tiny_run: Path, folder: Path) -> tuple[StageFolder, list[str]]:
    """A copy of the finished run up to `stage`, whose folder is not there yet, and the words that run it."""
    run = folder / "runs" / tiny_run.name
    run.mkdir(parents=True)
    for before in BEFORE[stage]:
        shutil.copytree(tiny_run / before, run / before)
    return StageFolder(str(run.parent), run.name, stage), [f"runs={run.parent}", *SMALL[stage], "force=true"]


def saved(folder: StageFolder, name: str) -> Callable[[], bool]:
    """Whether the state `name` is whole."""
    return lambda: any(path.name == name for path in [folder.latest_state()] if path is not None)


def lines_of(path: Path, count: int) -> Callable[[], bool]:
    """Whether a file has so many lines."""
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


@pytest.mark.parametrize(
    ("stage", "state"),
    [
        ("sft", "checkpoint-10"),
        ("sft", "checkpoint-30"),
        ("rm", "checkpoint-4"),
        ("ppo", "step_2"),
        ("ppo", "step_4"),
    ],
)
def test_killed_and_resumed_is_as_uninterrupted(
    tiny_run: Path, tmp_path: Path, stage: str, state: str
) -> None:
    folder, words = start_of(stage, tiny_run, tmp_path)
    killed = run_until(saved(folder, state), stage, *words)
    assert killed.status == -9, killed.output
    assert not (folder.path / "stage.json").exists()

    stopped = run_stage(stage, *words)
    assert "resume=true" in stopped.error and "overwrite=true" in stopped.error
    resumed = run_stage(stage, *words, "resume=true")
    assert resumed.status == 0, resumed.output
    assert same_results(folder.path, tiny_run / stage)
    assert not (folder.path / "state").exists()


@pytest.mark.parametrize("lines", [1, 3])
def test_collect_loses_no_record_and_doubles_none(tiny_run: Path, tmp_path: Path, lines: int) -> None:
    folder, words = start_of("collect", tiny_run, tmp_path)
    partial = folder.path / "state" / "partial.jsonl"
    killed = run_until(lines_of(partial, lines), "collect", *words)
    assert killed.status == -9, killed.output
    with partial.open("a", encoding="utf-8") as stream:
        stream.write('[{"prompt": "cut by the ki')  # a kill inside a line
    resumed = run_stage("collect", *words, "resume=true")
    assert resumed.status == 0, resumed.output
    assert same_results(folder.path, tiny_run / "collect")


@pytest.mark.parametrize(
    "own",
    [
        ["adapter=lora", "adapter.r=4"],
        ["adapter=qlora", "adapter.r=4"],
        ["adapter=lora", "adapter.r=4", "exposure=scheduled_sampling", "exposure.schedule=exponential"],
    ],
)
def test_adapters_and_scheduled_sampling_resume_exactly(tmp_path: Path, own: list[str]) -> None:
    words = [*SMALL["sft"], *own, "force=true"]
    whole = run_stage("sft", *words, f"runs={tmp_path / 'whole'}")
    assert whole.status == 0, whole.output
    folder = StageFolder(str(tmp_path / "parts"), "tiny-toy", "sft")
    words.append(f"runs={tmp_path / 'parts'}")
    killed = run_until(saved(folder, "checkpoint-20"), "sft", *words)
    assert killed.status == -9, killed.output
    resumed = run_stage("sft", *words, "resume=true")
    assert resumed.status == 0, resumed.output
    assert same_results(folder.path, tmp_path / "whole" / "tiny-toy" / "sft")


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def kill_and_resume(folder: StageFolder, words: list[str], *, within: float, seed: str) -> None:
    """Kill a stage three times, at any moment of so many seconds: while it loads, computes, saves or writes
    its model. Then let it end.
    """
    draw = random.Random(seed)
    for _ in range(3):
        killed = run_until(after(draw.uniform(0.2, 1.0) * within), folder.stage, *words, "resume=true")
        assert killed.status in (-9, 0), killed.output
        if (folder.path / "stage.json").exists():
            return
    resumed = run_stage(folder.stage, *words, "resume=true")
    assert resumed.status == 0, resumed.output


@pytest.mark.parametrize("stage", ["sft", "collect", "rm"])
def test_killed_at_any_moment_is_as_uninterrupted(tiny_run: Path, tmp_path: Path, stage: str) -> None:
    whole, words = start_of(stage, tiny_run, tmp_path / "whole")
    started = time.monotonic()
    assert run_stage(stage, *words).status == 0
    seconds = time.monotonic() - started
    folder, words = start_of(stage, tiny_run, tmp_path / "parts")
    kill_and_resume(folder, words, within=0.7 * seconds, seed=stage)
    assert same_results(folder.path, whole.path)


def die_writing(file: str, count: int) -> None:
    """Let this process kill itself (kill -9) half way through the `count`-th state's `file`."""
    module: Any = importlib.import_module("rlhf.training_state")
    save_file, written = module.save_file, []

    def save_half(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        written.extend([path] * (path.name == file))
        if len(written) == count:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = save_half


# adapter, what the killed run is in the middle of writing, other settings
PPO_RUNS = [
    ("none", "weights.safetensors", ["kl.controller=adaptive", "kl.horizon=100"]),
    ("lora", "optimizer.safetensors", ["keep_every=2"]),
    ("qlora", "random.safetensors", []),
    ("none", "optimizer.safetensors", ["algo=rloo", "rollouts_per_prompt=4", "keep_every=4"]),
    ("none", "random.safetensors", ["algo=reinforce", "reinforce_baseline=greedy", "reward=sum"]),
    ("lora", "weights.safetensors", ["algo=reinforce", "reinforce_baseline=moving"]),
    ("none", "optimizer.safetensors", ["critic_trunk=policy", "ptx_coef=0.1"]),
]


@pytest.mark.parametrize(("adapter", "file", "settings"), PPO_RUNS)
def test_ppo_killed_anywhere_ends_bit_for_bit_as_uninterrupted(
    tiny_run: Path, tmp_path: Path, adapter: str, file: str, settings: list[str]
) -> None:
    own = [f"adapter={adapter}", "save_every=1", "eval_every=2", "eval_prompts=8", *settings]
    own += [] if adapter == "none" else ["adapter.r=4"]
    whole, words = start_of("ppo", tiny_run, tmp_path / "whole")
    started = time.monotonic()
    finished = run_stage("ppo", *words, *own)
    seconds = time.monotonic() - started
    assert finished.status == 0, finished.output

    folder, words = start_of("ppo", tiny_run, tmp_path / "parts")
    words += own
    before = 3 if file == "weights.safetensors" else 2  # the first evaluation writes weights too
    killed = run_stage("ppo", *words, "resume=true", first=functools.partial(die_writing, file, before + 1))
    assert killed.status == -9, killed.output
    assert [*(folder.path / "state").glob(f".step_3.*.tmp/{file}")], "nothing was left half written"
    assert saved(folder, "step_2")()

    kill_and_resume(folder, words, within=0.6 * seconds, seed=adapter)
    assert same_results(folder.path, whole.path)
    assert (folder.path / "samples.jsonl").read_bytes() == (whole.path / "samples.jsonl").read_bytes()
    kept = [sorted(run.path.glob("update_*/model.safetensors")) for run in (folder, whole)]
    every = next((int(each[-1]) for each in settings if each.startswith("keep_every=")), 99)
    names = [f"update_{update}" for update in range(every, 6, every)]
    if read_json(whole.path / "stage.json")["results"]["kept_update"] != 6 and names:
        names.append("update_6")  # the last policy is not the model
    assert [path.parent.name for path in kept[1]] == names
    assert [path.read_bytes() for path in kept[0]] == [path.read_bytes() for path in kept[1]]
    assert not (folder.path / "state").exists()


def test_evaluation_reads_back_what_was_sampled(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / tiny_run.name
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("evaluate"))
    words = [f"runs={run.parent}", *SMALL["evaluate"], "force=true"]
    store = run.parent / ".evaluated"

    def kept(kind: str) -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in (store / kind).glob("*.json")}

    assert run_until(lambda: len(kept("generations")) > 1, "evaluate", *words).status == -9
    before = kept("generations")
    assert run_until(lambda: bool(kept("exposure")), "evaluate", *words, "resume=true").status == -9
    assert kept("generations").items() >= before.items()
    measured = kept("exposure")
    assert run_stage("evaluate", *words, "resume=true").status == 0
    assert kept("exposure").items() >= measured.items()
    reports = [read_json(each / "evaluate" / "report.json") for each in (run, tiny_run)]
    ours, theirs = (
        json.dumps(report["systems"]).replace(str(at), "")
        for report, at in zip(reports, (run, tiny_run), strict=True)
    )
    assert ours == theirs
    # again, with one system more, from elsewhere: the others are neither sampled, scored nor measured
    everything = {kind: kept(kind) for kind in ("generations", "scores", "logprobs", "exposure")}
    assert all(everything.values())
    saved = shutil.copy(run / "evaluate" / "generations" / "sft.jsonl", tmp_path / "saved.jsonl")
    added = f"systems.other={{generations: {saved}}}"
    assert run_stage("evaluate", *words, "overwrite=true", added).status == 0
    again = read_json(run / "evaluate" / "report.json")["systems"]
    other = again.pop("other")
    assert again == reports[0]["systems"]
    assert (other["kl"], other["share_ended"]) == (None, None) and other["gold"] is not None
    assert {kind: kept(kind) for kind in ("generations", "logprobs", "exposure")} == {
        kind: found for kind, found in everything.items() if kind != "scores"
    }


def test_other_settings_are_refused_by_name(tiny_run: Path, tmp_path: Path) -> None:
    folder, words = start_of("ppo", tiny_run, tmp_path)
    assert run_until(saved(folder, "step_2"), "ppo", *words).status == -9
    for setting, named in (("kl.coef=0.5", "kl.coef (0.05 -> 0.5)"), ("seed=7", "seed (1 -> 7)")):
        refused = run_stage("ppo", *words, "resume=true", setting)
        assert named in refused.error and "overwrite=true" in refused.error
    # what changes no number may change, and so may the place of the whole run
    moved = tmp_path / "elsewhere" / "under another name"
    moved.parent.mkdir()
    folder.path.parent.rename(moved)
    words = [*words[1:], f"runs={moved.parent}", f"name={moved.name}", "keep_last=2", "save_every=1"]
    resumed = run_stage("ppo", *words, "resume=true")
    assert resumed.status == 0, resumed.output
    assert same_results(moved / "ppo", tiny_run / "ppo")


def test_with_nothing_to_resume_a_run_starts_afresh(tiny_run: Path, tmp_path: Path) -> None:
    folder, words = start_of("collect", tiny_run, tmp_path)
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml").write_text("left: by a run that was killed before its first state\n")
    result = run_stage("collect", *words, "resume=true")
    assert result.status == 0, result.output
    assert same_results(folder.path, tiny_run / "collect")


def test_states_are_saved_where_the_log_has_a_line() -> None:
    """Between log lines the Trainer holds a running mean that no checkpoint keeps."""
    import torch

    from rlhf.config import load_config
    from rlhf.engine import Engine
    from rlhf.training import trainer_arguments

    engine = Engine(torch.device("cpu"), torch.float32)
    folder = StageFolder("runs", "name", "sft")
    config = load_config("sft", ["model=tiny", "data=toy", "log_steps=10", "save_steps=25"])
    with pytest.raises(ValueError, match="save_steps=25 is no multiple of log_steps=10"):
        trainer_arguments(config, folder, engine, 100)
    config = load_config("sft", ["model=tiny", "data=toy", "engine.micro_batch_size=3"])
    with pytest.raises(ValueError, match=r"batch_size=16 is no multiple of engine\.micro_batch_size=3"):
        trainer_arguments(config, folder, engine, 100)
