"""What show=true prints: the resolved configuration, where each input comes from, and the estimate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import resolved_yaml
from rlhf.estimate import estimate, find_config
from rlhf.sources import EMBEDDED, embedded_place
from stages.launch import place_of

# The settings of each stage that name something to read.
INPUTS = {
    "sft": ("policy", "data.demonstrations.train", "data.demonstrations.eval"),
    "collect": ("policy", "labeller", "data.prompts.collect"),
    "rm": ("base", "calibration_policy", "ranked.train", "ranked.eval"),
    "ppo": ("policy", "critic", "reward", "data.prompts.ppo"),
    "evaluate": ("systems", "reference", "oracle", "proxy", "gold", "data.prompts.evaluate"),
}


def show(stage: str, config: Any) -> None:
    """Print what the stage would do."""
    print(f"# stage {stage}: configuration")
    print(resolved_yaml(config), end="")
    if stage == "bench":
        return
    print("\n# inputs")
    for key in INPUTS[stage]:
        for name, path in paths_in(key, value_of(config, key)):
            print(f"{name:<35} {path}  ({describe(path, config)})")
    print("\n# estimate")
    for line in estimate(stage, replace(config, num_processes=place_of(config).count)):
        print(line)
    folder = Path(config.runs) / config.name / stage
    print(f"\n# result\n{folder}  ({_folder_state(folder)})\n")


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def paths_in(name: str, value: Any) -> list[tuple[str, str]]:
    """Return (key, path) for every path in a setting: a path, a source or several, a scorer, or systems."""
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, list | tuple):
        return [found for i, part in enumerate(value) for found in paths_in(f"{name}[{i}]", part)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("checkpoints"), str):
        return [(f"{name}.checkpoints", str(Path(value["checkpoints"]) / "model"))]
    if "kind" in value:
        kept = {key: value.get(key) for key in ("path", "train", "function", "parts")}
    else:
        kept = {"path": value["path"]} if "path" in value else value  # or systems, or {generations: file}
    return [found for key, part in kept.items() for found in paths_in(f"{name}.{key}", part)]


def describe(path: str, config: Any) -> str:
    """Say what a path is: a stage's result, a file, an embedded model, data to be built, or a hub name."""
    place = Path(path).expanduser()
    if Path(config.runs) in place.parents:
        stage_folder = place.parent
        return f"stage {stage_folder.name}, {_folder_state(stage_folder)}"
    if place.exists():
        return "local, there"
    if config.data.folder and Path(config.data.folder) in place.parents:
        return f"built by data/{config.data.build}.py on first use" if config.data.build else "missing"
    if path in EMBEDDED:
        return "embedded, in the cache" if embedded_place(path).exists() else "embedded, made on first use"
    if ":" in path:
        return "Python function"
    if path.startswith(("/", ".", "~")) or place.suffix or path.count("/") > 1:
        return "missing"
    return "hub name, in the hub's cache" if find_config(path) else "hub name, fetched on first use"


def _folder_state(folder: Path) -> str:
    if (folder / "stage.json").is_file():
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        failed = [check["name"] for check in record.get("checks", []) if not check["passed"]]
        return f"finished, failed: {', '.join(failed)}" if failed else "finished"
    if not folder.exists():
        return "not there yet"
    return "started, not finished"
