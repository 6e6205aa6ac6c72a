"""The door: launch.sh and the one entry point, run as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config import PROJECT_DIR, STAGES, load_config, resolved_yaml
from stages import all as all_stages
from stages.__main__ import main, quiet_libraries, resume_command

HELP = (PROJECT_DIR / "stages" / "help.txt").read_text(encoding="utf-8")
TINY = ["model=tiny", "data=toy"]


def call(*command: str, folder: Path = PROJECT_DIR, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(PROJECT_DIR), **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of the program with spaces in its path and stages that only say how they were called."""
    copy = tmp_path / "a project (1)"
    for name in ("rlhf", "configs", "stages"):
        shutil.copytree(PROJECT_DIR / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy2(PROJECT_DIR / name, copy / name)
    for stage in STAGES:
        (copy / "stages" / f"{stage}.py").write_text(FAKE_STAGE.replace("STAGE", stage), encoding="utf-8")
    return copy


FAKE_STAGE = """
import json, os, sys, time
from pathlib import Path
from rlhf.checkpoint import StageFolder
from rlhf.config import load_config, resolved_yaml

KINDS = {"collect": "records", "rm": "reward_model"}

def main(overrides):
    config = load_config("STAGE", overrides)
    folder = Path(config.runs) / config.name / "STAGE"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "ranked.jsonl").touch()
    called = {"words": overrides, "cwd": os.getcwd(), "path": sys.path}
    (folder / "called.json").write_text(json.dumps(called))
    if config.seed == 13:
        raise ValueError("seed=13: unlucky")
    while config.seed == 99:
        time.sleep(0.05)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    kind = KINDS.get("STAGE", "policy")
    StageFolder(config.runs, config.name, "STAGE").finish(kind, parents=[], checks=[])
"""


def launch(project: Path, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    # the environment of these tests counts as the active one, so nothing is installed
    return call(
        str(project / "launch.sh"),
        *words,
        folder=folder or project.parent,
        VIRTUAL_ENV=sys.prefix,
        PYTHONPATH="",
    )


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"], ["stage=ppo", "--help"]])
def test_help_comes_without_an_environment(words: list[str]) -> None:
    result = call(
        "bash", str(PROJECT_DIR / "launch.sh"), *words, PATH="/usr/bin:/bin", VIRTUAL_ENV="/nowhere"
    )
    assert (result.returncode, result.stdout) == (0, HELP)


def test_python_prints_the_same_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == HELP


def test_help_names_every_stage() -> None:
    for stage in (*STAGES, "all", "test"):
        assert f"\n  {stage} " in HELP


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=3"], "no stage given: stage= is one of all, sft"),
        (["ppo"], "no stage given: did you mean stage=ppo?"),
        (["stge=ppo"], "no stage given: did you mean stage=ppo?"),
        (["stage=sft", "stage=rm"], "2 stages given"),
        (["stage=pppo"], "stage=pppo: did you mean ppo?"),
        (["stage=test"], "stage=test is run by launch.sh"),
        (["stage=ppo", "kl.coeff=1"], "kl.coeff is not a key of stage ppo; did you mean kl.coef?"),
        (["stage=all", "kl.coeff=1"], "kl.coeff is not a key of any stage; did you mean kl.coef?"),
        (
            ["stage=all", "rm.centring=1"],
            "stage rm: centring is not a key of stage rm; did you mean centering?",
        ),
        (["stage=all", "tracker=no"], "stage sft: tracker=no: one of"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_traceback_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no stage given"):
        main(["seed=3"])


@pytest.mark.parametrize("stage", [*STAGES, "all"])
def test_show_prints_configuration_inputs_and_estimate(
    stage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quiet_libraries()
    before = dict(os.environ)
    assert main([f"stage={stage}", "show=true", f"runs={tmp_path}", *TINY]) == 0
    assert dict(os.environ) == before, "what later processes would inherit"
    shown = capsys.readouterr().out
    for part in (": configuration", "# inputs", "# estimate", "# result", "not there yet"):
        assert part in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["ppo", "all", "exposure"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_processes=2"], "num_processes=2 needs several processes: set engine=ddp or zero2"),
        (["engine=zero2"], "engine=zero2: give num_processes="),
        (["engine=ddp", "num_processes=3", "num_machines=2"], "num_processes=3 is no multiple of"),
        (["engine=ddp", "num_processes=2", "num_machines=2"], "num_machines=2: give main_address="),
        (["engine=ddp", "num_processes=4", "num_machines=2", "machine_rank=2"], "machine_rank=2 of num_mach"),
        (["engine=ddp", "hostfile=nowhere"], "hostfile=nowhere: no such file"),
        (["engine=ddp", "hostfile=hosts", "num_processes=2"], "hostfile= says how many processes"),
    ],
)
def test_show_refuses_what_a_run_would(
    stage: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"stage={stage}", "show=true", *TINY, *words]) == 2
    shown, error = capsys.readouterr()
    assert not shown and message in error and error.count("\n") == 1


def test_show_counts_the_processes_of_a_hostfile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def memory(*words: str) -> str:
        assert (
            main(["stage=ppo", "show=true", "adapter=none", "engine=zero2", f"runs={tmp_path}", *words]) == 0
        )
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))

    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=8\n")
    assert memory(f"hostfile={hosts}") == memory("num_processes=8") != memory("num_processes=1")


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    several = ["engine=zero2", "num_processes=2", "engine.device=cuda"]
    assert main(["stage=sft", *TINY, f"runs={tmp_path}/runs", *several]) == 2
    assert "engine.device=cuda, but this machine shows no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_show_tells_finished_parents_from_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "n" / "sft").mkdir(parents=True)
    (tmp_path / "n" / "rm").mkdir()
    (tmp_path / "n" / "sft" / "stage.json").write_text("{}", encoding="utf-8")
    main(["stage=ppo", "show=true", f"runs={tmp_path}", "name=n", "data.prompts.ppo=./nowhere.jsonl", *TINY])
    shown = capsys.readouterr().out
    assert "n/sft/model  (stage sft, finished)" in shown
    assert "n/rm/model  (stage rm, started, not finished)" in shown
    assert "./nowhere.jsonl  (missing)" in shown


