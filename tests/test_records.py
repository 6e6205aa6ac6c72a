"""Records: what is read, what is refused and how it says so, prompt-disjoint parts, writing."""

import gzip
import itertools
import json

import pytest

from rlhf.records import (
    Demonstration,
    LabelledText,
    PromptRecord,
    RankedList,
    Source,
    different_prompts,
    find_overlap,
    make_sources,
    prompt_key,
    prompt_keys,
    read_records,
    write_records,
)

ONE_TURN = [{"role": "user", "content": "hi"}]


@pytest.fixture
def source(tmp_path):
    """Return a function that writes rows to a jsonl file and returns its Source."""

    def write(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(str(path), **options)

    return write


def test_own_rows_become_records(source):
    row: dict = {"prompt": "p", "response": " r"}
    assert read_records(source(row), "demonstrations").records == [Demonstration("p", " r")]
    assert read_records(source(row), "prompts").records == [PromptRecord("p", " r")]
    row = {"messages": ONE_TURN, "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    assert read_records(source(row), "ranked").records == [RankedList(ONE_TURN, ("a", "b", "c"), (2, 1, 2))]
    assert read_records(source(row), "demonstrations").records == [Demonstration(ONE_TURN, "b")]
    assert read_records(source(row), "prompts").records == [PromptRecord(ONE_TURN)]
    row = {"text": "fine", "label": 1}
    assert read_records(source(row), "labelled").records == [LabelledText("fine", 1)]


def test_scores_give_ranks_best_first_ties_equal(source):
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [0.5, 2, 0.5, -1]}
    (record,) = read_records(source(row), "ranked").records
    assert record.ranks == (2, 1, 2, 3)
    assert record.scores == (0.5, 2.0, 0.5, -1.0)


def test_all_tied_is_a_list_without_a_pair(source):
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}
    (record,) = read_records(source(row), "ranked").records
    assert not record.has_pair
    assert RankedList("p", ("a", "b"), (1, 2)).has_pair


RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("demonstrations", {"prompt": "p"}, "response: missing (the row has prompt)"),
        ("demonstrations", {"response": "r"}, "prompt: missing"),
        ("demonstrations", {"prompt": "p", "response": "  \n"}, "response: empty"),
        ("demonstrations", {"prompt": "", "response": "r"}, "prompt: empty"),
        ("demonstrations", {"prompt": "p", "response": 3}, "response: 3 is of type int; text is expected"),
        ("demonstrations", {"prompt": {"a": 1}, "response": "r"}, "prompt: {'a': 1} is of type dict"),
        ("demonstrations", {"prompt": "p", "response": "\ud800"}, "response: holds half of a surrogate"),
        (
            "demonstrations",
            {"question": "p", "answer": "r"},
            "its keys (answer, question) fit no known format",
        ),
        ("demonstrations", {"prompt": [], "response": "r"}, "prompt: a list of turns is expected, not []"),
        ("demonstrations", {"prompt": ["x"], "response": "r"}, "prompt[0]: a turn is an object"),
        (
            "demonstrations",
            {"prompt": [{"role": "tool", "content": "x"}], "response": "r"},
            "prompt[0]: unknown role 'tool'",
        ),
        (
            "demonstrations",
            {"prompt": [{"role": "user", "content": 3}], "response": "r"},
            "prompt[0]: content is 3; a string is expected",
        ),
        (
            "demonstrations",
            {"prompt": [{"role": "user", "content": " "}], "response": "r"},
            "prompt[0].content: empty",
        ),
        (
            "demonstrations",
            {"prompt": [*ONE_TURN, {"role": "assistant", "content": "x"}], "response": "r"},
            "prompt: its last turn is by assistant; a prompt ends with the user's turn",
        ),
        (
            "demonstrations",
            {"messages": ONE_TURN},
            "response: missing: the conversation ends with the user's turn",
        ),
        ("ranked", {"prompt": "p", "response": "r"}, "responses: missing"),
        ("ranked", RANKED | {"responses": "ab"}, "responses: 'ab'; a list of texts is expected"),
        ("ranked", RANKED | {"responses": ["a"]}, "responses: 1 response(s); at least two"),
        ("ranked", RANKED | {"responses": ["a", ""]}, "responses[1]: empty"),
        ("ranked", {"prompt": "p", "responses": ["a", "b"]}, "ranks: neither ranks nor scores"),
        ("ranked", RANKED | {"ranks": [1]}, "ranks: 1 for 2 responses; one per response is expected"),
        ("ranked", RANKED | {"ranks": [0, 1]}, "ranks[0]: 0; a whole number of at least 1"),
        ("ranked", RANKED | {"ranks": [1.5, 1]}, "ranks[0]: 1.5; a whole number"),
        ("ranked", RANKED | {"ranks": ["1", 2]}, "ranks[0]: '1'; a whole number"),
        ("ranked", RANKED | {"ranks": [2, 3]}, "ranks: [2, 3] for 2 responses; ranks go from 1"),
        ("ranked", RANKED | {"scores": [1.0]}, "scores: 1 for 2 responses"),
        ("ranked", RANKED | {"scores": [1.0, float("nan")]}, "scores[1]: nan; a finite number"),
        ("ranked", RANKED | {"scores": [1.0, True]}, "scores[1]: True; a finite number"),
        ("ranked", RANKED | {"scores": [1.0, None]}, "scores[1]: None; a finite number"),
        (
            "ranked",
            RANKED | {"scores": [0.0, 1.0]},
            "scores: [0.0, 1.0] order the responses unlike the ranks",
        ),
        ("ranked", RANKED | {"responses": ["a", "a"]}, "ranks: the same text 'a' has two ranks"),
        (
            "ranked",
            RANKED | {"response_tokens": [[1], ["x"]]},
            "response_tokens[1]: ['x']; a list of token ids",
        ),
        ("ranked", {"prompt": "p", "chosen": "a", "rejected": "a"}, "rejected: is the same text as chosen"),
        ("ranked", {"prompt": "p", "chosen": "a", "rejected": " "}, "rejected: empty"),
        ("ranked", {"prompt": "p", "chosen": "a", "rejected": 3}, "rejected: text, a turn or a list"),
        ("labelled", {"prompt": "p"}, "label: missing"),
        ("labelled", {"text": "t", "label": 2}, "label: 2; 1 (liked) or 0 (not liked) is expected"),
        ("labelled", {"text": " ", "label": 1}, "text: empty"),
    ],
)
def test_a_bad_row_stops_with_its_line_or_is_counted(source, kind, row, message):
    good = {"text": "t", "label": 1, "prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}
    good = {key: good[key] for key in (("text", "label") if kind == "labelled" else RANKED)}
    bad = source(good, row, good)
    with pytest.raises(ValueError) as error:
        read_records(bad, kind)
    assert str(error.value).startswith(f"{bad.path}:2: {message}")
    assert str(error.value).endswith("data.on_bad_row=skip")
    result = read_records(bad, kind, on_bad_row="skip")
    assert len(result.records) == 2
    assert len(result.skipped) == 1 and result.skipped[0].startswith(f"{bad.path}:2: {message}")


def test_a_source_without_any_good_row_is_an_error(source):
    with pytest.raises(
        ValueError, match=r"no demonstrations left, 2 bad rows were skipped; the first: .*:1: "
    ):
        read_records(source({"prompt": "p"}, {"prompt": "q"}), "demonstrations", on_bad_row="skip")
    with pytest.raises(ValueError, match=r"no prompts left with part=\[0.0, 1e-09\]; widen the part"):
        read_records(source({"prompt": "p"}, part=(0.0, 1e-9)), "prompts")


def test_unknown_kind_and_policy_are_refused(source):
    with pytest.raises(ValueError, match="kind=pairs: kinds are demonstrations, responses, ranked"):
        read_records(source(RANKED), "pairs")
    with pytest.raises(ValueError, match="on_bad_row=ignore: stop or skip"):
        read_records(source(RANKED), "ranked", on_bad_row="ignore")


def test_parts_are_disjoint_and_cover_everything(source):
    rows = [{"prompt": f"prompt {i % 200}", "response": f"r{i}"} for i in range(400)]
    cuts = [0.0, 0.1, 0.5, 0.8, 1.0]
    parts = [
        read_records(source(*rows, part=(low, high)), "demonstrations").records
        for low, high in itertools.pairwise(cuts)
    ]
    assert sum(map(len, parts)) == 400
    assert all(not find_overlap(a, b) for i, a in enumerate(parts) for b in parts[:i])
    # 200 prompts, standard deviation of a share of .4 is sqrt(.4 * .6 / 200) = .035; five of them
    assert abs(len(parts[1]) / 400 - 0.4) < 0.175


def test_a_part_depends_on_the_prompt_alone(source):
    texts = [f"prompt {i}" for i in range(100)]
    as_text = read_records(source(*({"prompt": text} for text in texts), part=(0, 0.5)), "prompts").records
    turns = [{"prompt": [{"role": "user", "content": text}], "response": "r"} for text in reversed(texts)]
    as_turns = read_records(source(*turns, part=(0, 0.5)), "demonstrations").records
    assert {each.prompt for each in as_text} == {each.prompt[0]["content"] for each in as_turns}


def test_prompt_key_is_stable():
    # printf '[["user", "hi"]]' | sha256sum
    assert prompt_key("hi") == "675b797826f34c78b4322399d22d69a6f202258ae75ac2a2b1ad9573ad7b1dab"
    assert prompt_key("hi") == prompt_key(ONE_TURN)
    assert prompt_key("hi") != prompt_key([{"role": "system", "content": "x"}, *ONE_TURN])


def test_limit_counts_records_and_stops_reading(source):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}]
    assert [each.prompt for each in read_records(source(*rows, limit=2), "prompts").records] == ["a", "b"]


