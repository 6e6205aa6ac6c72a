"""The public formats: a row as it is published becomes rows of our own schema (see data/README.md).

`normalise` looks at a row's keys, never at the values of other rows; it changes the shape and leaves the
checks of what is inside to `rlhf.schemas`, except where a format has its own (a transcript that cannot be
split).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rlhf.rows import Row, RowError, check_text, shorten

Messages = list[dict[str, str]]

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}
TURN = re.compile(r"\n\n(Human|Assistant):")
ASSISTANT = "\n\nAssistant:"


def normalise(row: Row) -> list[Row]:
    """Return the own-schema rows that `row` stands for: one, or one per instance of a self-instruct task.

    Raises RowError where the keys fit no known format, or the row cannot be split into prompt and
    responses.
    """
    present = {key for key, value in row.items() if value is not None}
    for keys, convert in FORMATS:
        if keys <= present:
            return convert({key: row[key] for key in present})
    raise RowError(
        "",
        f"its keys ({', '.join(sorted(map(str, row)))}) fit no known format; rename them with"
        " columns={prompt: ..., response: ...} (the formats are in data/README.md)",
    )


def messages_of(turns: Any, key: str) -> Messages:
    """Return turns, written with role/content or with from/value, as role/content messages."""
    if not isinstance(turns, list) or not turns:
        raise RowError(key, f"a list of turns is expected, not {shorten(turns)}")
    return [_message(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, key: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowError(key, f"a turn is an object with role and content, not {shorten(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(key, f"unknown role {shorten(role)}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(key, f"content is {shorten(content)}; a string is expected")
    return {"role": ROLES[role], "content": content}


def _own(row: Row) -> list[Row]:
    return [row if "prompt" in row else {**row, "prompt": row.get("messages")}]


def _pair(row: Row) -> list[Row]:
    """Chosen and rejected: transcripts, messages, or texts beside a prompt. The label is the rank."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, responses = _message_pair(row, chosen, rejected)
    elif isinstance(chosen, dict) and isinstance(rejected, dict):
        prompt = _with_system(row, messages_of(row.get("conversations", row.get("prompt")), "conversations"))
        responses = [
            _last(messages_of([turn], key), key) for key, turn in (("chosen", chosen), ("rejected", rejected))
        ]
    elif not isinstance(chosen, str) or not isinstance(rejected, str):
        wrong = "chosen" if not isinstance(chosen, str) else "rejected"
        raise RowError(
            wrong, f"text, a turn or a list of turns is expected, as its partner, not {shorten(row[wrong])}"
        )
    elif "prompt" in row or "messages" in row:
        prompt, responses = _own(row)[0]["prompt"], [chosen, rejected]
    else:
        prompt, responses = split_transcripts(chosen, rejected)
    check_text(responses[0], "chosen")
    check_text(responses[1], "rejected")
    if responses[0] == responses[1]:
        raise RowError(
            "rejected", "is the same text as chosen; a pair needs two different responses: remove the row"
        )
    return [{"prompt": prompt, "responses": responses, "ranks": [1, 2]}]


def _message_pair(row: Row, chosen: list[Any], rejected: list[Any]) -> tuple[Any, list[str]]:
    turns = {"chosen": messages_of(chosen, "chosen"), "rejected": messages_of(rejected, "rejected")}
    responses = [_last(messages, key) for key, messages in turns.items()]
    before = turns["chosen"][:-1]
    if before != turns["rejected"][:-1]:
        raise RowError(
            "rejected", "its turns before the last differ from chosen's; only the last turn may differ"
        )
    prompt = row.get("prompt", row.get("conversations"))
    if not isinstance(prompt, list):
        return before or prompt, responses
    given = messages_of(prompt, "prompt")
    return (before if before[: len(given)] == given else given + before), responses


def _last(messages: Messages, key: str) -> str:
    if messages[-1]["role"] != "assistant":
        raise RowError(key, f"its last turn is by {messages[-1]['role']}; a response is by the assistant")
    return messages[-1]["content"]


