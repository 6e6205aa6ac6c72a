"""Processes that torchrun, accelerate or DeepSpeed's launcher started do the work of those of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import PROJECT_DIR, load_config
from rlhf.processes import ADDRESS, COUNT, LOCAL_RANK, RANK, STORE
from stages.foreign import FOREIGN, check_fits, check_stage, is_foreign, taken_over
from tests.stage_runs import SMALL, same_results

SECOND_OF_TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def start_as(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    monkeypatch.setattr(os, "environ", variables)


def test_the_variables_of_another_launcher_give_way_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}
    start_as(monkeypatch, **SECOND_OF_TWO, **torchrun, **accelerate, CUDA_VISIBLE_DEVICES="4,7", HOME="/")
    assert taken_over(["stage=ppo"]) == ["stage=ppo", "num_processes=2"]
    assert os.environ == {
        **{RANK: "1", COUNT: "2", LOCAL_RANK: "1", ADDRESS: "10.0.0.1:29500", STORE: "rlhf/1"},
        **{FOREIGN: "1", "CUDA_VISIBLE_DEVICES": "7", "OMP_NUM_THREADS": "3", "HOME": "/"},
    }
    assert is_foreign()


def test_where_a_launcher_holds_no_store_the_first_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    start_as(monkeypatch, **SECOND_OF_TWO, LOCAL_SIZE="100000")
    words = ["--local_rank=1", "stage=ppo", "num_processes=2"]
    assert taken_over(words) == ["stage=ppo", "num_processes=2"]
    assert STORE not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1" and os.environ["OMP_NUM_THREADS"] == "1"


def test_one_process_and_our_own_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ({}, {**SECOND_OF_TWO, "WORLD_SIZE": "1"}, {**SECOND_OF_TWO, RANK: "0", COUNT: "4"}):
        start_as(monkeypatch, **variables)
        assert taken_over(["stage=ppo"]) == ["stage=ppo"] and os.environ == variables and not is_foreign()


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("MASTER_ADDR", "WORLD_SIZE=2, but MASTER_ADDR is not set"),
        ("MASTER_PORT", "MASTER_PORT=: the launcher"),
        ("RANK", "RANK=: the launcher"),
    ],
)
def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, message: str) -> None:
    start_as(monkeypatch, **{name: text for name, text in SECOND_OF_TWO.items() if name != variable})
    with pytest.raises(ValueError, match=message):
        taken_over(["stage=ppo"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "5"}, "RANK=5 of WORLD_SIZE=2: the launcher that sets them counts from 0"),
        ({"RANK": "-1"}, "RANK=-1 of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "RANK=0 of WORLD_SIZE=-2"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1", "LOCAL_SIZE": "1"}, "LOCAL_RANK=1 of LOCAL_SIZE=1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 of WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 of WORLD_SIZE=2"),
    ],
)
def test_a_rank_that_cannot_be_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    start_as(monkeypatch, **SECOND_OF_TWO | variables)
    with pytest.raises(ValueError, match=message):
        taken_over(["stage=ppo"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_processes=2"], "engine=single is one process, but WORLD_SIZE=2: set engine=ddp or zero2"),
        (["engine=ddp", "num_processes=3"], "num_processes=3, but the launcher started WORLD_SIZE=2: leave"),
        (
            ["engine=ddp", "num_processes=2", "hostfile=x"],
            "hostfile=x is for ./launch.sh.*leave hostfile= out",
        ),
        (["engine=ddp", "num_processes=2", "num_machines=2"], "num_machines=2 is for"),
        (["engine=ddp", "num_processes=2", "machine_rank=1"], "machine_rank=1 is for"),
        (["engine=ddp", "num_processes=2", "main_address=x"], "main_address=x is for"),
        (["engine=ddp", "num_processes=2", "main_port=29500"], "main_port=29500 is for"),
    ],
)
def test_settings_that_say_otherwise_are_refused(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv(COUNT, "2")
    with pytest.raises(ValueError, match=message):
        check_fits(load_config("ppo", words))


def test_settings_that_fit_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COUNT, "2")
    check_stage("ppo")
    check_fits(load_config("ppo", ["engine=zero2", "num_processes=2"]))


def test_what_starts_processes_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COUNT, "2")
    with pytest.raises(ValueError, match="stage=all starts processes itself, and WORLD_SIZE=2"):
        check_stage("all")


@pytest.mark.slow
def test_torchrun_has_the_numbers_of_our_own_launcher(tmp_path: Path) -> None:
    words = ["stage=sft", *SMALL["sft"], "examples=64", "epochs=1", "force=true", "engine=ddp"]
    # the cache is empty: data and model are made once, before both read them
    environment = {**os.environ, "RLHF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    commands = {
        "theirs": [*torchrun, "-m", "stages", *words],
        "ours": [sys.executable, "-m", "stages", *words, "num_processes=2"],
    }
    for name, command in commands.items():
        where = [f"runs={tmp_path}", f"name={name}"]
        done = subprocess.run(
            [*command, *where], cwd=PROJECT_DIR, env=environment, timeout=200, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("; model in") == 1, "one process alone speaks"
    assert same_results(tmp_path / "theirs" / "sft", tmp_path / "ours" / "sft")
    again = subprocess.run(
        [*commands["theirs"], f"runs={tmp_path}", "name=theirs"],
        cwd=PROJECT_DIR,
        env=environment,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert again.stderr.count("error: stage sft is finished") == 1, again.stderr