def test_sources_are_joined_in_order(source, tmp_path):
    first = source({"prompt": "a"})
    write_records(tmp_path / "second.jsonl", [PromptRecord("b")])
    result = read_records([first, Source(str(tmp_path / "second.jsonl"))], "prompts")
    assert [each.prompt for each in result.records] == ["a", "b"]


def test_columns_rename(source):
    row = {"question": "q", "answer": "a", "prompt": "not this"}
    renamed = source(row, columns={"prompt": "question", "response": "answer"})
    assert read_records(renamed, "demonstrations").records == [Demonstration("q", "a")]
    with pytest.raises(
        ValueError, match=r":1: columns.prompt: there is no column 'questoin'; nearest: question"
    ):
        read_records(source(row, columns={"prompt": "questoin"}), "prompts")
    with pytest.raises(ValueError, match=r"no column 'zzz'; columns are question, answer, prompt"):
        read_records(source(row, columns={"prompt": "zzz"}), "prompts")


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
def test_written_records_read_back_equal(tmp_path, name):
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "你好 🎉\n"}]
    ranked = [
        RankedList(chat, ("a\u2028b", " c"), (1, 2), (0.1 + 0.2, -1e-9), ((1, 2), (3,)), "abc"),
        RankedList("p", ("a", "b"), (1, 1)),
    ]
    write_records(tmp_path / name, ranked)
    assert read_records(Source(str(tmp_path / name)), "ranked").records == ranked
    for kind, records in (
        ("demonstrations", [Demonstration("p", " r\r\n")]),
        ("prompts", [PromptRecord("p"), PromptRecord(chat, "r")]),
        ("labelled", [LabelledText("t", 0)]),
    ):
        write_records(tmp_path / "new" / name, records)
        assert read_records(Source(str(tmp_path / "new" / name)), kind).records == records


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    write_records(path, [PromptRecord("old")])
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_records(path, [PromptRecord("new"), PromptRecord("\ud800")])
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["x.jsonl"]


def test_writing_gzip_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_records(tmp_path / name, [PromptRecord("p")])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b'{"prompt": "p"}\n'


