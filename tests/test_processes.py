"""Several processes: the numbers of one, one voice, one end."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rlhf.checkpoint import StageFolder
from rlhf.config import PROJECT_DIR, load_config
from rlhf.processes import ADDRESS, ALONE, COUNT, RANK, Processes, _meet, by_main
from stages.common import make_inputs
from stages.launch import Place, launch, place_of, start
from tests.stage_runs import SMALL, Result, read_lines, run_stage, same_results

BEFORE = {
    "sft": (),
    "collect": ("sft",),
    "rm": ("sft", "collect"),
    "ppo": ("sft", "collect", "rm"),
    "evaluate": ("sft", "collect", "rm", "ppo"),
}


def copy_of(tiny_run: Path, folder: Path, stage: str) -> Path:
    """A copy of the finished run up to `stage`."""
    run = folder / "runs" / tiny_run.name
    run.mkdir(parents=True)
    for before in BEFORE[stage]:
        shutil.copytree(tiny_run / before, run / before)
    return run


def words_of(run: Path, stage: str, count: int = 2) -> list[str]:
    several = ["engine=ddp", f"num_processes={count}"]
    return [f"runs={run.parent}", f"name={run.name}", *SMALL[stage], "force=true", *several]


def command(stage: str, *words: str) -> list[str]:
    return [sys.executable, str(PROJECT_DIR / "stages" / "__main__.py"), f"stage={stage}", *words]


def close(ours: Any, theirs: Any) -> bool:
    """Whether two lines of metrics hold the same numbers, but for rounding."""
    return ours.keys() == theirs.keys() and all(
        math.isclose(ours[key], theirs[key], rel_tol=1e-4, abs_tol=1e-5) for key in ours
    )


def has_the_numbers_of(alone: Path, run: Path, stage: str, words: list[str]) -> Result:
    """Run a stage; assert that its metrics are those that it has in `alone`, and that it speaks once."""
    result = run_stage(stage, *words)
    assert result.status == 0, result.output
    ours, theirs = (read_lines(folder / stage / "metrics.jsonl") for folder in (run, alone))
    assert len(ours) == len(theirs) >= 5
    for mine, other in zip(ours[:5], theirs[:5], strict=True):
        assert close(mine, other), (mine, other)
    assert result.output.count("; model in") == 1, "one process alone speaks"
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "count"), [("sft", 2), ("rm", 2), ("ppo", 2), ("ppo", 3)])
def test_training_has_the_numbers_of_one_process(
    tiny_run: Path, tmp_path: Path, stage: str, count: int
) -> None:
    run = copy_of(tiny_run, tmp_path, stage)
    has_the_numbers_of(tiny_run, run, stage, words_of(run, stage, count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, ["adapter=lora", "adapter.r=4", "keep_every=2"]),
        (2, ["adapter=qlora", "adapter.r=4"]),
        (3, ["batch_size=2", "minibatches=1"]),  # one process has nothing to compute
    ],
)
def test_every_kind_of_run_has_the_numbers_of_one_process(
    tiny_run: Path, tmp_path: Path, count: int, settings: list[str]
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def score(prompts, responses):\n"
        f"    with open({str(tmp_path / 'asked')!r}, 'a') as asked:\n"
        "        asked.write('x')\n"
        "    return [len(text) / 10 for text in responses]\n"
    )
    own = [*settings, "updates=3", "reward=function", f"reward.function={reward}:score"]
    alone, several = (copy_of(tiny_run, tmp_path / name, "ppo") for name in ("alone", "several"))
    assert run_stage("ppo", *words_of(alone, "ppo"), *own, "engine=single", "num_processes=null").status == 0
    result = run_stage("ppo", *words_of(several, "ppo", count), *own)
    assert result.status == 0, result.output
    ours, theirs = (read_lines(run / "ppo" / "metrics.jsonl") for run in (several, alone))
    assert all(close(mine, other) for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)
    for run in (alone, several):
        assert (run / "ppo" / "update_2" / "model.safetensors").exists() == ("keep_every=2" in settings)
    assert (tmp_path / "asked").read_text() == "x" * 6, "a reward function is asked once an update"


@pytest.mark.slow
def test_scheduled_sampling_mixes_what_one_process_mixes(tiny_run: Path, tmp_path: Path) -> None:
    own = ("exposure=scheduled_sampling", "exposure.schedule=inverse_sigmoid")
    alone, several = (copy_of(tiny_run, tmp_path / name, "sft") for name in ("alone", "several"))
    assert run_stage("sft", *words_of(alone, "sft"), *own, "engine=single", "num_processes=null").status == 0
    result = has_the_numbers_of(alone, several, "sft", [*words_of(several, "sft", 2), *own])
    assert result.status == 0
    shares = [row["gold_share"] for row in read_lines(several / "sft" / "metrics.jsonl") if "loss" in row]
    assert shares == sorted(shares, reverse=True) and shares[-1] == pytest.approx(0.25)


@pytest.mark.slow
def test_samples_and_their_evaluation_are_those_of_one_process(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "evaluate")
    shutil.rmtree(run / "collect")
    for stage in ("collect", "evaluate"):
        result = run_stage(stage, *words_of(run, stage))
        assert result.status == 0, result.output
    assert (run / "collect" / "ranked.jsonl").read_bytes() == (
        tiny_run / "collect" / "ranked.jsonl"
    ).read_bytes()
    ours, theirs = (
        json.loads((each / "evaluate" / "report.json").read_text().replace(str(each), ""))
        for each in (run, tiny_run)
    )
    for figures in ("systems", "win_rates", "differences", "verdict"):
        assert ours[figures] == theirs[figures], "to the last digit"


def wait_for(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return condition()


def children_of(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.slow
def test_one_killed_process_ends_all_and_the_run_resumes_exactly(tiny_run: Path, tmp_path: Path) -> None:
    whole = copy_of(tiny_run, tmp_path / "whole", "ppo")
    more = ["save_every=1", "updates=8"]
    assert run_stage("ppo", *words_of(whole, "ppo"), *more).status == 0

    run = copy_of(tiny_run, tmp_path / "parts", "ppo")
    words = [*words_of(run, "ppo"), *more]
    folder = StageFolder(str(run.parent), run.name, "ppo")
    with subprocess.Popen(command("ppo", *words), stderr=subprocess.PIPE, text=True) as started:
        wait_for(folder.latest_state)
        first, second = children_of(started)
        os.kill(second, signal.SIGKILL)
        _, said = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was killed by signal 9" in said and "resume=true" in said
    assert "Traceback" not in said
    assert not Path(f"/proc/{first}").exists()

    resumed = run_stage("ppo", *words, "resume=true")
    assert resumed.status == 0, resumed.output
    assert same_results(run / "ppo", whole / "ppo")


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    with subprocess.Popen(
        command("ppo", *words_of(run, "ppo"), "updates=5000"), stderr=subprocess.DEVNULL, text=True
    ) as started:
        wait_for((run / "ppo" / "metrics.jsonl").exists)
        children = children_of(started)
        started.kill()
    assert len(children) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), seconds=30)


@pytest.mark.slow
def test_ctrl_c_saves_once_and_says_how_to_go_on(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    words = [*words_of(run, "ppo"), "save_every=5000", "updates=5000"]
    with subprocess.Popen(command("ppo", *words), stderr=subprocess.PIPE, text=True) as started:
        wait_for((run / "ppo" / "metrics.jsonl").exists)
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert said.count("interrupted; to go on:") == 1 and "Traceback" not in said
    assert StageFolder(str(run.parent), run.name, "ppo").latest_state() is not None


@pytest.mark.slow
def test_an_error_is_said_once(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    missing = run_stage("ppo", *words_of(run, "ppo"), "data.prompts.ppo=nowhere.jsonl")
    assert "data.prompts.ppo: nowhere.jsonl: no such file" in missing.error  # which asserts one line


def on_machines(*commands: list[str], **environment: str) -> list[tuple[int, str]]:
    """(exit status, what was said) of each machine's command."""
    variables = {**os.environ, **environment}
    started = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True, env=variables) for each in commands]
    said = [machine.communicate(timeout=120)[1] for machine in started]
    return [(machine.returncode, text) for machine, text in zip(started, said, strict=True)]


