"""The toy world: short, disjoint, always the same, and with something to like in it."""

import random
import re

import pytest

from data import toy
from rlhf.records import Source, find_overlap, read_records
from rlhf.scorers import ClassifierScorer

WORDS = {*toy.GOOD, *toy.BAD, *toy.NEUTRAL}


@pytest.fixture(scope="module")
def files():
    return toy.make_records()


def test_texts_are_short_and_follow_the_grammar(files):
    for record in files["sft_train"] + files["sft_eval"]:
        assert len(record.prompt.encode()) <= 16 and len(record.response.encode()) <= 24
        words = re.fullmatch(r" (\w+), (\w+) and (\w+)\.", record.response)
        assert words is not None and set(words.groups()) <= WORDS


def test_prompts_have_an_answer_of_their_own(files):
    for name in ("collect", "ppo", "evaluate"):
        references = [record.reference for record in files[f"{name}_prompts"]]
        assert all(re.fullmatch(r" (\w+), (\w+) and (\w+)\.", text) for text in references)
        assert len(set(references)) > len(references) / 2


def test_prompts_are_disjoint_but_for_two_answers_in_training(files):
    names = [f"{name}_prompts" if name in ("collect", "ppo", "evaluate") else name for name in toy.PROMPTS]
    for i, name in enumerate(names):
        prompts = [record.prompt for record in files[name]]
        assert len(set(prompts)) == toy.PROMPTS[name.removesuffix("_prompts")]
        assert len(prompts) == len(set(prompts)) * (2 if name == "sft_train" else 1)
        assert all(not find_overlap(files[name], files[other]) for other in names[:i])


def test_nouns_are_disjoint():
    assert not set(toy.LABELLER_NOUNS) & set(toy.GOLD_NOUNS)
    assert not set(toy.NOUNS) & {*toy.LABELLER_NOUNS, *toy.GOLD_NOUNS}
    assert len(WORDS) == 24


def test_records_depend_on_the_seed_alone(files):
    assert toy.make_records() == files
    assert toy.make_records(1) != files


def test_build_writes_what_the_configuration_names(tmp_path, files):
    toy.build(tmp_path / "toy")
    for name, records in files.items():
        kind = {"sft": "demonstrations", "lab": "labelled", "gol": "labelled"}.get(name[:3], "prompts")
        assert read_records(Source(str(tmp_path / "toy" / f"{name}.jsonl")), kind).records == records
    (tmp_path / "toy" / "gold.jsonl").write_text("kept")
    toy.build(tmp_path / "toy")
    assert (tmp_path / "toy" / "gold.jsonl").read_text() == "kept"


@pytest.mark.parametrize(("name", "kind"), [("labeller", "tfidf_logistic"), ("gold", "char_naive_bayes")])
def test_scorers_prefer_good_words_over_bad_ones(files, name, kind):
    scorer = ClassifierScorer(files[name], kind)
    draw = random.Random(7)
    responses = [toy.make_response(draw) for _ in range(500)]
    scores = scorer(["the soup was"] * 500, [text for text, _ in responses])
    by_balance = {
        balance: [score for score, (_, b) in zip(scores, responses, strict=True) if b == balance]
        for balance in (-2, 0, 2)
    }
    means = [sum(each) / len(each) for each in by_balance.values()]
    assert means[0] < -1 < means[1] < 1 < means[2]
