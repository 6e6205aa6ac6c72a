"""How a source becomes records: read, checked, split by prompt; and how records are written.

A bad row stops with the file, line and key, or is counted, as asked. Rows come from `rlhf.reading`,
`rlhf.formats` undoes the public formats, `rlhf.schemas` checks; this is the module that the rest of the
project imports.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rlhf.formats import normalise
from rlhf.processes import by_main
from rlhf.reading import read_rows
from rlhf.rows import Row, RowError, shorten
from rlhf.schemas import (
    KINDS,
    Demonstration,
    LabelledText,
    Prompt,
    PromptRecord,
    RankedList,
    Record,
    is_number,
)

__all__ = [
    "Demonstration",
    "LabelledText",
    "Prompt",
    "PromptRecord",
    "RankedList",
    "ReadResult",
    "Record",
    "Source",
    "find_overlap",
    "make_sources",
    "prompt_key",
    "read_records",
    "write_records",
]


@dataclass(frozen=True)
class Source:
    """Where records come from.

    path: a local file or folder, or a hub data set; split, subset and revision pick a part of it that has
    a name. part: keep the prompts whose hash falls in [low, high) of [0, 1), so that (0, .8) and (.8, 1)
    share no prompt. limit: at most so many records. columns: {our key: the file's column}.
    """

    path: str
    split: str | None = None
    subset: str | None = None
    part: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        low, high = self.part
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(
                f"{self.path}: part={list(self.part)}: two numbers 0 <= low < high <= 1 are expected"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(
                f"{self.path}: limit={self.limit}: a whole number of at least 1 is expected, or null"
            )


@dataclass(frozen=True)
class ReadResult:
    """Records, and for every row that was skipped the reason with its place."""

    records: list[Any]
    skipped: list[str] = field(default_factory=list)


def make_sources(value: Any, key: str = "source") -> list[Source]:
    """Return the sources that a configuration value means: a path, a mapping of Source's fields, a list.

    Raises ValueError naming `key` for null, an unknown field or another type.
    """
    if value is None:
        raise ValueError(
            f"{key} has no value: give a file, a folder or a hub data set, for instance {key}=my.jsonl"
        )
    if isinstance(value, Source):
        return [value]
    if isinstance(value, str):
        return [Source(value)]
    if isinstance(value, Mapping):
        return [_mapped_source(dict(value), key)]
    if isinstance(value, Sequence) and value:
        return [source for each in value for source in make_sources(each, key)]
    raise ValueError(f"{key}={shorten(value)}: a path, a mapping with path, or a list of these is expected")


def read_records(source: Source | Sequence[Source], kind: str, *, on_bad_row: str = "stop") -> ReadResult:
    """Read all records of one kind ("demonstrations", "ranked", "prompts", "labelled") from the sources.

    A ranked row can be read as demonstration (its best response) or prompt, a demonstration as prompt
    (its response is the reference). Raises ValueError at the first bad row ("file:line: key: what is
    wrong; remedy"), or, where on_bad_row is "skip", goes on and returns the reasons. A source without any
    record is an error.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind}: kinds are {', '.join(KINDS)}")
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"on_bad_row={on_bad_row}: stop or skip is expected")
    records: list[Record] = []
    skipped: list[str] = []
    for each in [source] if isinstance(source, Source) else source:
        before = len(records), len(skipped)
        for place, record in _records(each, kind):
            if isinstance(record, RowError) and on_bad_row == "stop":
                raise ValueError(
                    f"{place}: {record}; mend the row, or pass it over with data.on_bad_row=skip"
                )
            if isinstance(record, RowError):
                skipped.append(f"{place}: {record}")
            else:
                records.append(record)
                if len(records) - before[0] == each.limit:
                    break
        if len(records) == before[0]:
            raise ValueError(_nothing_read(each, kind, skipped[before[1] :]))
    return ReadResult(records, skipped)


