"""Files as they come: every kind, and every way a file can be broken."""

import gzip
import json
import sys
import types

import pytest

from rlhf.records import Demonstration, Source, read_records
from rlhf.rows import RowError, file_rows

GOOD = b'{"prompt": "p", "response": "r"}'
P_R = [Demonstration("p", "r")]


def read(path, **options):
    return read_records(Source(str(path), **options), "demonstrations").records


def refused(path, **options):
    with pytest.raises(ValueError) as error:
        read(path, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        GOOD + b"\n",
        b"\xef\xbb\xbf" + GOOD + b"\n",
        GOOD + b"\r\n",
        b"\n\n  \n" + GOOD + b"\n\n",
    ],
    ids=["no newline", "newline", "byte order mark", "carriage return", "blank lines"],
)
def test_jsonl_as_editors_write_it(tmp_path, data):
    for name, content in (("x.jsonl", data), ("X.JSONL.gz", gzip.compress(data)), ("x.json", data)):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == P_R


def test_a_line_separator_inside_a_text_is_no_line_end(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a\u2028b\x85c", "response": "r"}\n', encoding="utf-8")
    assert read(tmp_path / "x.jsonl") == [Demonstration("a\u2028b\x85c", "r")]


def test_a_huge_line(tmp_path):
    text = "long " * 400_000
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "p", "response": text}))
    (tmp_path / "x.csv").write_text(f'prompt,response\np,"{text}"\n')
    assert read(tmp_path / "x.jsonl") == read(tmp_path / "x.csv") == [Demonstration("p", text)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", "resp', "not valid JSON (Unterminated string"),
        (b"not json", "not valid JSON (Expecting value, column 1); one object per line"),
        (b'["prompt", "p"]', "a row is an object with keys, not ['prompt', 'p']"),
        (b'"text"', "a row is an object with keys, not 'text'"),
        (b"null", "a row is an object with keys, not None"),
        (b'{"prompt": "caf\xe9", "response": "r"}', "not UTF-8 (byte 0xe9 at 15); save the file as UTF-8"),
        (b"[" * 100_000, "not valid JSON (nested too deep)"),
        (b"\x00\x01\x02", "not valid JSON"),
    ],
)
def test_a_broken_line_is_named_or_counted(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    assert refused(path).startswith(f"{path}:3: {message}")
    result = read_records(Source(str(path)), "demonstrations", on_bad_row="skip")
    assert result.records == P_R * 2 and len(result.skipped) == 1


def test_json_lists_name_the_line_of_a_row(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n  {"prompt": "p", "response": "r"},\n\n  {"prompt": "p",\n   "response": ""}\n]')
    assert refused(path).startswith(f"{path}:4: response: empty")
    path.write_text('\ufeff [{"prompt": "p", "response": "r"}]\n', encoding="utf-8")
    assert read(path) == P_R
    path.write_text('{\n  "prompt": "p",\n  "response": "r"\n}\n')
    assert read(path) == P_R
    path.write_bytes(gzip.compress(b"[" + GOOD + b",\n" + GOOD + b"]"))
    assert read(path.rename(tmp_path / "y.json.gz")) == P_R * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "p", "response": "r"},\n{"prompt" "p"}]', ":2: not valid JSON (Expecting ':'"),
        ('[{"prompt": "p", "response": "r"},\n 3]', ":2: a row is an object with keys, not 3"),
        ('[{"prompt": "p", "response": "r"}\n', ":2: not valid JSON (the list has no end)"),
        ("[" * 100_000, ":1: not valid JSON (nested too deep)"),
        ('{"data": [{"prompt": "p"}]}', ":1: its rows lie below a key (data); leave the list alone"),
    ],
)
def test_broken_json_lists(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert refused(path).startswith(f"{path}{message}")


def test_latin_1_in_whole_file_formats_names_the_line(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[" + GOOD + b',\n{"prompt": "\xe9"}]')
    assert f"{tmp_path / 'x.json'}:2: not UTF-8 (byte 0xe9" in refused(tmp_path / "x.json")
    (tmp_path / "x.csv").write_bytes(b"prompt,response\np,r\np,\xe9\n")
    assert f"{tmp_path / 'x.csv'}:3: not UTF-8 (byte 0xe9" in refused(tmp_path / "x.csv")


def test_csv_with_quotes_lists_and_crlf(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,response\r\n"a, ""b""\nc",r\r\n\r\np,r\r\n')
    assert read(path) == [Demonstration('a, "b"\nc', "r"), Demonstration("p", "r")]
    (tmp_path / "y.csv.gz").write_bytes(
        gzip.compress(b'prompt,responses,ranks\np,"[""a"", ""b""]","[2, 1]"\n')
    )
    assert read(tmp_path / "y.csv.gz") == [Demonstration("p", "b")]
    path.write_text("text,label\nfine,1\n")
    assert read_records(Source(str(path)), "labelled").records[0].label == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt,response\n"a\nb",r\np,r,extra\n', ":4: 3 cells, but the header names 2 columns"),
        ("prompt,response\np\n", ":2: 1 cells, but the header names 2 columns"),
        ("prompt,responses\np,a b\n", ":2: responses: 'a b' is not a JSON list"),
        ('prompt,response\np,"r\n', ":2: not valid CSV (unexpected end of data)"),
        ("prompt,response\np,\n", ":2: response: empty"),
        ("prompt,ranks,responses\np,,\n", ":2: response: missing"),
        ("prompt;response\np;r\n", ":1: the header 'prompt;response' has no commas"),
    ],
)
def test_broken_csv(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    assert refused(path).startswith(f"{path}{message}")


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    turns = [{"role": "user", "content": "hi"}]
    table = {"prompt": [turns, turns], "response": ["r", None], "score": [1.0, 2.0]}
    parquet.write_table(pyarrow.table(table), path)
    assert refused(path).startswith(f"{path}:row 2: response: missing")
    result = read_records(Source(str(path)), "demonstrations", on_bad_row="skip")
    assert result.records == [Demonstration(turns, "r")]
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    assert refused(path) == f"{path}: the file is empty; give a file with at least one row"
    parquet.write_table(pyarrow.table({"prompt": ["p"], "response": ["r"]}), path)
    packed = tmp_path / "y.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == P_R
    path.write_bytes(b"PAR1 not really")
    assert refused(path).startswith(f"{path}: not a readable parquet file")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    message = refused(tmp_path / "trian.jsonl")
    assert message == f"{tmp_path}/trian.jsonl: no such file; nearest existing name: {tmp_path}/train.jsonl"
    assert "(nor does its folder" in refused(tmp_path / "nowhere" / "train.jsonl")


def test_a_name_with_a_file_ending_is_never_taken_for_a_hub_name():
    assert refused("nowhere.jsonl").startswith("nowhere.jsonl: no such file")
    assert refused("owner/name.csv").startswith("owner/name.csv: no such file")


def test_a_file_in_utf_16_is_named_as_such(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n', encoding="utf-16")
    assert refused(path).startswith(f"{path}:1: the file is in UTF-16; save it as UTF-8")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert (
        refused(tmp_path / name) == f"{tmp_path / name}: the file is empty; give a file with at least one row"
    )


@pytest.mark.parametrize(
    ("name", "data"), [("x.jsonl", b"\n \n"), ("x.json", b"[ ]"), ("x.csv", b"prompt,response\n")]
)
def test_a_file_without_rows_is_empty(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert "the file is empty" in refused(tmp_path / name)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    assert "the file is empty" in refused(tmp_path / f"{name}.gz")


def test_an_unknown_ending(tmp_path):
    (tmp_path / "x.txt").write_bytes(GOOD)
    assert refused(tmp_path / "x.txt").startswith(
        f"{tmp_path}/x.txt: unknown kind of file; data files end in .jsonl"
    )


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: b"no gzip", lambda data: data[:60] + b"x" * 20]
)
def test_damaged_gzip(tmp_path, damage):
    rows = b"".join(b'{"prompt": "p%d", "response": "r%d"}\n' % (i, i * i) for i in range(100))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(rows)))
    assert refused(path).startswith(f"{path}: the gzip data are cut short or damaged")


def test_folders(tmp_path):
    assert "holds no data file" in refused(tmp_path)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "train-1.jsonl").write_bytes(GOOD)
    (tmp_path / "train-2.csv").write_bytes(b"prompt,response\np2,r\n")
    (tmp_path / "test.jsonl").write_bytes(b'{"prompt": "t", "response": "r"}')
    assert [each.prompt for each in read(tmp_path)] == ["t", "p", "p2"]
    assert [each.prompt for each in read(tmp_path, split="train")] == ["p", "p2"]
    assert "split=dev: no data file" in refused(tmp_path, split="dev")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "train.jsonl").write_bytes(GOOD)
    assert read(tmp_path, subset="part", split="train") == P_R
    assert "nearest existing name" in refused(tmp_path, subset="prat")


