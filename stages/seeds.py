"""stage=all seeds='[1, 2, 3]': the whole chain once for each seed, and what they say together.

That of a seed lies in <runs>/<name>/seed_<n>/<stage>, what they say together in <runs>/<name>/seeds.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path

from rlhf.config import load_config
from rlhf.gates import GATE_STATUS
from stages import all as chain
from stages.common import without_run_mode

KEY = "seeds="
INTERRUPTED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}


def plan(overrides: list[str]) -> tuple[Path, dict[int, list[str]]]:
    """Return where the report goes, and the words of each seed's chain.

    Raises ValueError for seeds that are no list of different numbers, and for `seed=` beside them.
    """
    own = [word for word in overrides if word.startswith(KEY)]
    words = [word for word in overrides if word not in own]
    for word in words:
        if word.partition("=")[0].split(".")[-1] == "seed":
            raise ValueError(f"{word}: {own[0]} says that already; leave it out")
    seeds = load_config("exposure", own).seeds
    found = chain.load_configs(words)["evaluate"]
    return Path(found.runs) / found.name / "seeds", {
        seed: [*words, f"name={found.name}/seed_{seed}", f"seed={seed}"] for seed in seeds
    }


def run(overrides: list[str]) -> int:
    """Run every seed's chain, whatever becomes of the others, and write the report.

    Returns the first exit status that is not 0, a failure's before a gate's.
    """
    folder, words = plan(overrides)
    configs = {seed: chain.load_configs(each) for seed, each in words.items()}
    for known in configs.values():
        chain.reasons_to_skip(known)
    reports, failed, first = {}, {}, 0
    for seed, each in words.items():
        print(f"seed {seed}", flush=True)
        status, failed_stage = chain.run(configs[seed], each)
        if status in INTERRUPTED:
            command = ["./launch.sh", "stage=all", *without_run_mode(overrides), "resume=true"]
            print(f"go on with: {shlex.join(command)}", file=sys.stderr)
            return status
        if first in (0, GATE_STATUS):  # a failure counts more than a gate
            first = status or first
        if failed_stage is None:
            place = chain.stage_folder("evaluate", configs[seed]["evaluate"])
            reports[seed] = json.loads((place / "report.json").read_text(encoding="utf-8"))
        else:
            failed[seed] = failed_stage
    if not reports:
        told = ", ".join(f"that of seed {seed} in stage {stage}" for seed, stage in failed.items())
        old = f"; {folder} is of an earlier run" if folder.exists() else ""
        print(f"every chain failed, {told}{old}", file=sys.stderr)
    else:
        from rlhf.evaluation.seeds_report import seeds_table, write_seeds_report
        from rlhf.evaluation.tables import print_table

        command = ["./launch.sh", "stage=all", *without_run_mode(overrides)]
        stages = {}
        for known in configs.values():
            for stage, config in known.items():
                place = chain.stage_folder(stage, config)
                if stage != "evaluate" and (place / "stage.json").exists():
                    stages[str(place)] = json.loads((place / "stage.json").read_text(encoding="utf-8"))
        report = write_seeds_report(folder, reports, failed, stages, shlex.join(command))
        print_table(seeds_table(report))
        print(*filter(None, [report["verdict"], f"report: {folder / 'report.html'}"]), sep="\n")
    return first
