"""Where numbers go while a stage runs: metrics.jsonl, the tracker, and one progress line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf.files import append_text, write_text
from rlhf.processes import by_main, processes


class MetricLog:
    """One JSON object a step in metrics.jsonl, and the same numbers in the tracker."""

    def __init__(self, folder: Path, tracker: str, *, run_name: str) -> None:
        self.path = folder / "metrics.jsonl"
        self._tracker = _open_tracker(tracker, folder, run_name)

    def write(self, step: int, metrics: dict[str, float], seconds: dict[str, float] | None = None) -> None:
        """Append a step's metrics; the tracker alone sees `seconds`, which no run repeats."""
        append_text(self.path, json.dumps({"step": step, **metrics}) + "\n")
        if self._tracker is not None:
            self._tracker.log(
                step, metrics | {f"seconds/{name}": value for name, value in (seconds or {}).items()}
            )

    def cut_after(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again."""
        cut_lines_after(self.path, step)

    def close(self) -> None:
        """Flush the tracker."""
        if self._tracker is not None:
            self._tracker.close()


@by_main
def cut_lines_after(path: Path, step: int) -> None:
    """Drop the lines of a jsonl file whose `step` is later, and one that a kill left half written."""
    if path.exists():
        whole, _, _ = path.read_bytes().rpartition(b"\n")  # a whole line ends with a line feed
        lines = whole.decode().split("\n") if whole else []
        try:
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): mend the line, or delete the file") from error
        write_text(path, "".join(line + "\n" for line in kept))


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Run:
    """wandb and trackio share their verbs."""

    def __init__(self, library: Any, run_name: str) -> None:
        self.library = library
        library.init(project="rlhf", name=run_name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.library.log(metrics, step=step)

    def close(self) -> None:
        self.library.finish()


def _open_tracker(tracker: str, folder: Path, run_name: str) -> Any | None:
    if tracker == "none" or not processes().is_main:
        return None
    if tracker == "tensorboard":
        return _TensorBoard(folder)
    import importlib

    try:
        return _Run(importlib.import_module(tracker), run_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"tracker={tracker} needs the package {tracker}: pip install {tracker}") from error


def progress(total: int, *, initial: int = 0, unit: str = "it", description: str = "") -> Any:
    """A progress bar with throughput and time left; lines at wide intervals without a terminal."""
    import sys

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=description,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 20.0,
        smoothing=0.1,
        disable=not processes().is_main,
    )
