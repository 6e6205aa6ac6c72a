"""stage=chat: what it answers, beside whom, with which score, and how it ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.__main__ import main
from stages.all import ENTRY_POINT
from stages.chat import plain
from tests.stage_runs import LONGEST_RUN


def chat(run: Path, text: str, *words: str) -> str:
    command = [sys.executable, str(ENTRY_POINT), "stage=chat", "model=tiny", "data=toy"]
    command += [f"runs={run.parent}", f"name={run.name}", *words]
    typed = text.encode("utf-8", "surrogateescape")
    found = subprocess.run(command, input=typed, capture_output=True, timeout=LONGEST_RUN)
    assert found.returncode == 0 and b"Traceback" not in found.stderr, found.stderr
    return found.stdout.decode("utf-8")


@pytest.mark.slow
def test_two_checkpoints_answer_side_by_side_with_scores(tiny_run: Path) -> None:
    said = chat(
        tiny_run, "my dog is\n\n/again\nthe soup was\n/reset\n/quit\nnever\n", f"beside={tiny_run}/sft/model"
    )
    assert said.startswith("/reset forgets")
    parts = re.split(r"^.*/(ppo|sft)/model:\n", said, flags=re.MULTILINE)[1:]
    assert parts[::2] == ["ppo", "sft"] * 3, "one answer each to two lines and to /again"
    for answer in parts[1::2]:
        text, _, score = answer.rstrip("\n").rpartition("\n")
        assert text.strip() and re.fullmatch(r"  \[.*rm/model: -?\d+\.\d\d\]", score)
    assert parts[1] != parts[5], "again is another draw"
    typed = "my dog \udcff is\n/again\n"  # a byte that is no text
    _, _, greedy = chat(tiny_run, typed, "decoding=greedy", "proxy=null").partition("\n")
    assert greedy[: len(greedy) // 2] == greedy[len(greedy) // 2 :] != ""


def test_a_terminal_is_not_commanded_by_a_model() -> None:
    assert plain("a\x1b[31mb\r\x07c\n\té😀") == "a[31mbc\n\té😀"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=x"], "policy=RUNS/x/ppo/model does not exist"),
        (["engine=ddp", "num_processes=2"], "engine=ddp: stage=chat is one process; leave engine= out"),
        (["polcy=a"], "did you mean policy?"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=chat", "model=tiny", "data=toy", f"runs={tmp_path}", *words]) == 2
    error = capsys.readouterr().err
    assert message.replace("RUNS", str(tmp_path)) in error and error.count("\n") == 1
