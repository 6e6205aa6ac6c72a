"""The public formats, in small and as they are published."""

import pytest

from rlhf.formats import normalise, split_transcripts
from rlhf.records import Source, find_overlap, read_records
from rlhf.rows import RowError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
PAIR = [{"prompt": [USER], "responses": ["a", "b"], "ranks": [1, 2]}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [{**PAIR[0], "prompt": "q"}]),
        ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PAIR),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PAIR),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, PAIR),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PAIR),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            PAIR,
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [{"prompt": [USER], "response": "a"}],
        ),
        ({"conversations": [{"from": "human", "value": "q"}]}, [{"prompt": [USER]}]),
        ({"messages": [USER, ANSWER]}, [{"prompt": [USER], "response": "a"}]),
        ({"prompt": "q", "completion": "a"}, [{"prompt": "q", "response": "a"}]),
        ({"prompt": [USER], "completion": [ANSWER]}, [{"prompt": [USER], "response": "a"}]),
        ({"instruction": "do", "input": "", "output": "a"}, [{"prompt": "do", "response": "a"}]),
        ({"instruction": "do", "output": "a"}, [{"prompt": "do", "response": "a"}]),
        ({"instruction": "do", "input": "it", "output": "a"}, [{"prompt": "do\n\nit", "response": "a"}]),
        (
            {"instruction": "do", "instances": [{"input": "x", "output": "a"}, {"input": "", "output": "b"}]},
            [{"prompt": "do\n\nx", "response": "a"}, {"prompt": "do", "response": "b"}],
        ),
        ({"post": "p", "reference": "r", "judge": None}, [{"prompt": "p", "reference": "r"}]),
    ],
)
def test_formats(row, expected):
    assert normalise(row) == expected


SYSTEM = {"role": "system", "content": "be kind"}


def test_system_texts_and_histories_come_before_the_turns():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    [row] = normalise({"conversations": turns, "system": "be kind"})
    assert row == {"prompt": [SYSTEM, question], "response": "a"}
    [row] = normalise({"conversations": turns[:1], "chosen": turns[1], "rejected": {**turns[1], "value": "b"},
                       "system": "be kind"})  # fmt: skip
    assert row["prompt"] == [SYSTEM, question]
    [row] = normalise({"messages": [SYSTEM, question, answer], "system": "be rude"})
    assert row["prompt"] == [SYSTEM, question]
    [row] = normalise(
        {"instruction": "do", "input": "it", "output": "x", "history": [["q", "a"]], "system": "be kind"}
    )
    assert row["prompt"] == [SYSTEM, question, answer, {"role": "user", "content": "do\n\nit"}]
    [row] = normalise({"instruction": "do", "output": "x", "history": [], "system": ""})
    assert row["prompt"] == "do"


def test_keys_without_a_value_do_not_count():
    assert normalise({"prompt": "q", "response": "a", "chosen": None, "responses": None}) == [
        {"prompt": "q", "response": "a"}
    ]


def test_transcripts_split_at_the_last_shared_turn():
    before = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
    prompt, responses = split_transcripts(
        before + "\n\nAssistant: same yes", before + "\n\nAssistant: same no"
    )
    assert [(turn["role"], turn["content"]) for turn in prompt] == [
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]
    assert responses == ["same yes", "same no"]


def test_one_transcript_may_begin_the_other():
    start = "\n\nHuman: q\n\nAssistant: yes"
    assert split_transcripts(start, start + " indeed") == ([USER], ["yes", "yes indeed"])


def test_turns_of_one_speaker_in_a_row_become_one():
    prompt, _ = split_transcripts(*(f"\n\nHuman: a\n\nHuman: b\n\nAssistant: {end}" for end in "xy"))
    assert prompt == [{"role": "user", "content": "a\n\nb"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "chosen: no prompt key beside it, and no transcript"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
            "chosen: no prompt",
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: x\n\nHuman: b",
                "rejected": "\n\nHuman: a\n\nAssistant: y",
            },
            "chosen: its conversation parts from the other one before the last turn",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]},
            "rejected: its turns before the last differ",
        ),
        ({"chosen": [USER], "rejected": [USER]}, "chosen: its last turn is by user"),
        ({"prompt": "q", "chosen": [], "rejected": []}, "chosen: a list of turns is expected"),
        ({"prompt": "q", "chosen": "a", "rejected": [OTHER]}, "rejected: text, a turn or a list"),
        ({"conversations": "q", "chosen": {}, "rejected": {}}, "conversations: a list of turns"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations: holds a response only"),
        (
            {"conversations": [{"from": "observation", "value": "a"}]},
            "conversations[0]: unknown role 'observation'",
        ),
        ({"prompt": [USER], "completion": [USER, ANSWER]}, "completion: 2 turns; one turn by the assistant"),
        ({"instruction": "do", "instances": []}, "instances: a list of objects with input and output"),
        ({"instruction": "do", "input": 3, "output": "a"}, "input: text is expected, not 3"),
        ({"instruction": "do", "output": "a", "history": ["q"]}, "history: a list of [question, answer]"),
        (
            {"conversations": [{"from": "human", "value": "q"}], "system": 3},
            "system: text is expected, not 3",
        ),
        ({}, "its keys () fit no known format"),
    ],
)
def test_rows_that_cannot_be_taken_apart(row, message):
    with pytest.raises(RowError) as error:
        normalise(row)
    assert str(error.value).startswith(message)


