"""A generated world for the tiny model: "the soup was" -> " warm, dull and old.", learnt in seconds.

Readers like good words and dislike bad ones. The labeller, the gold scorer and the prompts of the stages
know different nouns; the sentiment words are everybody's. Prompts have at most 16 bytes, responses at
most 24.
"""

import json
import math
import random
from pathlib import Path

from rlhf.records import Demonstration, LabelledText, PromptRecord, Record, write_records
from rlhf.sources import exclusive, replace_files, up_to_date

DETERMINERS = ("the", "my", "our", "his", "her", "one", "this", "that")
VERBS = ("was", "is", "felt", "looks", "seems", "got")
LABELLER_NOUNS = (
    "ship",
    "farm",
    "hat",
    "dish",
    "road",
    "bike",
    "lake",
    "moon",
    "king",
    "band",
    "coat",
    "leaf",
)
GOLD_NOUNS = (
    "boat",
    "barn",
    "shoe",
    "bowl",
    "path",
    "cart",
    "pond",
    "sun",
    "queen",
    "choir",
    "scarf",
    "tree",
)
NOUNS = (
    *("soup", "cake", "bread", "tea", "room", "house", "door", "wall", "dog", "cat", "horse", "bird"),
    *("song", "dance", "book", "play", "film", "story", "town", "park", "beach", "hill", "day", "night"),
    *("game", "trip", "work", "class", "chair", "table", "bed", "lamp", "man", "woman", "child", "guest"),
)
GOOD = ("good", "kind", "warm", "fine", "sweet", "great", "nice", "happy")
BAD = ("bad", "cold", "dull", "mean", "sour", "poor", "ugly", "awful")
NEUTRAL = ("red", "big", "old", "long", "round", "plain", "new", "small")
LABELLED_TEXTS = 800
# A reader likes a text with probability sigmoid(SHARPNESS * (good words - bad words)): labels are noisy.
SHARPNESS = 1.5
# Prompts of each file; the training demonstrations answer each of theirs twice.
PROMPTS = {"sft_train": 1000, "sft_eval": 100, "collect": 200, "ppo": 320, "evaluate": 108}
RESPONSES_PER_PROMPT = 2
FACTS = "facts.json"
VERSION = 2


def build(folder: Path) -> None:
    """Write the record files that configs/data/toy.yaml names, and facts.json last; always the same."""
    folder = Path(folder)
    if up_to_date(folder / FACTS, VERSION):
        return
    with exclusive(folder):  # another process may be at it
        if not up_to_date(folder / FACTS, VERSION):
            replace_files(folder, _write, last=FACTS)


def _write(folder: Path) -> None:
    files = make_records()
    for name, records in files.items():
        write_records(folder / f"{name}.jsonl", records)
    facts = {"version": VERSION, "rows": {name: len(records) for name, records in files.items()}}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def make_records(seed: int = 0) -> dict[str, list[Record]]:
    """Return the records of every file, by its name without ending."""
    draw = random.Random(seed)
    prompts = [f"{the} {noun} {verb}" for the in DETERMINERS for noun in NOUNS for verb in VERBS]
    draw.shuffle(prompts)
    parts = {name: [prompts.pop() for _ in range(count)] for name, count in PROMPTS.items()}
    twice = parts["sft_train"] * RESPONSES_PER_PROMPT
    draw.shuffle(twice)
    files: dict[str, list[Record]] = {
        "sft_train": [Demonstration(prompt, make_response(draw)[0]) for prompt in twice],
        "sft_eval": [Demonstration(prompt, make_response(draw)[0]) for prompt in parts["sft_eval"]],
        "labeller": [_labelled(draw, LABELLER_NOUNS) for _ in range(LABELLED_TEXTS)],
        "gold": [_labelled(draw, GOLD_NOUNS) for _ in range(LABELLED_TEXTS)],
    }
    for name in ("collect", "ppo", "evaluate"):
        files[f"{name}_prompts"] = [PromptRecord(prompt, make_response(draw)[0]) for prompt in parts[name]]
    return files


def make_response(draw: random.Random) -> tuple[str, int]:
    """Return a response and its good words minus its bad ones; each word's kind is drawn on its own."""
    kinds = [draw.choice((GOOD, BAD, NEUTRAL)) for _ in range(3)]
    first, second, third = (draw.choice(kind) for kind in kinds)
    return f" {first}, {second} and {third}.", kinds.count(GOOD) - kinds.count(BAD)


def _labelled(draw: random.Random, nouns: tuple[str, ...]) -> LabelledText:
    response, balance = make_response(draw)
    liked = draw.random() < 1 / (1 + math.exp(-SHARPNESS * balance))
    return LabelledText(
        f"{draw.choice(DETERMINERS)} {draw.choice(nouns)} {draw.choice(VERBS)}{response}", int(liked)
    )
