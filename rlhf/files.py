"""Files and folders that appear whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that replaces `final` when the block ends well and vanishes otherwise."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
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
    with new_folder(final) as folder:
        save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or over the weight files of a model folder in order of their names; 64 hexadecimal
    digits.
    """
    if not path.is_dir():
        return _hash([path])
    return _hash(sorted(path.glob("*.safetensors")) or sorted(path.glob("config.json")))


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
