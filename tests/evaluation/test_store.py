"""What is kept by content: it is done once, and again where anything differs that it follows from."""

import json
import shutil
from pathlib import Path

import pytest

from rlhf.evaluation.store import Store, digest, model_id, scorer_id, store_in
from rlhf.sources import tiny_folder


def test_what_follows_from_the_same_facts_is_made_once(tmp_path: Path) -> None:
    store, made = Store(tmp_path / "s"), []

    def make() -> list[str]:
        made.append(1)
        return ["é\u2028", "\n"]

    assert store.kept("texts", {"seed": 1, "a": [1]}, make) == store.kept(
        "texts", {"a": [1], "seed": 1}, make
    )
    assert len(made) == 1
    store.kept("texts", {"seed": 2, "a": [1]}, make)
    store.kept("others", {"seed": 1, "a": [1]}, make)
    assert len(made) == 3
    [damaged] = (tmp_path / "s" / "others").glob("*.json")
    damaged.write_text('["cut sh', encoding="utf-8")
    assert store.kept("others", {"seed": 1, "a": [1]}, make) == ["é\u2028", "\n"] and len(made) == 4
    assert json.loads(damaged.read_text(encoding="utf-8")) == ["é\u2028", "\n"]


def test_a_folder_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"store=.*/file/s: .*/file is a file; name another folder"):
        store_in(str(tmp_path / "file" / "s"))
    assert store_in(str(tmp_path / "not" / "yet")).folder == tmp_path / "not" / "yet"
    assert not (tmp_path / "not").exists()


def test_nothing_is_kept_of_what_failed(tmp_path: Path) -> None:
    def fail() -> list[str]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Store(tmp_path).kept("texts", {}, fail)
    assert Store(tmp_path).kept("texts", {}, lambda: [1]) == [1]


def test_a_model_is_told_by_weights_settings_and_tokenizer(tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(tiny_folder(), copy)
    before = model_id(str(copy))
    assert before == model_id(str(tiny_folder()))
    for name in ("config.json", "tokenizer_config.json"):
        file = copy / name
        file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
        assert model_id(str(copy)) != before
        before = model_id(str(copy))
    assert model_id("no/such-name") != model_id("no/such-name"), "of unknown weights nothing is kept"


def test_a_scorer_is_told_by_its_settings_and_files(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("a", encoding="utf-8")
    spec = {"kind": "classifier", "train": str(texts), "classifier": "char_naive_bayes"}
    found = scorer_id(spec)
    assert found == scorer_id(dict(spec)) != scorer_id(spec | {"classifier": "tfidf_logistic"})
    texts.write_text("b", encoding="utf-8")
    assert scorer_id(spec) != found
    function = {"kind": "function", "function": "f.py:f"}
    assert scorer_id(function) != scorer_id(function), "what a function does is not known"
    parts = {"kind": "sum", "parts": [spec | {"weight": 1}, {"kind": "rouge_l", "weight": 2}]}
    assert digest(scorer_id(parts)) == digest(scorer_id(parts))
