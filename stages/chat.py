"""stage=chat: talk to a checkpoint in the terminal, to two side by side, with the reward model's scores."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

from rlhf.config import load_config
from rlhf.decoding import decoding_in
from rlhf.engine import build_engine
from rlhf.models.loading import load_causal_lm, load_codec, load_options, num_parameters
from rlhf.parents import find_parent
from rlhf.records import Prompt
from rlhf.reference_scorers import KINDS
from rlhf.rewards import build_optional_scorer, checked_scores
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec
from stages.common import kinds_of, make_inputs, resolved

HELP = "/reset forgets the conversation, /again answers once more, /quit (or Ctrl-D) ends"


class Printer:
    """Prints a response as its tokens come; a character whose bytes are not all there waits."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.tokens: list[int] = []
        self.shown = 0

    def __call__(self, row: int, token: int) -> None:
        self.tokens.append(token)
        text = self.codec.decode_response(self.tokens)
        if not text.endswith("\ufffd"):
            print(plain(text[self.shown :]), end="", flush=True)
            self.shown = len(text)


def plain(text: str) -> str:
    """A model's text without the control characters that a terminal would obey."""
    kept = (mark.isprintable() or mark in "\n\t" or unicodedata.category(mark) == "Zs" for mark in text)
    return "".join(mark for mark, keep in zip(text, kept, strict=True) if keep)


def main(overrides: list[str]) -> int:
    """Answer every line of the terminal until it ends."""
    config = load_config("chat", overrides)
    if config.engine.name != "single":
        raise ValueError(f"engine={config.engine.name}: stage=chat is one process; leave engine= out")
    make_inputs(config)
    named = {"policy": config.policy, "beside": config.beside}
    paths = {key: resolved(path, config.model) for key, path in named.items() if path is not None}
    for key, path in paths.items():
        find_parent(key, path, kind="policy", force=True)
    codecs = {path: load_codec(path, config) for path in paths.values()}
    engine = build_engine(config.engine, num_parameters(paths["policy"], config.model))
    options = load_options(config.model, engine, trained=False)
    policies = {
        path: Policy(load_causal_lm(path, options, key=key), codecs[path], engine)
        for key, path in paths.items()
    }
    # there are no references here
    spec = config.proxy if config.proxy is None or not set(kinds_of(config.proxy)) & set(KINDS) else None
    scorer = build_optional_scorer("proxy", spec, config, engine)
    print(HELP, flush=True)
    histories: dict[str, list[dict[str, str]]] = {path: [] for path in policies}
    last, seed = None, config.seed
    for line in _lines():
        if line == "/reset":
            histories = {path: [] for path in policies}
            continue
        question = last if line == "/again" else line
        if question is None:
            continue
        last, seed = question, seed + 1
        for path, policy in policies.items():
            history = histories[path]
            if line == "/again":
                del history[-2:]
            prompt: Prompt = question
            if policy.codec.uses_chat:
                prompt = [*history, {"role": "user", "content": question}]
            answer = _answer(path, policy, prompt, config, seed, several=len(policies) > 1)
            if scorer is not None:
                print(
                    f"  [{scorer.name}: {checked_scores(scorer, [prompt], [answer]).item():.2f}]", flush=True
                )
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return 0


def _answer(  # noqa: PLR0913 (a policy, what it answers, and how)
    path: str, policy: Policy, prompt: Prompt, config: Any, seed: int, *, several: bool
) -> str:
    """Print and return a response; Ctrl-C cuts it short."""
    if several:
        print(f"{path}:", flush=True)
    printer = Printer(policy.codec)
    try:
        rollout = policy.respond([prompt], decoding_in(config), seed=seed, heard=printer)
        text = policy.texts(rollout)[0]
    except KeyboardInterrupt:
        text = policy.codec.decode_response(printer.tokens)
    print(plain(text[printer.shown :]), flush=True)
    return text


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the end of the input or /quit; bytes that are no text are U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print()
            return
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip() if line.startswith("/") else line.rstrip("\n")
