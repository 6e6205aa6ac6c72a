"""The record schemas, and the checks between a row of our own schema and a record.

Rows of public formats have passed `rlhf.formats` before. A failed check raises RowError with the key;
whoever reads knows the file and line. Letters: K responses of a prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from rlhf.formats import messages_of
from rlhf.rows import Row, RowError, check_text, shorten

Prompt: TypeAlias = str | list[dict[str, str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Demonstration:
    """A prompt (with a conversation's earlier turns) and the response to learn."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class RankedList:
    """A prompt and K >= 2 responses with ranks: 1 is best, equal ranks are ties.

    response_tokens: the tokens as they were sampled; tokenizer: the fingerprint of what made them.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    response_tokens: tuple[tuple[int, ...], ...] | None = None
    tokenizer: str | None = None

    @property
    def has_pair(self) -> bool:
        """Tell whether any two responses differ in rank."""
        return len(set(self.ranks)) > 1

    @property
    def best(self) -> str:
        """Return the first of the responses that rank best."""
        return self.responses[self.ranks.index(min(self.ranks))]


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, and the response people wrote to it where there is one."""

    prompt: Prompt
    reference: str | None = None


@dataclass(frozen=True)
class LabelledText:
    """A text and whether people liked it (1) or not (0)."""

    text: str
    label: int


Record: TypeAlias = Demonstration | RankedList | PromptRecord | LabelledText


def _demonstration(row: Row) -> Demonstration:
    if "responses" in row:
        ranked = _ranked(row)
        return Demonstration(ranked.prompt, ranked.best)
    key = "reference" if "response" not in row and "reference" in row else "response"
    if key not in row and isinstance(row.get("prompt"), list):
        raise RowError("response", "missing: the conversation ends with the user's turn; add the answer")
    return Demonstration(_prompt(row), _text(row, key))


def _response(row: Row) -> Demonstration:
    """A demonstration whose response may be empty: what a system said."""
    silent = isinstance(row.get("response"), str) and not row["response"].strip()
    return Demonstration(_prompt(row), "") if silent else _demonstration(row)


def _ranked(row: Row) -> RankedList:
    prompt = _prompt(row)
    responses = _each(row, "responses", check_text, "a list of texts")
    if len(responses) < 2:
        raise RowError("responses", f"{len(responses)} response(s); at least two are needed to rank them")
    scores = _per_response(row, "scores", _score, len(responses))
    ranks = _per_response(row, "ranks", _rank, len(responses))
    if ranks is None and scores is None:
        raise RowError(
            "ranks", "neither ranks nor scores are given; add one of them, one number per response"
        )
    if ranks is None:
        order = sorted(set(scores or ()), reverse=True)
        ranks = tuple(order.index(score) + 1 for score in scores or ())
    _check_ranks(responses, ranks, scores)
    tokens = _per_response(row, "response_tokens", _token_ids, len(responses))
    return RankedList(prompt, responses, ranks, scores, tokens, _optional_text(row, "tokenizer"))


def _prompt_record(row: Row) -> PromptRecord:
    if "responses" in row:
        return PromptRecord(_ranked(row).prompt)
    if "response" in row:
        return PromptRecord(_prompt(row), _text(row, "response"))
    return PromptRecord(_prompt(row), _optional_text(row, "reference"))


def _labelled(row: Row) -> LabelledText:
    label = row.get("label")
    if label is None:
        raise _missing(row, "label")
    if label not in (0, 1, "0", "1"):
        raise RowError("label", f"{shorten(label)}; 1 (liked) or 0 (not liked) is expected")
    return LabelledText(_text(row, "text"), int(label))


KINDS: dict[str, Callable[[Row], Record]] = {
    "demonstrations": _demonstration,
    "responses": _response,
    "ranked": _ranked,
    "prompts": _prompt_record,
    "labelled": _labelled,
}


def _prompt(row: Row) -> Prompt:
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return _text(row, "prompt")
    messages = messages_of(prompt, "prompt")
    if messages[-1]["role"] != "user":
        raise RowError(
            "prompt", f"its last turn is by {messages[-1]['role']}; a prompt ends with the user's turn"
        )
    for index, message in enumerate(messages):
        if message["role"] != "system":
            _text(message, "content", f"prompt[{index}].content")
    return messages


def _text(row: Mapping[str, Any], key: str, name: str | None = None) -> str:
    name = name or key
    value = row.get(key)
    if value is None:
        raise _missing(row, name)
    return check_text(value, name)


def _missing(row: Mapping[str, Any], key: str) -> RowError:
    keys = ", ".join(each for each in row if row[each] is not None)
    return RowError(
        key, f"missing (the row has {keys}); add it, or name its column with columns={{{key}: ...}}"
    )


def _optional_text(row: Row, key: str) -> str | None:
    return None if row.get(key) is None else _text(row, key)


def _each(row: Row, key: str, check: Callable[[Any, str], T], expected: str) -> tuple[T, ...]:
    values = row.get(key)
    if values is None:
        raise _missing(row, key)
    if not isinstance(values, list):
        raise RowError(key, f"{shorten(values)}; {expected} is expected")
    return tuple(check(value, f"{key}[{index}]") for index, value in enumerate(values))


def _per_response(row: Row, key: str, check: Callable[[Any, str], T], count: int) -> tuple[T, ...] | None:
    if row.get(key) is None:
        return None
    values = _each(row, key, check, "a list, one per response")
    if len(values) != count:
        raise RowError(key, f"{len(values)} for {count} responses; one per response is expected")
    return values


def is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _score(value: Any, name: str) -> float:
    if not is_number(value):
        raise RowError(name, f"{shorten(value)}; a finite number is expected")
    return float(value)


def _rank(value: Any, name: str) -> int:
    if not is_number(value) or value != int(value) or value < 1:
        raise RowError(name, f"{shorten(value)}; a whole number of at least 1 is expected (1 is best)")
    return int(value)


def _token_ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(token, int) and token >= 0 for token in value):
        raise RowError(name, f"{shorten(value)}; a list of token ids is expected")
    return tuple(value)


def _check_ranks(responses: Sequence[str], ranks: Sequence[int], scores: Sequence[float] | None) -> None:
    if min(ranks) != 1 or max(ranks) > len(responses):
        raise RowError(
            "ranks", f"{list(ranks)} for {len(responses)} responses; ranks go from 1 (best) to at most K"
        )
    of_text: dict[str, int] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if of_text.setdefault(response, rank) != rank:
            raise RowError("ranks", f"the same text {shorten(response)} has two ranks; give it one")
    if scores is None:
        return
    by_score = sorted(zip(scores, ranks, strict=True), key=lambda pair: (-pair[0], pair[1]))
    if any(later < earlier and high > low for (high, earlier), (low, later) in itertools.pairwise(by_score)):
        raise RowError(
            "scores", f"{list(scores)} order the responses unlike the ranks {list(ranks)}; leave one out"
        )
