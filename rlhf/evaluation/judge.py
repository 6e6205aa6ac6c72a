"""A language model as judge of pairs, behind an OpenAI-compatible endpoint.

Every pair is asked in both orders; one that is told differently in the two is a tie. Zheng et al. (2023),
https://arxiv.org/abs/2306.05685.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.evaluation.store import digest
from rlhf.files import append_text
from rlhf.processes import by_main
from rlhf.records import transcript
from rlhf.settings import Judge

OPENAI = "https://api.openai.com/v1"
VERDICT = re.compile(r"\[\[([ABC])\]\]")
LONGEST_PAUSE = 8.0  # seconds before a question is asked again
UNSURE = 2  # retries at most, of what may be no endpoint at all
PLACES = ("prompt", "response_a", "response_b")
OUTCOMES = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the first response


@dataclass(frozen=True)
class Answer:
    """What the judge said to a question, and the tokens that it read and wrote."""

    text: str
    tokens_in: int
    tokens_out: int

    def cost(self, settings: Judge) -> float:
        """What it cost, in the unit of the prices, which are those of a million tokens."""
        prices = settings.price_in or 0, settings.price_out or 0
        return (self.tokens_in * prices[0] + self.tokens_out * prices[1]) / 1e6

    @property
    def outcome(self) -> float | None:
        """1 where the first response is better, 0 where the second is, .5 where neither is; None where the
        answer has no verdict, or more than one.
        """
        found = set(VERDICT.findall(self.text))
        return OUTCOMES[found.pop()] if len(found) == 1 else None


@dataclass(frozen=True)
class Judgement:
    """How a system's responses fared against the baseline's.

    outcomes: of each judged prompt 1, .5, 0, or None where an answer could not be read; consistent: how many
    pairs were told alike in both orders, of the `asked` whose answers could be read; first: how many of the
    `verdicts` that were no tie went to the response that stood first.
    """

    outcomes: list[float | None]
    consistent: int
    asked: int
    unreadable: int
    first: int
    verdicts: int


class _CostError(Exception):
    """`max_cost` is spent."""


class LanguageModelJudge:
    """Asks the endpoint of `settings`; answers are kept in a file of `folder`, and never asked for again.

    Raises ValueError for a template without its places and a missing key, and, while it judges, for an
    endpoint that refuses or does not answer and for a cost above `max_cost`.
    """

    def __init__(self, settings: Judge, folder: Path):
        self.settings = settings
        self.template = read_template(settings.template or "")
        self.cost = 0.0  # of this run, in the unit of the prices
        self._used: dict[str, Answer] = {}
        self._has_answered = False
        self._client = self._connected()
        known = {"base_url", "model", "max_tokens", "temperature"}
        facts = {key: value for key, value in asdict(settings).items() if key in known}
        self._file = folder / "judge" / f"{digest(facts | {'template': self.template})}.jsonl"
        self._lock = threading.Lock()
        self._next = 0.0

    @by_main
    def judge(
        self, prompts: Sequence[Any], ours: Sequence[str], theirs: Sequence[str], bar: Any
    ) -> Judgement:
        """Compare responses (P,) with others to the same prompts; equal ones tie without a question."""
        rows = list(zip(prompts, ours, theirs, strict=True))
        questions = {
            (i, turned): fill(self.template, prompt, b, a) if turned else fill(self.template, prompt, a, b)
            for i, (prompt, a, b) in enumerate(rows)
            if a.strip() != b.strip()
            for turned in (False, True)
        }
        answers = self._answers(list(questions.values()), bar)
        found = {place: answers[text].outcome for place, text in questions.items()}
        bar.update(2 * len(rows) - len(questions))
        pairs = {i: (found[i, False], found[i, True]) for i, turned in found if not turned}
        outcomes = [joined(*pairs[i]) if i in pairs else 0.5 for i in range(len(rows))]
        readable = [(a, b) for a, b in pairs.values() if a is not None and b is not None]
        verdicts = [each for each in found.values() if each in (0.0, 1.0)]
        return Judgement(
            outcomes,
            consistent=sum(first == 1 - second for first, second in readable),
            asked=len(readable),
            unreadable=sum(each is None for each in found.values()),
            first=verdicts.count(1.0),
            verdicts=len(verdicts),
        )

    def _answers(self, questions: Sequence[str], bar: Any) -> dict[str, Answer]:
        """The answer to each question, from the file where it is there."""
        kept = self._kept()
        self._has_answered |= bool(kept)
        due = [text for text in dict.fromkeys(questions) if digest(text) not in kept]
        bar.update(len(questions) - len(due))
        if due:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(self.settings.concurrency) as pool:
                asked = [pool.submit(contextvars.copy_context().run, self._ask, text) for text in due]
                try:
                    for text, future in zip(due, asked, strict=True):
                        kept[digest(text)] = future.result()
                        bar.update()
                except _CostError:
                    pool.shutdown(cancel_futures=True)  # those that are asked already are paid for
                    raise ValueError(
                        f"judge: {self.cost:.2f} spent by this run, judge.max_cost="
                        f"{self.settings.max_cost}; the answers are kept: go on with resume=true, or give "
                        "a lower judge.num_prompts"
                    ) from None
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        answers = {text: kept[digest(text)] for text in questions}
        self._used |= answers
        return answers

    def cost_of_all(self) -> float:
        """What all answers cost that were used, those of earlier runs too."""
        return sum(answer.cost(self.settings) for answer in self._used.values())

    def _kept(self) -> dict[str, Answer]:
        if not self._file.exists():
            return {}
        found = {}
        for line in self._file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # one that a kill cut short
                row = json.loads(line)
                if isinstance(row["text"], str):
                    tokens = (_count(row["tokens_in"]), _count(row["tokens_out"]))
                    found[row["question"]] = Answer(row["text"], *tokens)
        return found

    def _connected(self) -> Any:
        try:
            import openai
        except ImportError:
            raise ValueError(
                "judge=openai needs the openai client: pip install -c constraints.txt '.[judge]'"
            ) from None
        own = self.settings
        key = os.environ.get(own.key_variable or "")
        if not key and own.base_url == OPENAI:
            raise ValueError(f"judge=openai: set {own.key_variable} to your key, or judge.base_url=")
        return openai.OpenAI(
            api_key=key or "none", base_url=own.base_url, max_retries=own.retries or 0, timeout=own.timeout
        )

    def _ask(self, question: str) -> Answer:
        import openai

        own = self.settings
        for attempt in itertools.count(1):
            self._wait_for_turn()
            found: Any = None
            try:
                found = self._client.chat.completions.create(
                    model=own.model,
                    messages=[{"role": "user", "content": question}],
                    max_tokens=own.max_tokens,
                    temperature=own.temperature,
                )
            except openai.OpenAIError as error:
                status = getattr(error, "status_code", None)
                said = self._without_key(str(error))
                said = f"HTTP {status}: {said}" if status and str(status) not in said else said
                raise ValueError(f"judge {own.model}: {said}; {_remedy(error, own)}") from None
            except ValueError:  # of the JSON that the client reads
                pass
            text = _text_of(found)
            if text is not None:
                break
            retries = own.retries or 0
            if attempt > (retries if self._has_answered else min(retries, UNSURE)):
                if not (self._has_answered and getattr(found, "choices", None) == []):
                    self._refuse(attempt)
                break  # with nothing to choose from, which is no verdict
            time.sleep(min(0.5 * 2**attempt, LONGEST_PAUSE))
        self._has_answered = True
        tokens = [_count(getattr(found.usage, f"{kind}_tokens", None)) for kind in ("prompt", "completion")]
        answer = Answer(self._without_key(text or ""), *tokens)
        line = json.dumps({"question": digest(question), **asdict(answer)}, ensure_ascii=False)
        with self._lock:
            if text is not None:
                append_text(self._file, f"\n{line}\n")  # also behind a line that was cut short
            self.cost += answer.cost(own)
        if own.max_cost is not None and not any(tokens):
            raise ValueError(
                f"judge {own.model}: its answers do not say how many tokens they took, so judge.max_cost= "
                "cannot be kept: leave it out"
            )
        return answer

    def _refuse(self, attempts: int) -> None:
        own = self.settings
        if not self._has_answered:
            raise ValueError(
                f"judge.base_url={own.base_url}: what answers there is no OpenAI-compatible endpoint"
            )
        raise ValueError(
            f"judge {own.model}: {attempts} answers on end were not what an OpenAI-compatible endpoint says; "
            "go on with resume=true: the answers so far are kept"
        )

    def _wait_for_turn(self) -> None:
        """Wait as the rate limit asks, and stop where the cost has come to its end."""
        with self._lock:
            if self.settings.max_cost is not None and self.cost >= self.settings.max_cost:
                raise _CostError
            rate = self.settings.requests_per_minute
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + (60 / rate if rate else 0.0)
        time.sleep(turn - now)

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.settings.key_variable or "")
        return text.replace(key, "<key>") if key else text


def read_template(place: str) -> str:
    """The text of a template file. Raises ValueError where it is not there or lacks one of its places."""
    try:
        text = Path(place).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"judge.template={place}: {error.strerror}; name a text file") from error
    for name in PLACES:
        if f"{{{name}}}" not in text:
            raise ValueError(
                f"judge.template={place}: {{{name}}} is missing; it stands where the {name} goes"
            )
    return text


def fill(template: str, prompt: Any, first: str, second: str) -> str:
    """A question; what the texts hold in braces stays as it is."""
    given = dict(zip(PLACES, (transcript(prompt), first, second), strict=True))
    return re.sub(r"\{(prompt|response_a|response_b)\}", lambda match: given[match[1]], template)


def joined(first: float | None, turned: float | None) -> float | None:
    """One outcome from those of both orders: a tie where they differ, None where one could not be read."""
    if first is None or turned is None:
        return None
    return first if first == 1 - turned else 0.5


def total(judgements: Iterable[Judgement]) -> dict[str, Any]:
    """How reliable the judge was over all systems."""
    every = list(judgements)
    asked, unreadable = sum(each.asked for each in every), sum(each.unreadable for each in every)
    verdicts = sum(each.verdicts for each in every)
    return {
        "pairs": asked,
        "consistency": sum(each.consistent for each in every) / asked if asked else None,
        "unreadable_answers": unreadable,
        "first_preferred": sum(each.first for each in every) / verdicts if verdicts else None,
    }


def _text_of(found: Any) -> str | None:
    """The text of an answer, empty where it has none; None where it is no chat completion."""
    try:
        content = found.choices[0].message.content
        if isinstance(content, list):  # of parts
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        text = content or ""
        return text.encode(errors="replace").decode()  # half a surrogate cannot be written
    except (AttributeError, TypeError, KeyError, IndexError):
        return None


def _count(tokens: Any) -> int:
    """A number of tokens, 0 where an endpoint states none."""
    try:
        return max(0, int(tokens))
    except (TypeError, ValueError, OverflowError):
        return 0


def _remedy(error: Exception, settings: Judge) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return f"set {settings.key_variable} to a key that this endpoint takes"
    if status == 400:
        return "look at judge.max_tokens= and judge.temperature=, which this model may not take"
    if status == 404:
        return "look at judge.base_url= (it ends in /v1 as a rule) and judge.model="
    if status == 429:
        return "lower judge.requests_per_minute= or judge.concurrency=, and go on with resume=true"
    return "look at judge.base_url=, and go on with resume=true: the answers so far are kept"
