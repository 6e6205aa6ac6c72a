"""What every stage program does first: configuration, data files, the stage folder."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.checkpoint import StageFolder, library_versions, settings_that_count
from rlhf.config import load_config, resolved_yaml
from rlhf.files import write_text
from rlhf.parents import TRAINED_ON_FILE, Parent, find_parent, inputs_of
from rlhf.processes import processes
from rlhf.records import (
    ReadResult,
    Record,
    different_prompts,
    find_overlap,
    make_sources,
    prompt_keys,
    read_records,
)
from rlhf.reference_scorers import KINDS, check_references
from rlhf.sources import is_path_like, resolve_model
from stages import COMMAND_VARIABLE

if TYPE_CHECKING:
    from rlhf.text import TextCodec


SCORERS = ("labeller", "reward", "proxy", "gold")  # settings that a stage may have
DATA_KEYS = {
    "sft": {"data.demonstrations.train": "demonstrations", "data.demonstrations.eval": "demonstrations"},
    "collect": {"data.prompts.collect": "prompts"},
    "rm": {"ranked.train": "ranked", "ranked.eval": "ranked"},
    "ppo": {"data.prompts.ppo": "prompts"},
    "evaluate": {"data.prompts.evaluate": "prompts"},
}
TRAINED_ON = {"data.demonstrations.train", "data.prompts.collect", "ranked.train", "data.prompts.ppo"}


def make_inputs(config: Any) -> None:
    """Write the data set and the embedded models that a stage reads, and fetch a model's revision, where they
    are not there yet.

    Several processes would wait for one another in it: their launcher calls it before they start.
    """
    if config.data.build:
        importlib.import_module(f"data.{config.data.build}").build(Path(config.data.folder))
    for _, path, kind in inputs_of(config):
        if kind == "policy":
            resolved(path, config.model)


class Stage:
    """One run of a stage: its configuration, folder, and the state to resume from, if any."""

    def __init__(self, stage: str, overrides: list[str]) -> None:
        self.started = time.time()
        self.config = load_config(stage, overrides)
        config = self.config
        self.folder = StageFolder(config.runs, config.name, stage)
        self.state: Path | None = None
        self.trained_on: dict[str, list[str]] = {}
        self._resolved = resolved_yaml(config)
        command = shlex.join(["./launch.sh", f"stage={stage}", *without_run_mode(overrides)])
        processes().check_same(settings_that_count(self._resolved), "configuration")
        processes().check_same(library_versions(), "library versions")
        self.facts: dict[str, Any] = {"command": os.environ.get(COMMAND_VARIABLE, command)}
        make_inputs(config)

    def find_parents(self) -> list[Parent]:
        """The inputs that other stages wrote, each found good; the model that the stage goes on from comes
        first.
        """
        parents = []
        for key, path, kind in inputs_of(self.config):
            place = resolved(path, self.config.model) if kind == "policy" else path
            parents.append(find_parent(key, place, kind=kind, force=self.config.force))
            processes().check_same(parents[-1].sha256, f"{key}={place}")
        return parents

    def begin(self, *, again: bool = False) -> None:
        """Make the folder ready; called once the inputs are found good, so that overwriting loses nothing.

        `again`: resume=true runs a finished stage once more, as all that takes time is in a store.
        """
        config = self.config
        again = again and config.resume and self.folder.is_finished_with(self._resolved)
        self.state = self.folder.prepare(
            self._resolved, overwrite=config.overwrite or again, resume=config.resume
        )
        if self.trained_on:
            write_text(self.folder.path / TRAINED_ON_FILE, json.dumps(self.trained_on) + "\n")

    def read(self, source: Any, kind: str, key: str, *, limit: int | None = None) -> Sequence[Any]:
        """Read the records of a `data` key; counts and skipped rows go into stage.json."""
        result = _read(source, kind, key, self.config.data)
        if result.skipped:
            print(
                f"{key}: {len(result.skipped)} bad rows skipped, the first: {result.skipped[0]}", flush=True
            )
        if not result.records:
            raise ValueError(f"{key}={source}: no records")
        records = result.records[:limit] if limit else result.records
        if processes().count > 1:
            processes().check_same(hashlib.sha256(repr(records).encode()).hexdigest(), f"{key}={source}")
        if key in TRAINED_ON:
            self.trained_on[key] = sorted(prompt_keys(records))
        self.facts.setdefault("data", {})[key] = {
            "source": source,
            "records": len(records),
            "skipped": len(result.skipped),
        }
        return records

    def warn_of_overlap(self, name_a: str, a: Sequence[Record], name_b: str, b: Sequence[Record]) -> None:
        """Report prompts that two sets share."""
        shared = find_overlap(a, b)
        self.facts.setdefault("overlap", {})[f"{name_a} and {name_b}"] = len(shared)
        if shared:
            print(f"warning: {len(shared)} prompts stand in both {name_a} and {name_b}", flush=True)

    def report_cut_prompts(self, codec: TextCodec) -> None:
        """Record the share of prompts whose start was cut off, and print it where it is not 0."""
        share = codec.share_of_cut_prompts()
        self.facts["share_of_prompts_cut"] = round(share, 4)
        if share:
            limit = self.config.data.max_prompt_tokens
            print(f"{share:.1%} of the prompts were cut at data.max_prompt_tokens={limit}", flush=True)

    def cost(self) -> dict[str, float]:
        """Wall-clock seconds since the stage began, and the most memory it held: the GPU's where it ran on
        one, else the process's.
        """
        from rlhf.engine import peak_memory

        gib = peak_memory(self.config.engine.device) / 2**30
        return {"seconds": round(time.time() - self.started, 1), "peak_memory_gib": round(gib, 2)}

    def cost_in_words(self) -> str:
        """The cost for the stage's last line."""
        cost = self.cost()
        return f"{cost['seconds']:.0f} s, peak memory {cost['peak_memory_gib']:.1f} GiB"


