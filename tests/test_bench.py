"""stage=bench measures what it says, on the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import load_config
from stages.bench import run_part, table

pytestmark = pytest.mark.slow


def test_the_bench_runs_and_writes_its_tables(tmp_path: Path) -> None:
    from stages.bench import main

    words = [
        "model=tiny",
        f"runs={tmp_path}",
        "name=x",
        "batch_size=4",
        "prompt_tokens=6",
        "response_tokens=4",
    ]
    main([*words, "updates=2", "adapters=[none,lora]", "engine.device=cpu"])
    found = json.loads((tmp_path / "x" / "bench" / "bench.json").read_text())
    assert found["products"]["limit"] > 1e8 and min(found["sampler"].values()) > 0
    assert not found["ppo"]["none"]["one_trunk"] and found["ppo"]["lora"]["one_trunk"]
    for row in found["ppo"].values():
        seconds = sum(row["seconds"].values())
        assert row["episodes_per_s"] * seconds == pytest.approx(8)
        assert 0 < row["flops"]["whole"] < found["products"]["limit"]
        assert 0.1 < row["peak_memory_gib"] < 4
    report = (tmp_path / "x" / "bench" / "bench.md").read_text()
    assert "one base for four roles" in report and "Hugging Face generate" in report


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
    }
    row |= {"one_trunk": False, "flops": {"whole": 5e9}, "tokens_per_s": {"score": 10.0, "learn": 5.0}}
    found = {
        "products": {"float32": 1e10, "limit": 1e10},
        "sampler": {"ours": 30.0, "generate": 10.0},
        "ppo": {"none": row},
        "peer": {"none": {"episodes_per_s": 1.5, "peak_rss_gib": 4.0}},
        "settings": {"updates": 1},
    }
    text = table(found, command="./launch.sh stage=bench")
    assert "| none | 1.50 | 4.00 | 2.00 | 25% |" in text
    assert "Memory held, none: 1.500 GiB after update 2, 2.000 after update 10." in text
    assert "3.00 times as many" in text and "| 50% |" in text


def test_unknown_keys_of_the_bench_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean batch_size"):
        load_config("bench", ["batch_sise=3"])
