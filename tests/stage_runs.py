"""Run stages as the command line does, in processes forked from one that has the heavy libraries loaded."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import PROJECT_DIR

STAGES = ("sft", "collect", "rm", "ppo", "evaluate")
LONGEST_RUN = 120.0

# Enough for every stage to have something to do, in seconds on one core.
COMMON = ("model=tiny", "data=toy", "tracker=none")
OWN = {
    "sft": ("examples=400", "epochs=2", "eval_examples=32", "log_steps=5", "save_steps=10"),
    "collect": ("num_prompts=80", "samples_per_prompt=3", "batch_size=12"),
    "rm": ("epochs=2", "log_steps=2", "save_steps=4", "calibration_prompts=32"),
    # warm-up: with the default one a draw of update 5 is so near between two tokens that rounding decides
    "ppo": ("updates=6", "batch_size=24", "save_every=2", "warmup_updates=1"),
    "evaluate": (
        *("num_prompts=16", "batch_size=6", "bootstrap=200", "num_samples=3"),
        *("oracle=${model.path}", "prefix_lengths=[4, 16]"),
    ),
}
SMALL = {stage: (*COMMON, *words) for stage, words in OWN.items()}

_server: Any = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [f"stages.{stage}" for stage in STAGES] + ["sklearn.linear_model", "matplotlib"]
)


@dataclass(frozen=True)
class Result:
    """How a run ended: its exit status (-9 where it was killed) and what it printed."""

    status: int
    output: str

    @property
    def error(self) -> str:
        """The one line of a user's error; asserts that there was nothing worse."""
        assert self.status == 2, self.output
        assert "Traceback" not in self.output, self.output
        (line,) = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return line


def run_stage(stage: str, *words: str, first: Callable[[], None] | None = None) -> Result:
    """Run a stage to its end; its process calls `first` before it begins."""
    return run_until(lambda: False, stage, *words, first=first)


def run_until(
    reached: Callable[[], bool], stage: str, *words: str, first: Callable[[], None] | None = None
) -> Result:
    """Run a stage and kill it (kill -9) as soon as `reached()` is true."""
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_DIR), path]))
    output = Path(next(word for word in words if word.startswith("runs=")).removeprefix("runs="))
    output = output.parent / f".{stage}.{time.monotonic_ns()}.txt"
    child = _server.Process(target=_child, args=(str(output), [f"stage={stage}", *words], first))
    child.start()
    os.environ["PYTHONPATH"] = path
    deadline = time.monotonic() + LONGEST_RUN
    while child.is_alive() and not reached():
        assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
        child.join(0.002)
    if child.is_alive():
        child.kill()
    child.join()
    return Result(child.exitcode, output.read_text(encoding="utf-8"))


def run_chain(folder: Path, *words: str, stages: Sequence[str] = STAGES, name: str = "tiny-toy") -> Path:
    """Run stages one after the other with small budgets and `words`; return the run's folder."""
    for stage in stages:
        common = () if any(word.startswith("model") for word in words) else COMMON
        result = run_stage(
            stage,
            *common,
            *OWN[stage],
            "tracker=none",
            *words,
            f"runs={folder}/runs",
            f"name={name}",
            "force=true",
        )
        assert result.status == 0, result.output
    return folder / "runs" / name


def scorer_of(folder: Path) -> Any:
    """The reward model in a folder as this project scores with it: plain text, float32, on the processor."""
    import torch

    from rlhf.engine import Engine
    from rlhf.models.loading import LoadOptions, load_reward_model, load_tokenizer
    from rlhf.rewards import RewardModelScorer
    from rlhf.text import TextCodec

    engine = Engine(torch.device("cpu"), torch.float32)
    codec = TextCodec(load_tokenizer(str(folder)), style="plain")
    return RewardModelScorer(load_reward_model(str(folder), LoadOptions()), codec, engine, name="rm")


def same_results(folder: Path, other: Path) -> bool:
    """Whether two runs of a stage wrote the same metrics, records and weights, bit for bit."""
    import torch
    from safetensors.torch import load_file

    names = [name for name in ("metrics.jsonl", "ranked.jsonl") if (other / name).exists()]
    assert names, f"nothing to compare in {other}"
    if any((folder / name).read_bytes() != (other / name).read_bytes() for name in names):
        return False
    if not (other / "model").exists():
        return True
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


SAY_FOUND = """
import json, os, sys
from rlhf.processes import leave, processes
if processes().is_main:
    print(json.dumps(found))
leave()
sys.stdout.flush()
os._exit(0)
"""


def first_of_two_says(script: str, *words: str) -> Any:
    """What a Python script leaves in `found`, in the first of two processes that run it together."""
    from stages.launch import Place, start

    command = [sys.executable, "-c", script + SAY_FOUND, *words]
    started = start(command, Place(2, 2, 0, None), None, stdout=subprocess.PIPE, text=True)
    said = [process.communicate(timeout=LONGEST_RUN)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return json.loads(said[0].splitlines()[-1])


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    """Read a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _child(output: str, words: list[str], first: Callable[[], None] | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    from stages.__main__ import main

    if first is not None:
        first()
    status = main(words)
    sys.stdout.flush()
    sys.exit(status)
