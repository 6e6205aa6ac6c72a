"""Rows out of one local file: a dict per row with the line it came from, before any meaning.

A row that cannot be read is given as a `RowError` in its place, so that the reader decides whether to
stop. What concerns a whole file (missing, empty, damaged) raises ValueError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.sources import nearest_existing

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", ".parquet.gz")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LIST_COLUMNS = ("messages", "responses", "ranks", "scores", "response_tokens", "conversations", "instances")

Row = dict[str, Any]


class RowError(ValueError):
    """A row that does not fit: the key, what is wrong with it, and what to do."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}" if key else problem)


class DamagedFile(Exception):
    """A fault after which the rest of a file has no certain meaning, so that no row can be passed over."""

    def __init__(self, line: int, problem: str):
        super().__init__(line, problem)
        self.line, self.problem = line, problem


Place = tuple[str, "Row | RowError"]


def file_rows(path: Path) -> Iterator[Place]:
    """Yield (place, row or RowError) of a local file; the place is path:line, as text editors count."""
    name = path.name.lower()
    if not path.exists():
        raise ValueError(f"{path}: no such file{nearest_existing(path)}")
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; data files end in {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; give a file with at least one row")
    if name.endswith((".parquet", ".parquet.gz")):
        yield from _parquet_rows(path)
        return
    kind = name.removesuffix(".gz").rsplit(".", 1)[-1]
    reader = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}[kind]
    opener = gzip.open if name.endswith(".gz") else open
    found = False
    try:
        with opener(path, "rb") as file:
            for line, row in reader(file):
                found = True
                yield f"{path}:{line}", row
    except DamagedFile as error:
        raise ValueError(
            f"{path}:{error.line}: {error.problem}; mend it: what follows in the file cannot be read"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: the gzip data are cut short or damaged ({error}); fetch the file again"
        ) from error
    if not found:
        raise ValueError(f"{path}: the file is empty; give a file with at least one row")


def _jsonl_rows(file: Any) -> Iterator[tuple[int, Row | RowError]]:
    for number, raw in enumerate(file, start=1):
        if number == 1 and raw.startswith(UTF_16):
            raise DamagedFile(1, "the file is in UTF-16; save it as UTF-8")
        try:
            line = _decode(raw, first=number == 1)
        except RowError as error:
            yield number, error
            continue
        if line.strip():
            yield number, _parse(line.rstrip("\r\n"))


def _json_rows(file: Any) -> Iterator[tuple[int, Row | RowError]]:
    """Read a list of objects, each at the line where it begins; one object, or one per line, is fine too."""
    raw = file.read()
    text = _decode_file(raw)
    if not text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            yield from _jsonl_rows(io.BytesIO(raw))
        else:
            if isinstance(value, dict) and value.keys().isdisjoint(LIST_COLUMNS) and _holds_rows(value):
                raise DamagedFile(1, f"its rows lie below a key ({', '.join(value)}); leave the list alone")
            yield 1, value if isinstance(value, dict) else _not_an_object(value)
        return
    decoder = json.JSONDecoder()
    position, line, seen = _skip(text, text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", seen, position)
        seen = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DamagedFile(getattr(error, "lineno", line), _json_fault(error)) from error
        yield line, value if isinstance(value, dict) else _not_an_object(value)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            fault = "a comma or the list's end is missing" if position < len(text) else "the list has no end"
            raise DamagedFile(text.count("\n", 0, position) + 1, f"not valid JSON ({fault})")
    if text[position + 1 :].strip():
        raise DamagedFile(text.count("\n", 0, position) + 1, "not valid JSON (there is more behind the list)")


def _holds_rows(value: Row) -> bool:
    lists = [part for part in value.values() if isinstance(part, list) and part]
    return any(all(isinstance(row, dict) for row in part) for part in lists)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv_rows(file: Any) -> Iterator[tuple[int, Row | RowError]]:
    text = _decode_file(file.read())
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for cells in reader:
            line, begins = begins, reader.line_num + 1
            if header is None:
                header = cells
                if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                    raise DamagedFile(line, f"the header {shorten(header[0])} has no commas")
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise DamagedFile(line, f"the header names {', '.join(twice)} twice")
            elif cells:
                yield line, _csv_row(header, cells)
    except csv.Error as error:
        raise DamagedFile(reader.line_num, f"not valid CSV ({error})") from error


def _csv_row(header: list[str], cells: list[str]) -> Row | RowError:
    if len(cells) != len(header):
        return RowError(
            "", f"{len(cells)} cells, but the header names {len(header)} columns; quote cells with commas"
        )
    row: Row = dict(zip(header, cells, strict=True))
    for key in LIST_COLUMNS:
        if row.get(key):
            try:
                row[key] = json.loads(row[key])
            except ValueError:
                return RowError(key, f"{shorten(row[key])} is not a JSON list; write for instance [1, 2]")
        elif key in row:
            del row[key]
    if row.get("reference") == "":
        del row["reference"]
    return row


def _parquet_rows(path: Path) -> Iterator[Place]:
    import pyarrow
    from pyarrow import parquet

    try:
        packed = path.name.lower().endswith(".gz")
        with parquet.ParquetFile(io.BytesIO(gzip.decompress(path.read_bytes())) if packed else path) as file:
            if file.metadata.num_rows == 0:
                raise ValueError(f"{path}: the file is empty; give a file with at least one row")
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({first_line(error)}); write it again"
        ) from error


def check_text(value: Any, name: str) -> str:
    """Return `value` if it is a text that is not empty. Raises RowError with `name` otherwise."""
    if not isinstance(value, str):
        raise RowError(name, f"{shorten(value)} is of type {type(value).__name__}; text is expected")
    if not value.strip():
        raise RowError(name, "empty; some text is expected")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            name, "holds half of a surrogate pair, which is no character; write it as UTF-8"
        ) from None
    return value


def shorten(value: Any, length: int = 60) -> str:
    """Return `value` as it is shown in an error: its repr, cut to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 4] + " ..."


def _decode(raw: bytes, *, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise RowError(
            "", f"not UTF-8 (byte 0x{byte:02x} at {error.start}); save the file as UTF-8"
        ) from None


def _decode_file(raw: bytes) -> str:
    try:
        return _decode(raw, first=True)
    except RowError as error:
        raise DamagedFile(_line_of_bad_bytes(raw), str(error)) from error


def _line_of_bad_bytes(raw: bytes) -> int:
    return next(number for number, line in enumerate(raw.split(b"\n"), start=1) if not _is_utf8(line))


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parse(line: str) -> Row | RowError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError("", f"{_json_fault(error)}; one object per line is expected")
    return value if isinstance(value, dict) else _not_an_object(value)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return f"not valid JSON ({'nested too deep' if isinstance(error, RecursionError) else error})"


def _not_an_object(value: Any) -> RowError:
    return RowError("", f"a row is an object with keys, not {shorten(value)}")


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
