"""What was sampled, scored and measured, kept by what it follows from, so that it is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import try_to_load_from_cache

from rlhf.checkpoint import library_versions
from rlhf.files import hash_path, write_text
from rlhf.processes import by_main
from rlhf.records import make_sources

TEXT_FILES = (".json", ".jinja", ".txt", ".model", ".py")  # of a model folder, beside its weights
VERSION = 1  # raise it where the same facts lead to other results than before
# that scores and MAUVE follow from
MORE_LIBRARIES = ("tokenizers", "scikit-learn", "rouge-score", "sacrebleu", "mauve-text", "faiss-cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A folder of results, each a file of JSON that is named by the hash of its facts."""

    folder: Path

    def kept(
        self,
        kind: str,
        facts: Mapping[str, Any],
        compute: Callable[[], T],
        *,
        dump: Callable[[T], Any] = lambda result: result,
        load: Callable[[Any], T] = lambda found: found,
    ) -> T:
        """What `compute` gives, or gave where the facts were these; `dump` and `load`: to JSON and back."""
        whole = {"version": VERSION, "libraries": library_versions(MORE_LIBRARIES), **facts}
        path = self.folder / kind / f"{digest(whole)}.json"
        text = _read(path)
        if text is None:
            text = json.dumps(dump(compute()), ensure_ascii=False)
            _write(path, text)
        return load(json.loads(text))


def store_in(folder: str) -> Store:
    """The store in a folder, which need not be there yet; ValueError where nothing can be written."""
    path = Path(folder)
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"store={folder}: {there} {what}; name another folder")
    return Store(path)


def digest(content: Any) -> str:
    """SHA-256 of anything JSON can say, and of the names of what it cannot; 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode("utf-8")).hexdigest()


def model_id(path: str, revision: str | None = None) -> str:
    """What a model is told by: the hash of its weights, settings and tokenizer; of a hub name the commit."""
    folder = Path(path)
    if folder.exists():
        files = [each for each in sorted(folder.iterdir()) if each.suffix in TEXT_FILES]
        return digest([hash_path(folder), *(hash_path(each) for each in files)])
    found = try_to_load_from_cache(path, "config.json", revision=revision)
    # without a commit nothing that was kept is known to be of these weights
    return f"{path}@{Path(found).parent.name if isinstance(found, str) else uuid.uuid4()}"


def scorer_id(spec: Mapping[str, Any]) -> Any:
    """What a scorer's scores follow from, beside the texts; of a function that is not known, and is new each
    time.
    """
    found = {key: value for key, value in spec.items() if key not in ("path", "parts")}
    if spec["kind"] == "model":
        found["model"] = model_id(spec["path"])
    if spec["kind"] == "sum":
        found["parts"] = [scorer_id(part) for part in spec["parts"]]
    if spec["kind"] == "classifier":
        paths = [Path(source.path) for source in make_sources(spec["train"])]
        found["files"] = [hash_path(path) if path.is_file() else str(path) for path in paths]
    if spec["kind"] == "function":
        found["call"] = str(uuid.uuid4())
    return found


@by_main
def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError):  # not there, or damaged: made anew
        return None
    return text


@by_main
def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
