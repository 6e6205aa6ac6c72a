"""Scorers against references: the libraries' numbers, Chinese and Japanese, and what is refused."""

import math
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from rlhf.records import PromptRecord, Source, read_records
from rlhf.reference_scorers import KINDS, ReferenceScorer, tokenize
from rlhf.scorers import WeightedSum

REFERENCE = "the cat sat on the mat"


def score(kind: str, response: str, *references: str) -> float:
    """The score of a response to a prompt with these references."""
    [found] = ReferenceScorer(kind, [PromptRecord("p", each) for each in references])(["p"], [response])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_scores_one_and_nothing_scores_zero(kind: str) -> None:
    assert score(kind, REFERENCE, REFERENCE) == pytest.approx(1, abs=1e-9)
    for empty in ("", " ", "\n\t"):
        assert score(kind, empty, REFERENCE) == 0
    assert 0 < score(kind, "the cat", REFERENCE) < score(kind, "the cat sat on it", REFERENCE) < 1


@pytest.mark.parametrize(
    ("kind", "response", "expected"),
    [
        # common subsequence "the cat": precision 2/2, recall 2/6
        ("rouge_l", "the cat", 0.5),
        # "the on" of "the mat sat on": LCS "the sat on" = 3, precision 3/4, recall 3/6
        ("rouge_l", "the mat sat on", 0.6),
        # words 2 of 2 and 2 of 6: 1/2; pairs 1 of 1 and 1 of 5: 1/3; LCS 1/2
        ("rouge_avg", "the cat", (1 / 2 + 1 / 3 + 1 / 2) / 3),
        # all n-grams (n = 1, 2) right; brevity exp(1 - 6/2)
        ("bleu", "the cat", math.exp(-2)),
        # 1-grams 3/4; 2-grams 1/3; 3-grams 0, smoothed to 1/(2*2); 4-grams 0, smoothed to 1/(4*1); brevity
        # exp(1 - 6/4)
        ("bleu", "the cat ran the", math.exp(-0.5) * (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25),
    ],
)
def test_golden_values(kind: str, response: str, expected: float) -> None:
    assert score(kind, response, REFERENCE) == pytest.approx(expected, abs=1e-9)


def test_on_english_the_numbers_are_those_of_rouge_score(shared: Path) -> None:
    path = str(shared / "data" / "tldr.jsonl.gz")
    records = read_records(Source(path, limit=40), "prompts").records
    prompts = [record.prompt for record in records]
    responses = [str(record.prompt).split("\n")[2] for record in records]
    library = RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = [
        (library.score(record.reference, response), record.reference, response)
        for record, response in zip(records, responses, strict=True)
        if (record.reference + response).isascii()
    ]
    assert len(pairs) > 20
    for found, reference, response in pairs:
        assert score("rouge_l", response, reference) == pytest.approx(found["rougeL"].fmeasure)
        mean = sum(each.fmeasure for each in found.values()) / 3
        assert score("rouge_avg", response, reference) == pytest.approx(mean)
    assert max(ReferenceScorer("rouge_l", records)(prompts, responses)) > 0


def test_scripts_without_spaces_are_parted_into_characters() -> None:
    assert tokenize("我爱 Hello世界") == ["我", "爱", "hello", "世", "界"]
    assert tokenize("猫がすき café don't_do") == ["猫", "が", "す", "き", "café", "don", "t", "do"]
    # 我喜欢吃 of 我喜欢吃苹果 and 我喜欢吃香蕉: 4 of 6 both ways
    assert score("rouge_l", "我喜欢吃香蕉", "我喜欢吃苹果") == pytest.approx(4 / 6)
    # n-grams right: 4/6, 3/5, 2/4, 1/3
    expected = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert score("bleu", "我喜欢吃香蕉", "我喜欢吃苹果") == pytest.approx(expected)
    # of 犬がすき and 猫がすき: 3/4, 2/3, 1/2, and 0 of one, smoothed to 1/2
    assert score("bleu", "犬がすき", "猫がすき") == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_chinese_data_is_told_apart_from_other_chinese(shared: Path) -> None:
    path = str(shared / "data" / "alpaca_zh_1000.jsonl.gz")
    records = read_records(Source(path, limit=30), "prompts").records
    prompts = [record.prompt for record in records]
    answers = [record.reference for record in records]
    for kind in KINDS:
        scorer = ReferenceScorer(kind, records)
        own, others = scorer(prompts, answers), scorer(prompts, answers[1:] + answers[:1])
        assert min(own) == pytest.approx(1, abs=1e-6)
        assert max(others) < 0.5


def test_forms_of_one_character_are_one() -> None:
    assert tokenize("cafe\u0301 ｶﾀｶﾅ") == tokenize("café カタカナ")


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_references_the_nearest_counts(kind: str) -> None:
    both = score(kind, "a dog ran far away", REFERENCE, "a dog ran far away")
    assert both == pytest.approx(1, abs=1e-9)
    assert both == score(kind, "a dog ran far away", "a dog ran far away", REFERENCE)
    halves = "the cat sat", "ran far away"
    alone = [score(kind, "the cat sat ran far away", half) for half in halves]
    assert score(kind, "the cat sat ran far away", *halves) == max(alone), "not of both together"


def test_a_prompt_is_the_same_as_text_and_as_a_users_turn() -> None:
    scorer = ReferenceScorer("rouge_l", [PromptRecord("p", REFERENCE)])
    assert scorer([[{"role": "user", "content": "p"}]], ["the cat"]) == scorer(["p"], ["the cat"])


def test_scale_multiplies_and_stands_in_the_name() -> None:
    records = [PromptRecord("p", REFERENCE)]
    scaled, plain = ReferenceScorer("rouge_l", records, scale=10.0), ReferenceScorer("rouge_l", records)
    assert scaled(["p"], ["the cat"]) == [5.0]
    assert (scaled.name, plain.name) == ("10*rouge_l", "rouge_l")
    assert WeightedSum([(10.0, plain)])(["p"], ["the cat"]) == [5.0]


def test_a_prompt_without_a_reference_is_named() -> None:
    records = [PromptRecord("a", REFERENCE), PromptRecord("b c"), PromptRecord("d", " ")]
    with pytest.raises(ValueError, match=r"2 of 3 prompts have none, the first of them 'b c'; add a `ref"):
        ReferenceScorer("bleu", records)