def test_overlap_is_found_across_kinds_and_named_once():
    train = [Demonstration("a", "1"), Demonstration("b", "2"), Demonstration("a", "3")]
    assert find_overlap(train, [PromptRecord([{"role": "user", "content": "a"}])]) == ["a"]
    assert find_overlap(train, [PromptRecord("c")]) == []


def test_case_and_white_space_hide_no_overlap():
    train = [Demonstration("Say  it\ntwice ", "x"), Demonstration("no", "y")]
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "say IT twice"}]
    assert find_overlap(train, [PromptRecord(" say it twice")]) == ["Say  it\ntwice "]
    assert prompt_keys(train) & prompt_keys([PromptRecord("sayit twice"), PromptRecord(asked)]) == set()
    loud = [turn | {"content": turn["content"].swapcase() + "\n"} for turn in asked]
    assert prompt_keys([PromptRecord(asked)]) == prompt_keys([PromptRecord(loud)])


def test_make_sources_takes_what_a_configuration_holds():
    full = {"path": "x", "part": [0, 0.5], "limit": 3}
    assert make_sources("x.jsonl") == [Source("x.jsonl")]
    assert make_sources(full) == [Source("x", part=(0.0, 0.5), limit=3)]
    assert make_sources(["a", [full], Source("b")]) == [
        Source("a"),
        Source("x", part=(0.0, 0.5), limit=3),
        Source("b"),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "data.x has no value: give a file"),
        (3, "data.x=3: a path, a mapping with path, or a list"),
        ([], r"data.x=\[\]: a path, a mapping"),
        ({"path": "x", "splitt": "train"}, "data.x.splitt: no such key; nearest: split"),
        ({"path": "x", "zzz": 1}, "data.x.zzz: no such key; path, split, subset"),
        ({"split": "train"}, "data.x.path=None: a file, folder or hub data set"),
        ({"path": "x", "part": [0.5]}, r"data.x.part=\[0.5\]: two numbers are expected"),
        ({"path": "x", "part": "half"}, "data.x.part='half': two numbers are expected"),
        ({"path": "x", "part": [0.5, 0.2]}, r"part=\[0.5, 0.2\]: two numbers 0 <= low < high <= 1"),
        ({"path": "x", "limit": 0}, "limit=0: a whole number of at least 1"),
    ],
)
def test_make_sources_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        make_sources(value, "data.x")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a", "responses": ["x", "y"], "scores": [1, 1' + "0" * 400 + "]}", "scores[1]"),
        ('{"prompt": [{"role": ["user"], "content": "x"}], "response": "b"}', "unknown role"),
    ],
)
def test_values_that_python_cannot_hash_or_widen_are_bad_rows(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: ") as error:
        read_records(make_sources(str(path)), "prompts" if "role" in row else "ranked")
    assert reason in str(error.value)


def test_good_instances_behind_a_bad_one_are_kept(tmp_path):
    instances = [{"input": "", "output": output} for output in ("one", "", "three")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "count", "instances": instances}) + "\n")
    result = read_records(make_sources(str(path)), "demonstrations", on_bad_row="skip")
    assert [record.response for record in result.records] == ["one", "three"] and len(result.skipped) == 1


@pytest.mark.parametrize("wrong", [{"limit": "5"}, {"limit": 1.5}, {"limit": 0}, {"columns": "prompt"}])
def test_a_sources_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=r"data\.x\.(limit|columns)=.* is expected"):
        make_sources({"path": "a.jsonl", **wrong}, "data.x")


def test_rows_with_one_prompt_are_one_prompt_with_a_reference_where_there_is_one():
    turn = [{"role": "user", "content": "a"}]
    rows = [PromptRecord("a"), PromptRecord("b", "x"), PromptRecord(turn, "y"), PromptRecord("b", "z")]
    assert different_prompts(rows) == [PromptRecord(turn, "y"), PromptRecord("b", "x")]
    assert different_prompts([]) == []
