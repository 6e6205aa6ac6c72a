"""Rows out of a source: a local file, a local folder of files, or a hub data set.

What a name means is decided here and nowhere else; the rows come as `rlhf.rows` gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf.rows import SUFFIXES, Place, file_rows, first_line
from rlhf.sources import is_path_like, nearest_existing

# A name that ends like this is a file that was meant to be local, never a hub data set.
FILE_SUFFIXES = (
    *SUFFIXES,
    ".txt",
    ".tsv",
    ".xlsx",
    ".arrow",
    ".zip",
    ".gz",
    ".bz2",
    ".zst",
    ".xz",
    ".pkl",
    ".yaml",
)


def read_rows(path: str, *, split: str | None, subset: str | None, revision: str | None) -> Iterator[Place]:
    """Yield (place, row or RowError) of a local file, a local folder or a hub data set.

    A split of a local file is the value of its column `split`; of a folder, how its files' names begin. A
    subset of a folder is a folder inside it.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        yield from _folder_rows(local, split, subset)
    elif local.exists() or is_path_like(path) or path.lower().endswith(FILE_SUFFIXES):
        for key, value in (("subset", subset), ("revision", revision)):
            if value is not None:
                raise ValueError(
                    f"{path}: {key}={value} is only for hub data sets; a file has none: leave it out"
                )
        yield from _split_rows(file_rows(local), local, split)
    else:
        yield from _hub_rows(path, split, subset, revision)


def _folder_rows(folder: Path, split: str | None, subset: str | None) -> Iterator[Place]:
    root = folder / subset if subset else folder
    if not root.is_dir():
        raise ValueError(f"subset={subset}: {root} does not exist{nearest_existing(root)}")
    files = sorted(file for file in root.iterdir() if file.is_file() and file.name.lower().endswith(SUFFIXES))
    if not files:
        raise ValueError(f"{root}: the folder holds no data file; data files end in {', '.join(SUFFIXES)}")
    chosen = [file for file in files if split is None or file.name.startswith(split)]
    if not chosen:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"split={split}: no data file in {root} begins with {split!r}; there are {names}")
    for file in chosen:
        yield from file_rows(file)


def _split_rows(places: Iterator[Place], path: Path, split: str | None) -> Iterator[Place]:
    if split is None:
        yield from places
        return
    seen = set()
    for place, row in places:
        if isinstance(row, dict):
            if "split" not in row:
                raise ValueError(
                    f"{place}: split={split} was asked for, but the row has no key 'split'; leave it out"
                )
            seen.add(str(row["split"]))
            if row["split"] != split:
                continue
        yield place, row
    if split not in seen:
        raise ValueError(
            f"{path}: split={split}: no row has it; splits in the file: {', '.join(sorted(seen))}"
        )


def _hub_rows(name: str, split: str | None, subset: str | None, revision: str | None) -> Iterator[Place]:
    """Yield the rows of a hub data set. No code of the data set is run: `datasets` no longer can."""
    import datasets

    if split is None:
        raise ValueError(
            f"{name}: no local file or folder of that name{nearest_existing(Path(name))}; "
            f"a hub data set needs a split, for instance {{path: {name}, split: train}}"
        )
    try:
        options = _subset_option(name, subset, revision)
        data = datasets.load_dataset(name, split=split, revision=revision, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: no local file or folder, and as hub data set (split={split}, subset={subset}) it could"
            f" not be loaded ({type(error).__name__}: {first_line(error)}); check the names and the network"
        ) from error
    for number, row in enumerate(data, start=1):
        yield f"{name}[{split}]:row {number}", row


def _subset_option(name: str, subset: str | None, revision: str | None) -> dict[str, str]:
    """A subset is a named configuration of the data set if it has one of that name, else its folder."""
    import datasets

    if subset is None:
        return {}
    named = subset in datasets.get_dataset_config_names(name, revision=revision)
    return {"name": subset} if named else {"data_dir": subset}
