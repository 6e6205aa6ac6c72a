"""Scorers that need no language model: classifiers of labelled texts, Python functions, weighted sums.

A scorer is called with N prompts (texts or messages) and N responses (texts) and returns N finite
numbers, higher is better; its `name` goes into reports. Letters: N responses.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rlhf.processes import by_main
from rlhf.records import LabelledText, Prompt
from rlhf.rows import shorten
from rlhf.sources import nearest_existing, nearest_name

LARGEST_SCORE = 1e15  # its square, summed over a rollout, is far from overflowing in float32


class Scorer(Protocol):
    """What scores responses."""

    name: str

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]: ...


class ClassifierScorer:
    """The log odds that a reader likes prompt + response, by a classifier trained here on labelled texts.

    Kinds: "tfidf_logistic" (TF-IDF of words and word pairs, logistic regression), "char_naive_bayes"
    (TF-IDF of character 3- to 5-grams, naive Bayes, its log odds calibrated on held-out folds).
    Deterministic; a few thousand texts train in seconds. Raises ValueError for an unknown kind and for
    texts that hold too few of one label.
    """

    def __init__(self, train: list[LabelledText], kind: str = "tfidf_logistic"):
        if kind not in CLASSIFIERS:
            raise ValueError(f"classifier={kind}: classifiers are {', '.join(CLASSIFIERS)}")
        labels = [each.label for each in train]
        if min(labels.count(0), labels.count(1)) < FOLDS:
            raise ValueError(
                f"{len(train)} labelled texts, {labels.count(1)} liked, {labels.count(0)} not: a classifier"
                f" needs at least {FOLDS} of each label; give more texts"
            )
        self.name = kind
        self._log_odds = CLASSIFIERS[kind]([each.text for each in train], labels)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        if not responses:
            return []
        texts = [joined(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return [float(value) for value in self._log_odds(texts)]


def joined(prompt: Prompt, response: str) -> str:
    """Return the text that a reader sees: prompt and response as they join, or turns as paragraphs."""
    if isinstance(prompt, str):
        return prompt + response
    return "\n\n".join([*(message["content"] for message in prompt), response])


LogOdds = Callable[[list[str]], Any]
FOLDS = 5


def _tfidf_logistic(texts: list[str], labels: list[int]) -> LogOdds:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=3.0, max_iter=1000)).fit(texts, labels)
    return model.decision_function


def _char_naive_bayes(texts: list[str], labels: list[int]) -> LogOdds:
    """Fit naive Bayes on all texts, slope and offset of its log odds on held-out folds (Platt 1999)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.naive_bayes import MultinomialNB

    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    features = characters.fit_transform(texts)
    held_out = cross_val_predict(
        MultinomialNB(alpha=0.5), features, labels, cv=FOLDS, method="predict_log_proba"
    )
    calibration = LogisticRegression().fit(held_out[:, [1]] - held_out[:, [0]], labels)
    model = MultinomialNB(alpha=0.5).fit(features, labels)

    def log_odds(given: list[str]) -> Any:
        logs = model.predict_log_proba(characters.transform(given))
        return calibration.decision_function(logs[:, [1]] - logs[:, [0]])

    return log_odds


CLASSIFIERS: dict[str, Callable[[list[str], list[int]], LogOdds]] = {
    "tfidf_logistic": _tfidf_logistic,
    "char_naive_bayes": _char_naive_bayes,
}


class FunctionScorer:
    """A user's Python function: "package.module:function" or "path/to/file.py:function".

    Both are looked for in the current folder, modules also in the environment. It is called as
    function(prompts=[...], responses=[...]) and returns one finite number per response. Raises
    ValueError, naming the function, when it cannot be found, fails, or returns anything else.
    """

    def __init__(self, target: str):
        place, colon, function = target.rpartition(":")
        if not (place and colon and function):
            raise ValueError(
                f"function={target}: package.module:function or path/to/file.py:function is expected"
            )
        module = _load_file(target, Path(place)) if place.endswith(".py") else _load_module(target, place)
        self.name = target
        found = getattr(module, function, None)
        if not callable(found):
            functions = [name for name, value in vars(module).items() if callable(value)]
            hint = nearest_name(function, functions)
            raise ValueError(f"function={target}: {place} has no function {function}{hint}")
        self._function = found

    @by_main  # it may give another score when asked again
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        if not responses:
            return []
        try:
            result = self._function(prompts=list(prompts), responses=list(responses))
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"function={self.name} failed with {type(error).__name__}: {error} ({frame.filename}:"
                f"{frame.lineno}), for {self._failing(prompts, responses)}"
            ) from error
        return check_scores(self.name, result, responses)

    def _failing(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> str:
        """The first response that the function fails on by itself, in words."""
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                self._function(prompts=[prompt], responses=[response])
            except (Exception, SystemExit):
                return f"the response {shorten(response)}"
        return f"{len(responses)} responses together, the first of them {shorten(responses[0])}"


def check_scores(name: str, result: Any, responses: Sequence[str]) -> list[float]:
    """Return what a function gave as a list of floats, one per response; arrays and tensors are fine.

    Raises ValueError with the function's name, and with the response whose score is no finite number.
    """
    scores = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(scores, (list, tuple)):
        raise ValueError(
            f"function={name} returned {shorten(result)}; a list with one number per response is expected"
        )
    if len(scores) != len(responses):
        raise ValueError(
            f"function={name} returned {len(scores)} scores for {len(responses)} responses, the first of "
            f"them {shorten(responses[0])}; one number per response is expected"
        )
    for score, response in zip(scores, responses, strict=True):
        if not isinstance(score, numbers.Real) or not abs(typing.cast(float, score)) <= LARGEST_SCORE:
            raise ValueError(
                f"function={name} returned {shorten(score)} for the response {shorten(response)};"
                f" a finite number is expected, of no more than {LARGEST_SCORE:g} either way"
            )
    return [float(score) for score in scores]


def _load_file(target: str, path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"function={target}: {path} does not exist{nearest_existing(path)}")
    spec = importlib.util.spec_from_file_location(f"scorer_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"function={target}: {path} failed with {type(error).__name__}: {error}") from error
    return module


def _load_module(target: str, name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"function={target}: module {name} could not be imported ({type(error).__name__}: {error});"
            f" it is looked for in {folder} and the environment; a file is given as path/to/file.py:function"
        ) from error


class WeightedSum:
    """The weighted sum of other scorers' scores; ValueError without parts or for a weight not finite."""

    def __init__(self, parts: Sequence[tuple[float, Scorer]]):
        if not parts:
            raise ValueError("parts=[]: a sum needs at least one part {weight: ..., kind: ...}")
        for weight, scorer in parts:
            if not math.isfinite(weight):
                raise ValueError(f"weight={weight} of {scorer.name}: a finite number is expected")
        self.name = " + ".join(f"{weight:g}*{scorer.name}" for weight, scorer in parts)
        self.parts = list(parts)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        total = [0.0] * len(responses)
        for weight, scorer in self.parts:
            scores = scorer(prompts, responses)
            total = [so_far + weight * score for so_far, score in zip(total, scores, strict=True)]
        return total
