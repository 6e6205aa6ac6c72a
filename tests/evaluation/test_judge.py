"""The language model as judge: both orders, what is counted, what is kept, how it fails; against servers."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import load_config
from rlhf.evaluation.judge import Answer, LanguageModelJudge, fill, joined, read_template, total
from rlhf.metrics import progress
from rlhf.sources import smollm2_folder
from tests.stage_runs import SMALL, read_json, run_stage

TINY = ["model=tiny", "data=toy"]
Reply = Callable[[str], tuple[int, str]]


class Server:
    """An endpoint that answers questions as `reply` says: a status and a text."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.keys: list[str | None] = []
        self.reply: Reply = lambda question: (200, "[[A]]")
        self.raw: tuple[str, bytes] | None = None  # what stands in place of an answer, with its type
        self.changes: dict[str, Any] = {}  # parts of answers
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                owner.questions.append(question)
                owner.keys.append(self.headers.get("Authorization"))
                status, text = owner.reply(question)
                message = {"role": "assistant", "content": text}
                answer: dict[str, Any] = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010},
                }
                answer |= owner.changes
                data = json.dumps(answer if status == 200 else {"error": {"message": text}}).encode()
                kind = "application/json"
                if owner.raw is not None:
                    kind, data = owner.raw
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def judge_of(server: Server, folder: Path, *words: str) -> LanguageModelJudge:
    config = load_config(
        "evaluate", [*TINY, "judge=openai", "judge.model=m", f"judge.base_url={server.url}", *words]
    )
    return LanguageModelJudge(config.judge, folder)


def parts(question: str) -> tuple[str, str]:
    """The two responses of a question, in the order asked."""
    first, second = re.findall(r"<response_[ab]>\n(.*?)\n</response_[ab]>", question, flags=re.DOTALL)
    return first, second


def longer(question: str) -> tuple[int, str]:
    first, second = parts(question)
    return 200, "So: [[A]]" if len(first) > len(second) else "[[B]]" if len(first) < len(second) else "[[C]]"


PROMPTS = ["p0", "p1", "p2", "p3"]
OURS, THEIRS = ["long one", "x", "same", "ab"], ["short", "longer", "same", "cd"]


def judged(judge: LanguageModelJudge) -> Any:
    return judge.judge(PROMPTS, OURS, THEIRS, progress(8))


def test_both_orders_are_asked_and_equal_responses_are_not(server: Server, tmp_path: Path) -> None:
    server.reply = longer
    found = judged(judge_of(server, tmp_path))
    assert found.outcomes == [1.0, 0.0, 0.5, 0.5]
    assert (found.consistent, found.asked, found.unreadable) == (3, 3, 0)
    assert (found.first, found.verdicts) == (2, 4)
    assert len(server.questions) == 6
    asked = {parts(question) for question in server.questions}
    assert asked == {pair for a, b in zip(OURS, THEIRS, strict=True) if a != b for pair in ((a, b), (b, a))}


def test_told_alike_is_told_alike_in_both_orders(server: Server, tmp_path: Path) -> None:
    replies = {"p0": ("[[C]]", "[[A]]"), "p1": ("[[A]]", "[[C]]"), "p3": ("[[C]]", "[[C]]")}

    def reply(question: str) -> tuple[int, str]:
        prompt = next(each for each in replies if f"\n{each}\n" in question)
        return 200, replies[prompt][parts(question)[0] not in OURS]

    server.reply = reply
    found = judged(judge_of(server, tmp_path))
    assert found.outcomes == [0.5] * 4 and (found.consistent, found.asked) == (1, 3)


def test_a_judge_that_goes_by_order_tells_nothing(server: Server, tmp_path: Path) -> None:
    found = judged(judge_of(server, tmp_path))  # always the first
    assert found.outcomes == [0.5] * 4 and (found.consistent, found.first, found.verdicts) == (0, 6, 6)
    assert total([found]) == {
        "pairs": 3,
        "consistency": 0.0,
        "unreadable_answers": 0,
        "first_preferred": 1.0,
    }


def test_answers_without_a_verdict_are_counted_and_not_guessed(server: Server, tmp_path: Path) -> None:
    server.reply = lambda question: (200, "I like A" if "p0" in question else longer(question)[1])
    found = judged(judge_of(server, tmp_path))
    assert found.outcomes == [None, 0.0, 0.5, 0.5] and (found.asked, found.unreadable) == (2, 2)
    assert [Answer(text, 0, 0).outcome for text in ("[[A]] or [[B]]", "", "[[D]]", "x [[B]]\n")] == [
        None,
        None,
        None,
        0.0,
    ]