# name, kind, rows, of them bad: HH has 4 empty responses and 2 pairs that part before the last turn,
# UltraFeedback 5 pairs of equal responses and 2 empty ones
PUBLISHED = [
    ("hh_harmless", "ranked", 1812, 6),
    ("tulu_bon_ranked", "ranked", 688, 0),
    ("ultrafeedback_1200", "ranked", 1199, 7),
    ("dpo_en_300", "ranked", 300, 0),
    ("dpo_zh_300", "ranked", 300, 0),
    ("tldr", "demonstrations", 1551, 0),
    ("alpaca_en_999", "demonstrations", 997, 0),
    ("alpaca_zh_1000", "demonstrations", 1000, 0),
    ("seed_tasks_175", "demonstrations", 174, 0),
]


@pytest.mark.parametrize(("name", "kind", "rows", "bad"), PUBLISHED)
def test_published_files_load(shared, name, kind, rows, bad):
    source = Source(str(shared / "data" / f"{name}.jsonl.gz"))
    result = read_records(source, kind, on_bad_row="skip")
    assert (len(result.records), len(result.skipped)) == (rows - bad, bad)
    for record in result.records:
        prompt = record.prompt
        assert (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()
        assert isinstance(prompt, str) or prompt[-1]["role"] == "user"
        assert all(text.strip() for text in (record.responses if kind == "ranked" else [record.response]))
    assert len(read_records(source, "prompts", on_bad_row="skip").records) == rows - bad


@pytest.mark.parametrize(("name", "kind", "rows", "bad"), PUBLISHED)
def test_published_files_split_into_disjoint_parts(shared, name, kind, rows, bad):
    path = str(shared / "data" / f"{name}.jsonl.gz")
    train, held_out = (
        read_records(Source(path, part=part), kind, on_bad_row="skip").records
        for part in ((0, 0.8), (0.8, 1))
    )
    assert len(train) + len(held_out) == rows - bad
    assert not find_overlap(train, held_out)


def first(shared, name, kind):
    return read_records(Source(str(shared / "data" / f"{name}.jsonl.gz"), limit=1), kind).records[0]


def test_published_files_keep_what_they_say(shared):
    record = first(shared, "hh_harmless", "ranked")
    assert [turn["role"] for turn in record.prompt] == ["user", "assistant"] * 2 + ["user"]
    assert record.prompt[0]["content"] == "what are some pranks with a pen i can do?"
    assert record.responses[0].startswith("No, sorry!  All of these involve a pen")
    record = first(shared, "tulu_bon_ranked", "ranked")
    assert len(record.responses) == len(record.scores) == 11 and record.ranks[0] == 1
    assert list(record.ranks) == sorted(record.ranks)
    assert (
        first(shared, "dpo_zh_300", "ranked").prompt[0]["content"].startswith("国会的转发\n美国国会由众议院")
    )
    record = read_records(Source(str(shared / "data" / "dpo_en_300.jsonl.gz"), limit=2), "ranked").records[1]
    assert [turn["role"] for turn in record.prompt] == ["system", "user"]
    record = first(shared, "alpaca_zh_1000", "demonstrations")
    assert record.prompt.startswith("识别并解释给定列表中的两个科学理论")
    record = first(shared, "tldr", "demonstrations")
    assert record.prompt.endswith("TL;DR:") and record.response.startswith("long relationship; fell in love")
    assert first(shared, "tldr", "prompts").reference == record.response


def test_splits_of_a_published_file(shared):
    path = str(shared / "data" / "ultrafeedback_1200.jsonl.gz")
    counts = [
        len(read_records(Source(path, split=split), "ranked", on_bad_row="skip").records)
        for split in ("train", "eval")
    ]
    assert sum(counts) == 1192 and counts[1] > 190
