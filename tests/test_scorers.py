"""Scorers: classifiers of labelled texts, Python functions, weighted sums."""

import math

import pytest

from rlhf.records import LabelledText
from rlhf.scorers import CLASSIFIERS, ClassifierScorer, FunctionScorer, WeightedSum, joined

GOOD, BAD = ("lovely", "moving", "brilliant"), ("boring", "awful", "clumsy")
TEXTS = [
    LabelledText(f"The {thing} was {word}, {'truly' if i % 2 else 'simply'}.", label)
    for i, thing in enumerate(("plot", "cast", "film", "music", "end"))
    for label, words in ((1, GOOD), (0, BAD))
    for word in words
]


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_give_the_sign_of_the_label(kind):
    scorer = ClassifierScorer(TEXTS, kind)
    scores = scorer(["The play was", "The play was"], [" brilliant.", " awful."])
    assert scores[0] > 0 > scores[1]
    assert scorer.name == kind
    assert scorer([], []) == []


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_are_deterministic_and_score_each_text_alone(kind):
    prompts, responses = [text.text[:9] for text in TEXTS], [text.text[9:] for text in TEXTS]
    scores = ClassifierScorer(TEXTS, kind)(prompts, responses)
    again = ClassifierScorer(TEXTS, kind)(prompts[::-1], responses[::-1])
    assert scores == pytest.approx(again[::-1], abs=1e-12)
    assert all(math.isfinite(score) for score in scores)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_prompt_and_response_are_scored_as_one_text(kind):
    scorer = ClassifierScorer(TEXTS, kind)
    whole = "The cast was lovely."
    assert scorer([whole[:4], whole[:14]], [whole[4:], whole[14:]]) == pytest.approx(
        scorer([""], [whole]) * 2
    )


def test_the_turns_of_a_conversation_are_paragraphs():
    assert joined("a", " b") == "a b"
    assert (
        joined([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "a") == "s\n\nq\n\na"
    )


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_odd_texts_get_finite_scores(kind):
    odd = ["", " ", "!!!", "你好", "brilliant " * 5000]
    assert all(math.isfinite(score) for score in ClassifierScorer(TEXTS, kind)([""] * len(odd), odd))


def test_a_classifier_needs_both_labels_and_a_known_kind():
    with pytest.raises(ValueError, match="classifier=bert: classifiers are tfidf_logistic, char_naive_bayes"):
        ClassifierScorer(TEXTS, "bert")
    with pytest.raises(
        ValueError, match="15 labelled texts, 15 liked, 0 not: a classifier needs at least 5 of each"
    ):
        ClassifierScorer([text for text in TEXTS if text.label == 1])


FUNCTIONS = """
import numpy, torch

class Limit(Exception):
    pass

def length(prompts, responses):
    return [len(p) + len(r) for p, r in zip(prompts, responses)]

def array(prompts, responses):
    return numpy.ones(len(responses), dtype="float32")

def tensor(prompts, responses):
    return torch.ones(len(responses))

def short(prompts, responses):
    return [1.0]

def nan(prompts, responses):
    return [0.0] + [float("nan")] * (len(responses) - 1)

def text(prompts, responses):
    return ["1"] * len(responses)

def nothing(prompts, responses):
    return None

def fails(prompts, responses):
    raise Limit("no more")

def fails_on_y(prompts, responses):
    return [{"x": 1}[response] for response in responses]

def fails_on_two(prompts, responses):
    return [1 / (2 - len(responses))]

value = 3

def huge(prompts, responses):
    return [10**400] * len(responses)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current folder, with my_rewards.py in it."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_is_found_by_file_and_by_module(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    for target in ("my_rewards:length", "my_rewards.py:length", f"{folder}/my_rewards.py:length"):
        scorer = FunctionScorer(target)
        assert scorer(["a", "b"], ["xx", ""]) == [3.0, 1.0]
        assert scorer.name == target
    assert FunctionScorer("my_rewards.py:fails")([], []) == []


@pytest.mark.parametrize("name", ["array", "tensor"])
def test_arrays_and_tensors_are_taken(folder, name):
    assert FunctionScorer(f"my_rewards.py:{name}")(["a", "b"], ["x", "y"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "function=my_rewards.py:short returned 1 scores for 2 responses, the first of them 'x'"),
        ("huge", "my_rewards.py:huge returned 10* ... for .*; a finite number is expected, of no more than"),
        ("nan", "my_rewards.py:nan returned nan for the response 'y{55} ...; a finite number"),
        ("text", "my_rewards.py:text returned '1' for the response 'x'; a finite number is expected"),
        ("nothing", "my_rewards.py:nothing returned None; a list with one number per response"),
        (
            "fails",
            r"my_rewards.py:fails failed with Limit: no more \(.*/my_rewards.py:29\), for the response 'x'",
        ),
        ("fails_on_y", r"failed with KeyError: .*my_rewards.py:32\), for the response 'y{55} "),
        ("fails_on_two", r"failed with ZeroDivisionError.* for 2 responses together, the first of them 'x'"),
    ],
)
def test_what_a_function_gives_is_checked(folder, name, message):
    with pytest.raises(ValueError, match=message) as error:
        FunctionScorer(f"my_rewards.py:{name}")(["a", "b"], ["x", "y" * 500])
    assert name != "fails" or type(error.value.__cause__).__name__ == "Limit"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("length", "function=length: package.module:function or path/to/file.py:function is expected"),
        ("my_rewards.py:", "is expected"),
        ("my_reward.py:length", "does not exist; nearest existing name: .*my_rewards.py"),
        ("my_rewards.py:lenght", "my_rewards.py has no function lenght; nearest: length"),
        ("my_rewards.py:value", "my_rewards.py has no function value"),
        ("broken.py:f", "broken.py failed with SyntaxError"),
        ("no_such_module:f", r"module no_such_module could not be imported \(ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_found(folder, target, message):
    with pytest.raises(ValueError, match=message):
        FunctionScorer(target)


class Constant:
    def __init__(self, value):
        self.value, self.name = value, f"constant {value}"

    def __call__(self, prompts, responses):
        return [self.value] * len(responses)


def test_a_sum_weights_its_parts():
    scorer = WeightedSum([(1.0, Constant(2.0)), (-0.5, Constant(3.0))])
    assert scorer(["p", "q"], ["r", "s"]) == [0.5, 0.5]  # 1 * 2 - .5 * 3
    assert scorer.name == "1*constant 2.0 + -0.5*constant 3.0"


def test_a_sum_needs_parts_with_finite_weights():
    with pytest.raises(ValueError, match="a sum needs at least one part"):
        WeightedSum([])
    with pytest.raises(ValueError, match="weight=nan of constant 1: a finite number is expected"):
        WeightedSum([(math.nan, Constant(1))])
