"""stage=bench measures what it says, on the tiny model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config import load_config
from stages.bench import run_part, table

pytestmark = pytest.mark.slow


SIZES = ["batch_size=4", "prompt_tokens=6", "response_tokens=4", "updates=2", "engine.device=cpu"]


def bench(runs: Path, *words: str) -> Any:
    """Run the bench in runs/x and read what it found."""
    from stages.bench import main

    main(["model=tiny", f"runs={runs}", "name=x", *SIZES, *words])
    return json.loads((runs / "x" / "bench" / "bench.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def found(runs: Path) -> Any:
    """What one process finds."""
    return bench(runs, "adapters=[none,lora]", "zero_processes=2")


def test_the_bench_runs_and_writes_its_tables(runs: Path, found: Any) -> None:
    assert found["products"]["limit"] > 1e8 and min(found["sampler"].values()) > 0
    assert not found["ppo"]["none"]["one_trunk"] and found["ppo"]["lora"]["one_trunk"]
    for row in found["ppo"].values():
        seconds = sum(row["seconds"].values())
        assert row["episodes_per_s"] * seconds == pytest.approx(8)
        assert 0 < row["flops"]["whole"] < found["products"]["limit"]
        assert 0.1 < row["peak_memory_gib"] < 4
        assert row["operations"] and 0 < sum(row["operations"].values()) < 1
    assert found["rollout"].keys() == {"zero2", "zero3"}
    assert all(0 < row["ready_in"] < row["seconds"] for row in found["rollout"].values())
    report = (runs / "x" / "bench" / "bench.md").read_text()
    assert "one base for four roles" in report and "Hugging Face generate" in report


def test_updates_are_timed_with_several_processes(tmp_path: Path, found: Any) -> None:
    several = bench(tmp_path, "adapters=[none]", "engine=zero3", "num_processes=2")
    row = several["ppo"]["none"]
    assert row["episodes_per_s"] * sum(row["seconds"].values()) == pytest.approx(8)
    assert row["peak_memory_gib"] > 1.5 * found["ppo"]["none"]["peak_memory_gib"], "of both together"


FIND = [
    "model=tiny",
    "prompt_tokens=10",
    "response_tokens=10",
    "find_tokens_per_pass=true",
    "adapters=[lora]",
]


def test_passes_grow_until_one_holds_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stages.bench import main

    main([*FIND, f"runs={tmp_path}", "batch_size=20", "engine.device=cpu"])
    *_, header, first, second, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["tokens_per_pass", "learning", "tokens/s", "peak", "GiB"]
    rows = {int(line.split()[0]): float(line.split()[1]) for line in (first, second)}
    assert list(rows) == [256, 512], "20 x 20 tokens fit into one pass of 512"
    fastest = max(rows, key=lambda size: rows[size])
    assert last == f"  longest that fit: engine.tokens_per_pass=512; fastest: {fastest}"


@pytest.mark.parametrize(("room", "longest"), [(2.5, 512), (4.0, 1024), (100.0, 2048)])
def test_passes_grow_until_memory_is_full(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: float,
    longest: int,
) -> None:
    import stages.bench

    def run_own(part: str, spec: dict[str, Any]) -> dict[str, Any]:
        if part == "prepare":
            return {}
        size = spec["engine"]["tokens_per_pass"]
        peak = 1.0 + size / 512  # the next one takes 3.0 after 512, 5.0 after 1024
        return {
            "fits": size < 4096,
            "tokens_per_s": -abs(size - 512),
            "peak_memory_gib": peak,
            "memory_gib": room,
        }

    monkeypatch.setattr(stages.bench, "run_own", run_own)
    stages.bench.main([*FIND, f"runs={tmp_path}", "batch_size=10000"])
    assert f"longest that fit: engine.tokens_per_pass={longest}; fastest: 512" in capsys.readouterr().out


def test_memory_of_the_next_pass_is_foreseen() -> None:
    from stages.bench import _next_peak

    peaks = {256: {"peak_memory_gib": 2.0}}
    assert _next_peak(peaks) == 2.0
    assert _next_peak(peaks | {512: {"peak_memory_gib": 2.5}}) == 3.5


def test_a_part_that_fails_is_one_error_with_what_it_said() -> None:
    with pytest.raises(ValueError, match=r"a part of the bench failed \(exit 3\):\nno such thing"):
        run_part(["sh", "-c", "echo no such thing >&2; exit 3"])


def test_ratios_to_the_peer_stand_in_the_table() -> None:
    phases = dict.fromkeys(("sample", "score", "experience", "learn", "other"), 1.0)
    row: dict[str, Any] = {
        "episodes_per_s": 3.0,
        "peak_memory_gib": 1.0,
        "dtype": "float32",
        "seconds": phases,
        "memory_gib": [1.0, 1.5, *[2.0] * 8],
        "operations": {"aten::mm": 0.75, "aten::mul": 0.125},
    }
    row |= {
        "one_trunk": False,
        "devices": 1,
        "flops": {"whole": 5e9},
        "tokens_per_s": {"score": 10.0, "learn": 5.0},
    }
    found = {
        "products": {"float32": 1e10, "limit": 1e10},
        "sampler": {"ours": 30.0, "generate": 10.0},
        "ppo": {"none": row},
        "peer": {"none": {"episodes_per_s": 1.5, "peak_rss_gib": 4.0, "ratios": [1.5, 2.5, 2.0]}},
        "settings": {"updates": 1},
    }
    text = table(found, command="./launch.sh stage=bench")
    assert "| none | 1.50 | 4.00 | 2.00 (1.50 to 2.50) | 25% |" in text
    assert "Memory held, none: 1.500 GiB after update 2, 2.000 after update 10." in text
    assert "Learning, none, by operation: aten::mm 75%, aten::mul 12%." in text
    assert "3.00 times as many" in text and "| 50% |" in text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapters=[none,lorra]", r"^adapters: did you mean lora\? lorra is none of int8, lora, none, qlora"),
        ("peer=/nope.py", "^peer=/nope.py: no such file"),
        ("num_processes=2", "^engine=single num_processes=2: several processes need both"),
        ("engine=zero2", "^engine=zero2 num_processes=null: several processes need both"),
        ("model=/nope", "^model '/nope': does not exist"),
    ],
)
def test_what_the_bench_cannot_time_is_named_before_it_starts(
    tmp_path: Path, word: str, message: str
) -> None:
    from stages.bench import main

    with pytest.raises(ValueError, match=message):
        main(["model=tiny", f"runs={tmp_path}", "name=x", word])


def test_unknown_keys_of_the_bench_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean batch_size"):
        load_config("bench", ["batch_sise=3"])


def test_what_a_gpu_computes_counts_once() -> None:
    from torch.autograd import DeviceType

    from rlhf.timing import shares

    def event(key: str, kind: DeviceType, seconds: float) -> Any:
        return SimpleNamespace(
            key=key, device_type=kind, self_device_time_total=seconds, self_cpu_time_total=1.0
        )

    events = [event("aten::mm", DeviceType.CPU, 3.0), event("aten::mul", DeviceType.CPU, 1.0)]
    events += [event("kernel of mm", DeviceType.CUDA, 3.0), event("kernel of mul", DeviceType.CUDA, 1.0)]
    assert shares(events, on_gpu=True) == {"aten::mm": 0.75, "aten::mul": 0.25}