@by_main
def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as jsonl that `read_records` reads back equal, at once; gzip if named .gz."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(_row_of(record), ensure_ascii=False) + "\n" for record in records)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            data = text.encode("utf-8")
            file.write(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def prompt_key(prompt: Prompt) -> str:
    """Return a stable hash of a prompt, 64 hexadecimal digits; a text is the same as it in one user turn."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8")).hexdigest()


def different_prompts(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The first record of every prompt, of those with a reference where one of them has one."""
    found: dict[str, PromptRecord] = {}
    for record in records:
        key = prompt_key(record.prompt)
        if key not in found or (found[key].reference is None and record.reference is not None):
            found[key] = record
    return list(found.values())


def transcript(prompt: Prompt) -> str:
    """A prompt as text: a conversation with the role before each turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def prompt_keys(records: Iterable[Any]) -> set[str]:
    """The prompts of records, each as 16 digits of a key that case and white space do not change."""
    return {_loose_key(record)[:16] for record in records}


def _loose_key(record: Any) -> str:
    return prompt_key(_folded(_content(record)))


def _folded(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return " ".join(prompt.casefold().split())
    return [message | {"content": str(_folded(message["content"]))} for message in prompt]


def find_overlap(records_a: Iterable[Any], records_b: Iterable[Any]) -> list[Prompt]:
    """Return the prompts that both have, but for case and white space, in the order of the first and each
    once.
    """
    shared = {_loose_key(record) for record in records_b}
    first: dict[str, Prompt] = {}
    for record in records_a:
        first.setdefault(_loose_key(record), _content(record))
    return [content for key, content in first.items() if key in shared]


def _records(source: Source, kind: str) -> Iterator[tuple[str, Record | RowError]]:
    """Yield every record (or what is wrong with its row) that falls into the source's part."""
    options = {"split": source.split, "subset": source.subset, "revision": source.revision}
    for place, row in read_rows(source.path, **options):
        if isinstance(row, RowError):
            yield place, row
            continue
        try:
            found = normalise(_renamed(row, source.columns))
        except RowError as error:
            yield place, error
            continue
        for each in found:
            try:
                record = KINDS[kind](each)
            except RowError as error:
                yield place, error
                continue
            if _in_part(record, source.part):
                yield place, record


def _nothing_read(source: Source, kind: str, skipped: list[str]) -> str:
    if skipped:
        return f"{source.path}: no {kind} left, {len(skipped)} bad rows were skipped; the first: {skipped[0]}"
    return (
        f"{source.path}: no {kind} left with part={list(source.part)}; widen the part or give a larger file"
    )


def _in_part(record: Record, part: tuple[float, float]) -> bool:
    low, high = part
    place = int(prompt_key(_content(record))[:13], 16) / 16**13  # 52 bits: exact in a float, always below 1
    return low <= place < high


def _content(record: Any) -> Any:
    return record.text if isinstance(record, LabelledText) else record.prompt


def _renamed(row: Row, columns: dict[str, str] | None) -> Row:
    if not columns:
        return row
    for key, column in columns.items():
        if column not in row:
            close = difflib.get_close_matches(column, [str(name) for name in row], n=1)
            hint = f"nearest: {close[0]}" if close else f"columns are {', '.join(map(str, row))}"
            raise RowError(f"columns.{key}", f"there is no column {column!r}; {hint}")
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return {**kept, **{key: row[column] for key, column in columns.items()}}


def _mapped_source(values: dict[str, Any], key: str) -> Source:
    names = [each.name for each in fields(Source)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            raise ValueError(
                f"{key}.{name}: no such key; {'nearest: ' + close[0] if close else ', '.join(names)}"
            )
    if not isinstance(values.get("path"), str):
        raise ValueError(f"{key}.path={values.get('path')!r}: a file, folder or hub data set is expected")
    limit, columns = values.get("limit"), values.get("columns")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"{key}.limit={limit!r}: a whole number of at least 1 is expected")
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(
            f"{key}.columns={columns!r}: a mapping is expected, for instance {{prompt: question}}"
        )
    part = values.get("part") or (0.0, 1.0)
    if not isinstance(part, Sequence) or len(part) != 2 or not all(is_number(bound) for bound in part):
        raise ValueError(f"{key}.part={part!r}: two numbers are expected, for instance [0, 0.8]")
    return Source(**{**values, "part": (float(part[0]), float(part[1]))})


def _row_of(record: Record) -> Row:
    return {key: value for key, value in asdict(record).items() if value is not None}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
