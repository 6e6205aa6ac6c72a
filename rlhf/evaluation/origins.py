"""Where the systems of an evaluation come from: the stages that made them, in a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def names_of(folders: Iterable[str]) -> dict[str, str]:
    """What the folders of stages are called: their paths from the folder that holds all."""
    paths = {folder: Path(folder).absolute() for folder in folders}
    root = Path(os.path.commonpath([path.parent for path in paths.values()])).parent if paths else Path()
    return {folder: str(path.relative_to(root)) for folder, path in paths.items()}


def lineage_table(stages: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """What each stage was made of, by its folder: a header, and a row a stage, as text."""
    rows = [["stage", "from", "data", "weights (sha256)", "failed checks", "minutes"]]
    for folder, name in names_of(stages).items():
        record = stages[folder]
        data = record.get("data", {})
        rows.append(
            [
                name,
                ", ".join(f"{each['key']}={each['path']}" for each in record.get("parents", [])),
                ", ".join(f"{key}: {each['records']} of {each['source']}" for key, each in data.items()),
                str(record.get("model_sha256", ""))[:12],
                "; ".join(each["name"] for each in record["checks"] if not each["passed"]) or "none",
                f"{record.get('seconds', 0) / 60:.1f}",
            ]
        )
    return rows