def test_answers_are_kept_and_asked_once(server: Server, tmp_path: Path) -> None:
    server.reply = longer
    prices = ["judge.price_in=2", "judge.price_out=100"]
    judge = judge_of(server, tmp_path, *prices)
    first = judged(judge)
    assert judge.cost == pytest.approx(6 * (1000 * 2 + 10 * 100) / 1e6)
    [file] = (tmp_path / "judge").glob("*.jsonl")
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"question": "cut sh')  # by a kill
    again = judge_of(server, tmp_path, *prices)
    assert judged(again) == first and again.cost == 0 and len(server.questions) == 6
    assert again.cost_of_all() == pytest.approx(judge.cost) and judge.cost_of_all() == again.cost_of_all()
    more = judge_of(server, tmp_path, *prices)
    more.judge(["p9"], ["one"], ["another"], progress(2))  # behind the line that was cut short
    assert more.judge(["p9"], ["one"], ["another"], progress(2)).asked == 1 and len(server.questions) == 8
    judged(judge_of(server, tmp_path, "judge.temperature=0.5"))
    assert len(server.questions) == 14, "another way of asking is another judge"


def test_what_fails_for_now_is_asked_again(server: Server, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def twice_busy(question: str) -> tuple[int, str]:
        seen[question] = seen.get(question, 0) + 1
        return longer(question) if seen[question] > 2 else (429, "slow down")

    server.reply = twice_busy
    assert judged(judge_of(server, tmp_path, "judge.retries=3")).outcomes == [1.0, 0.0, 0.5, 0.5]
    assert set(seen.values()) == {3}


def test_what_fails_for_good_is_one_error_and_the_answers_stay(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1234")
    words = ["judge.key_variable=MY_KEY", "judge.retries=0", "judge.concurrency=1"]
    server.reply = lambda question: longer(question) if "p0" in question else (401, "bad key sk-secret-1234")
    with pytest.raises(ValueError, match="set MY_KEY to a key that this endpoint takes") as error:
        judged(judge_of(server, tmp_path, *words))
    assert "sk-secret" not in str(error.value) and server.keys[0] == "Bearer sk-secret-1234"
    [file] = (tmp_path / "judge").glob("*.jsonl")
    kept = file.read_text(encoding="utf-8")
    assert kept.count('"question"') == 2 and "sk-secret" not in kept
    server.reply = longer
    before = len(server.questions)
    assert judged(judge_of(server, tmp_path, *words)).outcomes == [1.0, 0.0, 0.5, 0.5]
    assert len(server.questions) == before + 4
    server.reply = lambda question: (404, "no such model")
    with pytest.raises(ValueError, match=r"judge m: .*no such model.*judge.base_url="):
        judged(judge_of(server, tmp_path, "judge.max_tokens=7"))


def test_an_endpoint_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path, "judge.retries=0")
    server.close()
    with pytest.raises(ValueError, match=r"judge m: Connection error.*judge.base_url="):
        judged(judge)


@pytest.mark.parametrize(
    ("changes", "outcome", "cost"),
    [
        ({"choices": [{"message": {"content": [{"type": "text", "text": "[[C]]"}]}}]}, 0.5, 6 * 1.01),
        ({"choices": [{"message": {"content": "\ud800 [[C]]"}}]}, 0.5, 6 * 1.01),
        ({"choices": [{"message": {"content": None}}]}, None, 6 * 1.01),
        ({"usage": {"prompt_tokens": None, "completion_tokens": 10}}, 0.5, 6 * 0.01),
        ({"usage": {"prompt_tokens": "12", "completion_tokens": 1.0}}, 0.5, 6 * 0.013),
        ({"usage": {"prompt_tokens": -5, "completion_tokens": 1}}, 0.5, 6 * 0.001),
        ({"usage": "lots"}, 0.5, 0),
        ({"usage": None}, 0.5, 0),
    ],
    ids=str,
)
def test_odd_answers_are_read_or_counted_and_kept(
    server: Server, tmp_path: Path, changes: dict[str, Any], outcome: float | None, cost: float
) -> None:
    server.reply = lambda question: (200, "[[C]]")
    server.changes = changes
    words = ["judge.price_in=1000", "judge.price_out=1000", "judge.retries=0"]
    judge = judge_of(server, tmp_path, *words)
    assert judged(judge).outcomes == [outcome, outcome, 0.5, outcome]
    assert judge.cost == pytest.approx(cost) and len(server.questions) == 6
    again = judge_of(server, tmp_path, *words)
    assert judged(again).outcomes == [outcome, outcome, 0.5, outcome] and len(server.questions) == 6


def test_an_answer_with_nothing_to_choose_from_is_asked_for_again_and_then_no_verdict(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.evaluation.judge.time.sleep", lambda seconds: None)
    server.reply = longer
    words = ["judge.concurrency=1", "judge.retries=1"]
    judge_of(server, tmp_path, *words).judge(["p"], ["one"], ["another"], progress(2))
    server.changes = {"choices": []}
    found = judge_of(server, tmp_path, *words).judge(["p", "q"], ["one"] * 2, ["another"] * 2, progress(4))
    assert found.outcomes == [0.0, None] and found.unreadable == 2 and len(server.questions) == 2 + 2 * 2
    server.changes = {}
    found = judge_of(server, tmp_path, *words).judge(["q"], ["one"], ["another"], progress(2))
    assert found.outcomes == [0.0], "it was not kept"


def test_an_error_in_place_of_an_answer_is_never_a_verdict(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.evaluation.judge.time.sleep", lambda seconds: None)
    server.reply = longer
    judge_of(server, tmp_path).judge(["p"], ["one"], ["another"], progress(2))
    server.raw = "application/json", b'{"error": "down for maintenance"}'
    with pytest.raises(ValueError, match="2 answers on end were not what an OpenAI-compatible endpoint says"):
        judge_of(server, tmp_path, "judge.retries=1").judge(["q"], ["one"], ["another"], progress(2))


def test_a_cost_that_cannot_be_known_is_not_limited_silently(server: Server, tmp_path: Path) -> None:
    server.reply, server.changes = longer, {"usage": None}
    with pytest.raises(ValueError, match=r"do not say how many tokens they took, so judge.max_cost= cannot"):
        judged(judge_of(server, tmp_path, "judge.price_in=1", "judge.max_cost=1"))


def test_what_else_stands_among_the_answers_is_asked_for_anew(server: Server, tmp_path: Path) -> None:
    server.reply = longer
    first = judged(judge_of(server, tmp_path))
    [file] = (tmp_path / "judge").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    broken: list[Any] = [{**rows[0], "text": ["x"]}, {"question": rows[1]["question"]}, [], None]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in [*broken, *rows[2:]]), encoding="utf-8")
    assert judged(judge_of(server, tmp_path)) == first and len(server.questions) == 8


def test_a_key_that_an_answer_repeats_is_not_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET")
    server.reply = lambda question: (200, f"your header was {server.keys[-1]} [[A]]")
    judged(judge_of(server, tmp_path))
    [file] = (tmp_path / "judge").glob("*.jsonl")
    assert "Bearer <key> [[A]]" in file.read_text(encoding="utf-8")
    assert "SECRET" not in file.read_text(encoding="utf-8")


def test_an_answer_that_is_no_json_is_asked_for_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.evaluation.judge.time.sleep", lambda seconds: None)
    broken = {1, 3, 4}

    def reply(question: str) -> tuple[int, str]:
        server.raw = ("application/json", b'{"choices": [}') if len(server.questions) in broken else None
        return longer(question)

    server.reply = reply
    words = ["judge.concurrency=1", "judge.retries=2"]
    assert judged(judge_of(server, tmp_path / "a", *words)).outcomes == [1.0, 0.0, 0.5, 0.5]
    assert len(server.questions) == 6 + 3
    broken.update(range(12, 20))
    with pytest.raises(ValueError, match=r"judge m: 3 answers on end were not .*so far are kept"):
        judged(judge_of(server, tmp_path / "b", *words))


def test_a_status_without_words_of_its_own_is_named(server: Server, tmp_path: Path) -> None:
    server.reply, server.raw = (lambda question: (500, "")), ("text/plain", b"oops")
    with pytest.raises(ValueError, match=r"judge m: HTTP 500: oops; look at judge.base_url="):
        judged(judge_of(server, tmp_path, "judge.retries=0"))


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_what_is_no_endpoint_is_named(server: Server, tmp_path: Path, kind: str) -> None:
    server.raw = kind, b"<html>proxy page</html>"
    with pytest.raises(
        ValueError, match=r"judge.base_url=http.*: what answers there is no OpenAI-compatible"
    ):
        judged(judge_of(server, tmp_path, "judge.retries=0"))


def test_the_cost_ends_where_it_is_told_to(server: Server, tmp_path: Path) -> None:
    server.reply = longer
    words = ["judge.price_in=1000", "judge.max_cost=2.5", "judge.concurrency=1"]  # 1 a question
    with pytest.raises(ValueError, match=r"3.00 spent by this run, judge.max_cost=2.5; the answers are kept"):
        judged(judge_of(server, tmp_path, *words))
    assert len(server.questions) == 3


def test_the_rate_is_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("rlhf.evaluation.judge.time.sleep", waited.append)
    monkeypatch.setattr("rlhf.evaluation.judge.time.monotonic", lambda: 100.0)
    judged(judge_of(server, tmp_path, "judge.requests_per_minute=30", "judge.concurrency=1"))
    assert [each for each in waited if each != 0.0] == [2.0, 4.0, 6.0, 8.0, 10.0]


@pytest.mark.slow
def test_several_processes_ask_once_and_report_the_same(
    tiny_run: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server.reply = longer
    words = [*SMALL["evaluate"], "oracle=null", "prefix_lengths=null", "force=true", "num_prompts=6"]
    words += ["judge=openai", "judge.model=m", f"judge.base_url={server.url}"]
    words += [f"systems={{sft: '{tiny_run}/sft/model', ppo: '{tiny_run}/ppo/model'}}"]
    reports, asked = [], []
    for number, own in enumerate(([], ["engine=ddp", "num_processes=2"])):
        result = run_stage("evaluate", *words, *own, f"runs={tmp_path / str(number)}", "name=x")
        assert result.status == 0, result.output
        reports.append(read_json(tmp_path / str(number) / "x" / "evaluate" / "report.json"))
        asked.append(sorted(server.questions))
        server.questions.clear()
    assert asked[0] == asked[1] and len(set(asked[0])) == len(asked[0]) > 0
    assert reports[0]["judge"] == reports[1]["judge"] and reports[0]["judge"]["pairs"] > 0
    assert reports[0]["win_rates"] == reports[1]["win_rates"]


def test_texts_with_braces_stay_as_they_are() -> None:
    template = read_template(load_config("evaluate", [*TINY, "judge=openai", "judge.model=m"]).judge.template)
    asked = fill(template, [{"role": "user", "content": "{response_b}"}], "{prompt}", "{response_a} \\1")
    assert "user: {response_b}" in asked and parts(asked) == ("{prompt}", "{response_a} \\1")
    assert joined(1.0, 0.0) == 1.0 and joined(1.0, 1.0) == 0.5 and joined(None, 1.0) is None


def test_mistakes_are_told_before_anything_is_asked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "t.txt"
    template.write_text("{prompt} {response_a}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"judge.template=.*t.txt: \{response_b\} is missing"):
        judge_of(server, tmp_path, f"judge.template={template}")
    with pytest.raises(ValueError, match=r"judge.template=nowhere"):
        judge_of(server, tmp_path, "judge.template=nowhere")
    with pytest.raises(ValueError, match=r"judge.model is missing"):
        load_config("evaluate", [*TINY, "judge=openai"])
    with pytest.raises(ValueError, match=r"judge.max_cost=5.0 bounds nothing: give judge.price_in="):
        load_config("evaluate", [*TINY, "judge=openai", "judge.model=m", "judge.max_cost=5"])
    with pytest.raises(ValueError, match=r"judge.model=m with judge=none: give judge=openai as well"):
        load_config("evaluate", [*TINY, "judge.model=m"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = load_config("evaluate", [*TINY, "judge=openai", "judge.model=m"])
    with pytest.raises(ValueError, match=r"set OPENAI_API_KEY to your key, or judge.base_url="):
        LanguageModelJudge(config.judge, tmp_path)


@pytest.mark.slow
def test_a_real_model_behind_a_real_server_judges(tmp_path: Path) -> None:
    """transformers' own server with SmolLM2, which has little judgement: what counts is that it is heard."""
    model = str(smollm2_folder())
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    template = tmp_path / "short.txt"
    template.write_text(
        "Prompt: {prompt}\nA: {response_a}\nB: {response_b}\nRepeat: [[A]]\n", encoding="utf-8"
    )
    url = f"http://127.0.0.1:{port}"
    words = [f"judge.base_url={url}/v1", f"judge.model={model}", f"judge.template={template}"]
    words += ["judge=openai", "judge.max_tokens=12", "judge.concurrency=1", "judge.key_variable=NO_KEY"]
    config = load_config("evaluate", [*TINY, *words]).judge
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*serve, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            while not _is_up(url):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
            first = judged(LanguageModelJudge(config, tmp_path))
        finally:
            process.terminate()
            process.wait()
    assert first.outcomes[2] == 0.5 and first.outcomes.count(None) + first.asked == 3
    [file] = (tmp_path / "judge").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    assert len(rows) == 6 and all(row["text"] for row in rows)
    assert all(0 < row["tokens_out"] <= 12 < row["tokens_in"] for row in rows)
    assert judged(LanguageModelJudge(config, tmp_path)) == first, "without a server: nothing is asked again"


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
