"""Which engine trains which adapter, tried on the tiny model: `python -m tests.engine_matrix` prints the
table of docs/engines.md.

A cell says `yes` where the metrics of two processes are those of one without DeepSpeed, else what was said.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from tests.stage_runs import OWN, read_lines, run_chain, run_stage
from tests.test_processes import close

ENGINES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
ADAPTERS = ("none", "lora", "qlora", "int8")
BEFORE = {"sft": (), "rm": ("sft", "collect"), "ppo": ("sft", "collect", "rm")}


def words_for(adapter: str) -> list[str]:
    """The settings of all runs: an adapter small enough for the tiny model."""
    return ["model=tiny", "data=toy", f"adapter={adapter}", *(["adapter.r=4"] if adapter != "none" else [])]


def cell(stage: str, engine: str, adapter: str, chain: Path, folder: Path) -> str:
    """What came of a stage under an engine, begun with what `chain` has before it."""
    run = folder / "runs" / chain.name
    run.mkdir(parents=True)
    for before in BEFORE[stage]:
        shutil.copytree(chain / before, run / before)
    words = [*words_for(adapter), *OWN[stage], "tracker=none", "force=true", f"runs={run.parent}"]
    result = run_stage(stage, *words, f"name={chain.name}", f"engine={engine}", "num_processes=2")
    if result.status == 2:
        return result.error.removeprefix("error: ")
    if result.status:
        return f"fails: {result.output.strip().splitlines()[-1]}"
    pairs = zip(*(read_lines(each / stage / "metrics.jsonl") for each in (run, chain)), strict=True)
    return "yes" if all(close(mine, other) for mine, other in list(pairs)[:5]) else "other numbers"


def main(stages: list[str]) -> None:
    """Print a table for each stage."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for adapter in ADAPTERS:
            (folder / adapter).mkdir()
        chains = {
            adapter: run_chain(folder / adapter, *words_for(adapter), stages=("sft", "collect", "rm", "ppo"))
            for adapter in ADAPTERS
        }
        for stage in stages:
            print(f"\n| `{stage}` | " + " | ".join(f"`{adapter}`" for adapter in ADAPTERS) + " |")
            print("|---|" + "---|" * len(ADAPTERS), flush=True)
            for engine in ENGINES:
                found = [
                    cell(stage, engine, adapter, chain, folder / f"{stage}-{engine}-{adapter}")
                    for adapter, chain in chains.items()
                ]
                print(f"| `{engine}` | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(BEFORE))