def split_transcripts(chosen: str, rejected: str) -> tuple[Messages, list[str]]:
    """Split two HH transcripts at the last Assistant turn that both share the beginning of.

    Turns of one speaker in a row, which a few transcripts have, become one turn.
    """
    shared = _shared_beginning(chosen, rejected)
    cut = shared.rfind(ASSISTANT)
    if cut < 0 or not chosen.startswith("\n\n"):
        raise RowError(
            "chosen",
            r"no prompt key beside it, and no transcript (\n\nHuman: ... \n\nAssistant: ...) that begins as"
            " rejected does; add a prompt key",
        )
    pieces = TURN.split(chosen[:cut])
    messages: Messages = []
    for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    responses = []
    for key, transcript in (("chosen", chosen), ("rejected", rejected)):
        response = transcript[cut + len(ASSISTANT) :]
        if TURN.search(response):
            raise RowError(
                key, "its conversation parts from the other one before the last turn; remove the row"
            )
        responses.append(response.strip())
    return messages, responses


def _shared_beginning(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return one[: next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _conversation(key: str) -> Callable[[Row], list[Row]]:
    def convert(row: Row) -> list[Row]:
        messages = _with_system(row, messages_of(row[key], key))
        if messages[-1]["role"] != "assistant":
            return [{"prompt": messages}]
        if len(messages) == 1:
            raise RowError(key, "holds a response only; a user's turn is expected before it")
        return [{"prompt": messages[:-1], "response": messages[-1]["content"]}]

    return convert


def _with_system(row: Row, messages: Messages) -> Messages:
    """Put the text of a `system` column before the turns, unless they begin with one of their own."""
    system = row.get("system")
    if system in (None, "") or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise RowError("system", f"text is expected, not {shorten(system)}")
    return [{"role": "system", "content": system}, *messages]


def _completion(row: Row) -> list[Row]:
    response = row["completion"]
    if isinstance(response, list):
        messages = messages_of(response, "completion")
        if len(messages) > 1:
            raise RowError("completion", f"{len(messages)} turns; one turn by the assistant is expected")
        response = _last(messages, "completion")
    return [{"prompt": row["prompt"], "response": response}]


def _instruction(instruction: Any, given: Any) -> Any:
    if given in (None, ""):
        return instruction
    if not isinstance(given, str) or not isinstance(instruction, str):
        raise RowError("input", f"text is expected, not {shorten(given)}")
    return f"{instruction}\n\n{given}"


def _alpaca(row: Row) -> list[Row]:
    """Instruction, input and output; with a system text or a history of [question, answer] a conversation."""
    prompt = _instruction(row["instruction"], row.get("input"))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        raise RowError("history", f"a list of [question, answer] is expected, not {shorten(history)}")
    if history or row.get("system"):
        said = [
            {"role": role, "content": text}
            for turn in [*history, [prompt]]
            for role, text in zip(("user", "assistant"), turn, strict=False)
        ]
        prompt = _with_system(row, messages_of(said, "history"))
    return [{"prompt": prompt, "response": row["output"]}]


def _self_instruct(row: Row) -> list[Row]:
    instances = row["instances"]
    if (
        not isinstance(instances, list)
        or not instances
        or not all(isinstance(each, dict) for each in instances)
    ):
        raise RowError(
            "instances", f"a list of objects with input and output is expected, not {shorten(instances)}"
        )
    return [_alpaca({"output": None, **each, "instruction": row["instruction"]})[0] for each in instances]


def _post(row: Row) -> list[Row]:
    return [{"prompt": row["post"], "reference": row["reference"]}]


# The first whose keys a row has; own rows come first, what has least keys last.
FORMATS: tuple[tuple[set[str], Callable[[Row], list[Row]]], ...] = (
    ({"text", "label"}, lambda row: [row]),
    ({"responses"}, _own),
    ({"response"}, _own),
    ({"chosen", "rejected"}, _pair),
    ({"prompt", "completion"}, _completion),
    ({"instruction", "instances"}, _self_instruct),
    ({"instruction", "output"}, _alpaca),
    ({"post", "reference"}, _post),
    ({"conversations"}, _conversation("conversations")),
    ({"messages"}, _conversation("messages")),
    ({"prompt"}, _own),
)
