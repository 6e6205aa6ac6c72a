"""The README's commands and its Python example are what it says they are."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import PROJECT_DIR, load_config, split_overrides
from stages import compare, experiments, seeds

README = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every ./launch.sh line with a stage of its own in the README and in the configuration files."""
    lines = re.findall(r"^(?:# )?(\./launch\.sh stage=.*)$", README, flags=re.MULTILINE)
    for file in (PROJECT_DIR / "configs").rglob("*.yaml"):
        lines += re.findall(
            r"^# (\./launch\.sh stage=.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    return sorted({line for line in lines if "|" not in line and "..." not in line})


@pytest.mark.parametrize("command", commands())
def test_every_command_is_a_valid_configuration(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    stage = next(word.removeprefix("stage=") for word in words if word.startswith("stage="))
    overrides = [word for word in words if not word.startswith("stage=")]
    if stage == "test":
        return
    if stage == "compare":
        compare.plan(overrides)
        return
    if stage in ("exposure", "overoptimization"):
        experiments.plan(stage, overrides)
        return
    if any(word.startswith(seeds.KEY) for word in overrides):
        overrides = next(iter(seeds.plan(overrides)[1].values()))
    for name, its in split_overrides(overrides).items() if stage == "all" else [(stage, overrides)]:
        load_config(name, its)


def test_the_python_example_runs_one_update() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    # one update is epochs x minibatches optimizer steps, and it starts on the weights that sampled
    assert names["metrics"]["optimizer_steps"] == names["config"].epochs * names["config"].minibatches
    assert abs(names["metrics"]["first_ratio"] - 1) < 1e-5