def two_machines_of(run: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [*words_of(run, "ppo"), "num_machines=2", "main_address=127.0.0.1", f"main_port={port}"]


def same_numbers(run: Path, other: Path) -> bool:
    """Whether the first five updates of two ppo stages have the same metrics, but for rounding."""
    ours, theirs = (read_lines(folder / "ppo" / "metrics.jsonl")[:5] for folder in (run, other))
    return len(ours) == 5 and all(close(mine, line) for mine, line in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_machines_have_the_numbers_of_one(tiny_run: Path, tmp_path: Path, engine: str) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    words = [*two_machines_of(run), f"engine={engine}"]
    ended = on_machines(*(command("ppo", *words, f"machine_rank={rank}") for rank in range(2)))
    assert [status for status, _ in ended] == [0, 0], ended
    assert same_numbers(run, tiny_run)


def ip(*words: str) -> bool:
    return (
        shutil.which("ip") is not None and subprocess.run(["ip", *words], capture_output=True).returncode == 0
    )


@pytest.fixture
def two_networks() -> Iterator[list[str]]:
    """Two network namespaces with nothing but a cable between them, as two machines have."""
    names = [f"rlhf{os.getpid()}{side}" for side in "ab"]
    if not all(ip("netns", "add", name) for name in names):
        pytest.skip("this machine does not allow network namespaces")
    try:
        cable = [f"{name}v"[-15:] for name in names]
        assert ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
            inside = ("-n", name)
            assert ip("link", "set", end, "netns", name)
            assert ip(*inside, "link", "set", end, "name", "cable")
            assert ip(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            assert ip(*inside, "link", "set", "cable", "up") and ip(*inside, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_machines_on_a_network_of_their_own_have_the_numbers_of_one(
    tiny_run: Path, tmp_path: Path, two_networks: list[str]
) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    hosts = tmp_path / "hosts"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    words = [word for word in words_of(run, "ppo") if not word.startswith("num_processes")]
    there = command("ppo", *words, f"hostfile={hosts}")
    commands = [["ip", "netns", "exec", name, *there] for name in two_networks]
    ended = on_machines(*commands, GLOO_SOCKET_IFNAME="cable")
    assert [status for status, _ in ended] == [0, 0], ended
    assert same_numbers(run, tiny_run)


@pytest.mark.slow
def test_machines_that_disagree_are_found_at_the_start(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    words = two_machines_of(run)
    ended = on_machines(*(command("ppo", *words, f"machine_rank={i}", f"seed={i}") for i in range(2)))
    assert [status for status, _ in ended] == [2, 2]
    expected = (
        "error: process 1 does not have the configuration of process 0 (seed=1 instead of 0): give every"
    )
    assert expected in ended[0][1]
    assert not (run / "ppo").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_processes=2"], "num_processes=2 needs several processes: set engine=ddp or zero2"),
        (["num_machines=2"], "num_machines=2 needs several processes: set engine=ddp or zero2"),
        (["hostfile=x"], "hostfile=x needs several processes: set engine=ddp or zero2"),
        (["main_address=h"], "main_address=h needs several processes: set engine=ddp or zero2"),
        (["main_port=29501"], "main_port=29501 needs several processes: set engine=ddp or zero2"),
        (["machine_rank=1"], "machine_rank=1 needs several processes: set engine=ddp or zero2"),
        (["engine=ddp", "hostfile=x", "num_processes=2"], "hostfile= says how many"),
        (["engine=ddp"], "engine=ddp: give num_processes="),
        (
            ["engine=ddp", "num_processes=3", "num_machines=2"],
            "num_processes=3 is no multiple of num_machines=2",
        ),
        (
            ["engine=ddp", "num_processes=2", "machine_rank=1"],
            "machine_rank=1 of num_machines=1: they count from 0; give num_machines= too",
        ),
        (["engine=ddp", "num_processes=2", "num_machines=2"], "num_machines=2: give main_address="),
        (
            ["engine=ddp", "num_processes=2", "num_machines=2", "main_address=no.such.host.invalid"],
            "main_address=no.such.host.invalid leads to no address: give the IP address of machine 0",
        ),
        (
            ["engine=ddp", "num_processes=2", "main_address=no.such.host.invalid"],
            "main_address=no.such.host.i",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_of(load_config("ppo", words))


def test_one_process_is_the_default() -> None:
    assert place_of(load_config("ppo", [])).count == 1
    assert place_of(load_config("ppo", ["engine=ddp", "num_processes=4"])).count == 4


def test_a_machine_finds_its_place_in_a_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    monkeypatch.setattr("stages.launch._own_names", lambda: {"two", "10.0.0.2"})
    monkeypatch.setattr("stages.launch._address_of", {"one": "10.0.0.1", "10.0.0.2": "10.0.0.2"}.get)
    config = load_config("ppo", ["engine=ddp", f"hostfile={path}"])

    def place(text: str) -> Place:
        path.write_text(text)
        return place_of(config)

    assert place("one slots=4  # the first\n\ntwo slots=2\n") == Place(6, 2, 4, "one")
    assert place("10.0.0.2 slots=1\none slots=2\n") == Place(3, 1, 0, "10.0.0.2")
    assert place("\ufeffone slots=4\ntwo slots=2\n") == Place(6, 2, 4, "one"), "as some editors write it"
    with pytest.raises(ValueError, match=r"hosts:2: 'two'; host slots=<number of processes> is expected"):
        place("one slots=4\ntwo\n")
    with pytest.raises(ValueError, match=r"names this machine 0 times; it is known as 10.0.0.2, two"):
        place("one slots=4\n")
    with pytest.raises(ValueError, match=r"hosts: the first host, three, leads to no address"):
        place("three slots=1\ntwo slots=1\n")
    path.unlink()
    with pytest.raises(ValueError, match=r"hostfile=.*hosts: no such file"):
        place_of(config)
    path.write_bytes(b"\x7fELF\x02\xff\xfe\n")
    with pytest.raises(
        ValueError, match=r"hostfile=.*hosts cannot be read \(it is no text\): give a file of"
    ):
        place_of(config)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"hostfile=.*hosts cannot be read \(Is a directory\): give a file"):
        place_of(config)


def test_an_address_of_another_machine_is_named_where_there_is_one_alone() -> None:
    # 240.0.0.0/4 is reserved: no machine has an address in it
    with pytest.raises(ValueError, match=r"^main_address=240.0.0.1 is not an address of this machine"):
        start([sys.executable, "-c", ""], Place(2, 2, 0, "240.0.0.1"), None)


@pytest.mark.parametrize("saved", [False, True])
def test_a_killed_process_promises_to_go_on_only_where_something_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: bool
) -> None:
    killed = tmp_path / "killed.py"
    killed.write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr("stages.launch.ENTRY_POINT", killed)
    if saved:
        (tmp_path / "n" / "ppo" / "state" / "step_3").mkdir(parents=True)
    words = ["engine=ddp", "num_processes=2", f"runs={tmp_path}", "name=n"]
    assert launch("ppo", words, load_config("ppo", words)) == 128 + signal.SIGKILL
    said = capsys.readouterr().err
    assert "of 2 was killed by signal 9; the others were ended too." in said
    assert ("resume=true goes on from there" in said) == saved


@pytest.mark.slow
def test_a_port_in_use_is_named(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path, "ppo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = run_stage("ppo", *words_of(run, "ppo"), f"main_port={port}").error
    assert f"main_port={port} cannot be used (Address already in use)" in found and "main_port=" in found


def test_shares_are_put_together_in_order() -> None:
    items = list(range(7))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert ALONE.gathered([1, 2], 2) == [1, 2] and ALONE.all_of("x") == ["x"]


def test_an_error_names_what_differs_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = {"seed": 0, "kl.coef": 0.1, "name": "x"}, {"seed": 1, "name": "x", "epochs": 2}
    monkeypatch.setattr(Processes, "all_of", lambda self, mine: [first, mine])
    found = (
        r"process 1 does not have the configuration of process 0 \(seed=1 instead of 0, kl.coef=None instead "
    )
    with pytest.raises(ValueError, match=found + r"of 0.1, epochs=2 instead of None\): give every machine"):
        Processes(1, 2).check_same(other, "configuration")
    many = {str(key): key for key in range(7)}
    with pytest.raises(ValueError, match=r"1=1 instead of None, 5 more\)"):
        Processes(1, 2).check_same({**first, **many, "seed": 1, "kl.coef": 2.0, "name": "y"}, "configuration")


def test_alone_the_first_process_does_it_itself() -> None:
    assert by_main(lambda x: x + 1)(2) == 3


def meeting(*told: tuple[int, int]) -> list[subprocess.Popen[str]]:
    """Processes that were told of (rank, count) on their way to meet one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", "from rlhf.processes import processes; processes()"]
    return [
        subprocess.Popen(
            command,
            cwd=PROJECT_DIR,
            env={**os.environ, RANK: str(rank), COUNT: str(count), ADDRESS: address},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, count in told
    ]


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 4), (4, 2)])
def test_machines_that_were_told_of_other_numbers_of_processes_find_it_at_once(
    counts: tuple[int, int],
) -> None:
    for own, other, process in zip(counts, counts[::-1], meeting(*enumerate(counts)), strict=True):
        said = process.communicate(timeout=60)[1]
        assert f"told of {own} processes, another of {other}: give every machine the same num_pro" in said


@pytest.mark.slow
def test_machines_that_have_the_same_rank_find_it_at_once() -> None:
    for process in meeting((0, 3), (1, 3), (1, 3)):
        said = process.communicate(timeout=60)[1]
        assert (
            "two processes have come as number 1 of 3: give every machine a machine_rank= of its own" in said
        )


class SlowStore:
    """A store whose reader is late: a machine under load."""

    def __init__(self, store: Any, events: list[str]) -> None:
        self.store, self.events = store, events

    def get(self, key: str) -> Any:
        time.sleep(2)
        found = self.store.get(key)
        self.events.append("read")
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_the_first_process_stays_until_all_have_read_what_is_wrong() -> None:
    store, events, said = dist.HashStore(), list[str](), list[str]()

    def meet(rank: int, own: Any) -> None:
        try:
            _meet(own, rank, 3)
        except ValueError as error:
            said.append(str(error))
        events.append(f"{rank} left")

    parts = [(0, store), (1, store), (1, SlowStore(store, events))]
    threads = [threading.Thread(target=meet, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events.index("read") < events.index("0 left")
    assert len(said) == 3 and all("two processes have come as number 1 of 3" in each for each in said)


@pytest.mark.slow
def test_a_port_in_use_is_named_where_another_launcher_chose_it() -> None:
    both = meeting((0, 2), (0, 2))
    ended = wait_for(lambda: next((each for each in both if each.poll() is not None), None))
    assert ended.stderr is not None
    said = ended.stderr.read()
    for process in both:
        process.kill()
        process.wait()
    assert "of this machine is in use: end what uses it, or set main_port= (with another" in said


@pytest.mark.slow
def test_what_is_waited_for_is_said() -> None:
    for told, expected in (((1, 2), "waiting for process 0 at 127.0.0.1:"), ((0, 2), "for all 2 processes")):
        (process,) = meeting(told)
        assert process.stderr is not None
        said = process.stderr.readline()
        process.kill()
        process.communicate()
        assert said.startswith("waiting ") and expected in said


@pytest.mark.slow
def test_a_data_set_that_is_not_there_yet_is_made_for_all_processes(tmp_path: Path) -> None:
    words = [
        *SMALL["sft"],
        "examples=16",
        "eval_examples=4",
        f"runs={tmp_path}",
        "engine=ddp",
        "num_processes=2",
    ]
    command = [sys.executable, "-m", "stages", "stage=sft", *words]
    environment = {**os.environ, "RLHF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=PROJECT_DIR, env=environment, timeout=100, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_several_processes_read_is_there_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    make_inputs(load_config("sft", ["model=tiny", "data=toy", f"runs={tmp_path}"]))
    assert (tmp_path / "models" / "tiny-gpt2-bytes" / "config.json").is_file()
    assert (tmp_path / "toy" / "facts.json").is_file()