def check_data(configs: Iterable[tuple[str, Any]]) -> None:
    """Read all that (stage, configuration) pairs will read, so that what is amiss with the last stage's data
    is found before the first one runs.

    What a stage or `data.build` has yet to write is passed over. Raises ValueError as the stage would.
    """
    seen: dict[str, Sequence[Any]] = {}
    for stage, config in configs:
        if stage == "evaluate":
            from rlhf.evaluation.judge import LanguageModelJudge
            from rlhf.evaluation.store import store_in

            store = store_in(config.store)
            if config.judge.name != "none":
                LanguageModelJudge(config.judge, store.folder)  # its template, client and key are there
        made = (config.runs, config.data.folder) if config.data.build else (config.runs,)
        for key, (source, kind) in _sources_of(stage, config).items():
            place = repr((source, kind))
            paths = [] if source is None else [each.path for each in make_sources(source, key)]
            if place not in seen and not any(
                Path(root) in Path(path).absolute().parents for root in made for path in paths
            ):
                seen[place] = _read(source, kind, key, config.data).records
        if stage in ("ppo", "evaluate"):
            source = getattr(config.data.prompts, stage)
            _check_references(stage, config, seen.get(repr((source, "prompts")), ()))


def _sources_of(stage: str, config: Any) -> dict[str, tuple[Any, str]]:
    """The source and kind of all that a stage reads, by key."""
    found = {key: (attrgetter(key)(config), kind) for key, kind in DATA_KEYS[stage].items()}
    if stage == "rm" and config.ranked.eval is None:
        del found["ranked.eval"]
    for key, spec in _scorers_of(config).items():
        if spec["kind"] == "classifier" and spec.get("train") is not None:
            found[f"{key}.train"] = (spec["train"], "labelled")
    for name, system in getattr(config, "systems", {}).items():
        if isinstance(system, dict) and "generations" in system:
            found[f"systems.{name}.generations"] = (system["generations"], "responses")
    return found


def _scorers_of(config: Any) -> dict[str, dict[str, Any]]:
    return {key: spec for key in SCORERS if (spec := getattr(config, key, None)) is not None}


def _check_references(stage: str, config: Any, prompts: Sequence[Any]) -> None:
    """Raise ValueError for a prompt without the reference that a stage's scorers, or MIXER, need."""
    if stage == "evaluate":
        prompts = different_prompts(prompts)[: config.num_prompts]
    for key, spec in _scorers_of(config).items():
        for kind in (part for part in kinds_of(spec) if part in KINDS):
            check_references(f"{key}: {kind}", prompts)
    if stage == "ppo" and config.mixer.updates:
        check_references("mixer.updates", prompts)


def kinds_of(spec: dict[str, Any]) -> Iterator[str]:
    """The kinds of a scorer and of its parts."""
    yield spec["kind"]
    for part in spec.get("parts") or ():
        yield from kinds_of(part)


def _read(source: Any, kind: str, key: str, data: Any) -> ReadResult:
    """The records of a key of `data`, which errors name."""
    if source is None:
        raise ValueError(f"{key} is not set: data={data.name} has no such records; give {key}=<file>")
    try:
        return read_records(make_sources(source, key), kind, on_bad_row=data.on_bad_row)
    except ValueError as error:
        raise ValueError(error if key in str(error) else f"{key}: {error}") from error


def without_run_mode(words: Sequence[str]) -> list[str]:
    """The words of a command that decide its results, without those that say whether it goes on or again."""
    return [word for word in words if not word.startswith(("resume=", "overwrite="))]


def resolved(path: str, model: Any) -> str:
    """A model key's value as a folder or hub name; the embedded models are fetched or built on first use.

    The revision of the `model` group is that of its own path. A path that does not exist stays as it is:
    find_parent says which stage writes it.
    """
    if is_path_like(path) and not Path(path).expanduser().exists():
        return path
    return resolve_model(path, model.revision if path == model.path else None)