def test_show_tells_whether_an_embedded_model_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    main(["stage=sft", "show=true", f"runs={tmp_path}", *TINY])
    assert "tiny  (embedded, made on first use)" in capsys.readouterr().out
    (tmp_path / "models" / "tiny-gpt2-bytes").mkdir(parents=True)
    main(["stage=sft", "show=true", f"runs={tmp_path}", *TINY])
    assert "tiny  (embedded, in the cache)" in capsys.readouterr().out


def test_show_loads_no_heavy_library() -> None:
    program = "import sys; from stages.__main__ import main; main(['stage=all', 'show=true']);"
    program += "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    result = call(sys.executable, "-c", program)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_launch_runs_from_any_folder_with_spaces_in_every_path(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "my folder"
    elsewhere.mkdir()
    # what lies here must not be taken for a library
    for name in ("rlhf", "stages", "torch"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    result = launch(
        project, "stage=sft", "runs=my runs", "name=é 'x' = {1}", "model=./my model (2)", folder=elsewhere
    )
    assert (result.returncode, result.stderr) == (0, "")
    called = json.loads(
        (elsewhere / "my runs" / "é 'x' = {1}" / "sft" / "called.json").read_text(encoding="utf-8")
    )
    assert called["words"] == ["runs=my runs", "name=é 'x' = {1}", "model=./my model (2)"]
    assert called["cwd"] == str(elsewhere)
    assert called["path"][0] == str(project)
    assert called["path"][-1] == str(elsewhere)
    assert str(project / "stages") not in called["path"]


def test_launch_works_through_a_link(project: Path, tmp_path: Path) -> None:
    link = tmp_path / "rlhf link"
    link.symlink_to(project / "launch.sh")
    result = call(str(link), "stage=sft", "show=true", folder=tmp_path, VIRTUAL_ENV=sys.prefix, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    assert f"{project}/runs/smollm2-film_reviews/sft" in result.stdout


def test_launch_names_an_active_environment_without_python(project: Path, tmp_path: Path) -> None:
    result = call(str(project / "launch.sh"), "stage=sft", VIRTUAL_ENV=str(tmp_path))
    assert result.returncode == 2
    assert "has no bin/python: deactivate it" in result.stderr


def test_launch_names_the_remedy_where_no_python_fits(project: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "readlink"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tools / "python3").chmod(0o755)
    result = call(
        str(tools / "bash"),
        str(project / "launch.sh"),
        "stage=sft",
        PATH=str(tools),
        VIRTUAL_ENV="",
        CONDA_PREFIX="",
    )
    assert result.returncode == 2
    assert "no Python 3.10 to 3.13 found: install one" in result.stderr


def test_all_runs_the_stages_in_order_with_their_keys(project: Path, tmp_path: Path) -> None:
    words = ["runs=my runs", "name=n", "sft.learning_rate=1", "samples_per_prompt=3", "seed=2"]
    result = launch(project, "stage=all", *words, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    headlines = [line.split("]")[0] + "]" for line in result.stdout.splitlines() if line.startswith("[")]
    assert headlines == [f"[{i}/5]" for i in range(1, 6)]
    assert f"report: {tmp_path}/my runs/n/evaluate/report.html" in result.stdout
    run = tmp_path / "my runs" / "n"
    called = {stage: json.loads((run / stage / "called.json").read_text())["words"] for stage in STAGES}
    assert called["sft"] == ["runs=my runs", "name=n", "sft.learning_rate=1", "seed=2"]
    assert called["collect"] == ["runs=my runs", "name=n", "samples_per_prompt=3", "seed=2"]
    assert called["rm"] == ["runs=my runs", "name=n", "seed=2"]


def test_all_stops_at_the_first_failure_and_goes_on_from_there(project: Path, tmp_path: Path) -> None:
    words = ["runs=r", "name=n"]
    failed = launch(project, "stage=all", *words, "rm.seed=13", folder=tmp_path)
    assert failed.returncode == 2
    assert "error: seed=13: unlucky" in failed.stderr
    assert "status 2; with its cause mended, go on with: ./launch.sh stage=all runs=r name=n" in failed.stderr
    assert not (tmp_path / "r" / "n" / "ppo").exists()

    again = launch(project, "stage=all", *words, folder=tmp_path)
    assert again.returncode == 2
    assert "sft is finished: resume=true keeps it, overwrite=true replaces it" in again.stderr

    resumed = launch(project, "stage=all", *words, "resume=true", folder=tmp_path)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "[1/5] sft: skipped, finished in" in resumed.stdout
    assert "[3/5] rm: " in resumed.stdout
    assert "[3/5] rm: skipped" not in resumed.stdout


def finish(runs: Path, *stages: str) -> None:
    for stage in stages:
        folder = runs / "n" / stage
        folder.mkdir(parents=True)
        config = load_config(stage, [f"runs={runs}", "name=n"])
        (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
        (folder / "stage.json").write_text("{}", encoding="utf-8")


def test_a_finished_stage_with_other_settings_is_not_skipped_silently(tmp_path: Path) -> None:
    finish(tmp_path, "sft")
    configs = all_stages.load_configs([f"runs={tmp_path}", "name=n", "resume=true", "sft.batch_size=3"])
    with pytest.raises(ValueError, match=r"finished with other settings \(batch_size\): overwrite=true"):
        all_stages.reasons_to_skip(configs)


def test_a_finished_stage_on_an_unfinished_one_is_refused(tmp_path: Path) -> None:
    finish(tmp_path, "rm")
    configs = all_stages.load_configs([f"runs={tmp_path}", "name=n", "resume=true"])
    with pytest.raises(ValueError, match="rm is finished, but sft before it is not"):
        all_stages.reasons_to_skip(configs)


def test_stages_behind_one_that_is_being_replaced_run_again(tmp_path: Path) -> None:
    finish(tmp_path, "collect", "rm")
    (tmp_path / "n" / "sft.before").mkdir()
    configs = all_stages.load_configs([f"runs={tmp_path}", "name=n", "resume=true"])
    assert all_stages.reasons_to_skip(configs) == ({}, {"collect", "rm", "ppo", "evaluate"})


def test_a_stage_whose_parent_was_replaced_runs_again(tmp_path: Path) -> None:
    finish(tmp_path, "sft", "collect", "rm")
    (tmp_path / "weights").write_text("others by now")
    parent = {"key": "base", "path": str(tmp_path / "weights"), "sha256": "of those before"}
    (tmp_path / "n" / "rm" / "stage.json").write_text(json.dumps({"parents": [parent]}))
    configs = all_stages.load_configs([f"runs={tmp_path}", "name=n", "resume=true"])
    skipped, again = all_stages.reasons_to_skip(configs)
    assert (set(skipped), again) == ({"sft", "collect"}, {"rm", "ppo", "evaluate"})


def test_overwrite_runs_everything_again(tmp_path: Path) -> None:
    finish(tmp_path, *STAGES)
    configs = all_stages.load_configs([f"runs={tmp_path}", "name=n", "overwrite=true"])
    assert all_stages.reasons_to_skip(configs) == ({}, set())


def test_collect_is_skipped_where_the_data_has_ranked_lists(tmp_path: Path) -> None:
    configs = all_stages.load_configs([f"runs={tmp_path}", "name=n", "data.ranked.train=mine.jsonl"])
    reason = "data=film_reviews has ranked lists of its own"
    assert all_stages.reasons_to_skip(configs) == ({"collect": reason}, set())


@pytest.mark.parametrize("stage", ["sft", "all"])
def test_an_interrupt_reaches_the_stage_and_says_how_to_go_on(
    project: Path, tmp_path: Path, stage: str
) -> None:
    command = [str(project / "launch.sh"), f"stage={stage}", "runs=r", "name=a b", "seed=99"]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": ""}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    called = tmp_path / "r" / "a b" / "sft" / "called.json"
    deadline = time.monotonic() + 60
    while not called.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"./launch.sh stage={stage} runs=r 'name=a b' seed=99 resume=true" in error
    assert "Traceback" not in error


def test_an_interrupt_before_a_finished_stage_was_touched_asks_for_the_same_command(tmp_path: Path) -> None:
    words = ["stage=sft", f"runs={tmp_path}", "name=n", "overwrite=true"]
    assert resume_command(words) == f"./launch.sh stage=sft runs={tmp_path} name=n resume=true"
    (tmp_path / "n" / "sft").mkdir(parents=True)
    (tmp_path / "n" / "sft" / "stage.json").write_text("{}")
    assert resume_command(words) == f"./launch.sh stage=sft runs={tmp_path} name=n overwrite=true"


def test_scripts_are_plain_bash() -> None:
    for script in ("launch.sh", ".ci/run"):
        path = PROJECT_DIR / script
        assert os.access(path, os.X_OK)
        assert call("bash", "-n", str(path)).returncode == 0
        text = path.read_text(encoding="utf-8")
        # bash 3.2, which macOS has, knows none of these
        for later in (
            "mapfile",
            "readarray",
            "declare -A",
            "local -A",
            ",,}",
            "^^}",
            "&>>",
            "|&",
            "local -n",
        ):
            assert later not in text, f"{script} uses {later}"