def test_a_split_of_a_file_is_its_column(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"split": name, "prompt": name, "response": "r"} for name in ("train", "eval", "train")]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [each.prompt for each in read(path, split="train")] == ["train", "train"]
    assert (
        refused(path, split="test") == f"{path}: split=test: no row has it; splits in the file: eval, train"
    )
    path.write_bytes(GOOD)
    assert "the row has no key 'split'; leave it out" in refused(path, split="train")
    assert "subset=a is only for hub data sets" in refused(path, subset="a")
    assert "revision=main is only for hub data sets" in refused(path, revision="main")


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the library `datasets`: one data set, `owner/pairs`, with one named configuration."""
    calls = []

    class DatasetsError(Exception):
        pass

    def load_dataset(path, **options):
        calls.append(options)
        if path != "owner/pairs":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub\nmore lines")
        return [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": ""}]

    module = types.SimpleNamespace(
        load_dataset=load_dataset,
        get_dataset_config_names=lambda path, revision=None: ["default", "small"],
        exceptions=types.SimpleNamespace(DatasetsError=DatasetsError),
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_data_sets(hub):
    source = Source("owner/pairs", split="train", subset="small", revision="v1", limit=1)
    assert read_records(source, "demonstrations").records == P_R
    assert hub == [{"split": "train", "revision": "v1", "name": "small"}]
    assert refused("owner/pairs", split="train").startswith("owner/pairs[train]:row 2: response: empty")


def test_a_subset_that_is_no_configuration_is_a_folder(hub):
    read_records(Source("owner/pairs", split="test", subset="harmless-base", limit=1), "prompts")
    assert hub == [{"split": "test", "revision": None, "data_dir": "harmless-base"}]


def test_hub_errors_are_clear(hub):
    message = refused("owner/pairs")
    assert (
        message.startswith("owner/pairs: no local file or folder of that name") and "split: train" in message
    )
    message = refused("owner/pears", split="train")
    assert message.startswith(
        "owner/pears: no local file or folder, and as hub data set (split=train, subset=None)"
    )
    assert "FileNotFoundError: Dataset 'owner/pears' doesn't exist" in message and "more lines" not in message


@pytest.mark.parametrize(
    ("name", "text", "line", "problem"),
    [
        ("a.csv", 'prompt,response\na,b\nc,"d"x\ne,f\n', 3, "not valid CSV"),
        ("a.csv", "prompt,response,response\na,b,c\n", 1, "the header names response twice"),
        ("a.json", '[{"a": 1},\n{"a": ,\n{"a": 3}]', 2, "not valid JSON"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', 1, "not valid JSON (there is more behind the list)"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', 2, "not valid JSON (a comma or the list's end is missing)"),
        ("a.json", '[{"a": 1},\n{"a": 2}\n', 3, "not valid JSON (the list has no end)"),
        ("a.json", '[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", 2, "not valid JSON (Exceeds the limit"),
    ],
)
def test_a_file_whose_rest_has_no_certain_meaning_is_refused_whole(tmp_path, name, text, line, problem):
    """No row can be passed over there: the rows behind the fault would be lost uncounted."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match="what follows in the file cannot be read") as error:
        list(file_rows(path))
    assert str(error.value).startswith(f"{path}:{line}: {problem}")


def test_a_number_too_long_to_read_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "1" * 5000 + '}\n{"a": 2}\n')
    (first, bad), second = file_rows(path)
    assert first == f"{path}:1" and isinstance(bad, RowError) and second == (f"{path}:2", {"a": 2})
