"""Files and folders that appear whole or not at all, and their hashes."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from rlhf.processes import by_main


@by_main
def new_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Let `write(folder)` fill a folder, which then appears at `final` in place of what was there."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {final}: {error}; free the disk or set runs= to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model_folder(final: Path, save: Callable[[Path], None], card: str) -> None:
    """Write a model folder by `save` with its model card, whole or not at all."""

    def write(folder: Path) -> None:
        save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    new_folder(final, write)


@by_main
def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@by_main
def append_text(path: Path, text: str) -> None:
    """Append to a file, and have it on the disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or over the weight files of a model folder in order of their names; 64 hexadecimal
    digits.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("config.json"))
    return _hash(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@functools.cache
def _hash(files: Sequence[tuple[Path, int, int]]) -> str:
    """SHA-256 over files, which are read again where their time or size has changed."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
