"""Scorers that compare a response with what people wrote to the same prompt: ROUGE and BLEU.

The numbers are those of rouge-score and sacrebleu, in [0, 1] and times `scale`; an empty response has 0.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence

import regex

from rlhf.records import Prompt, PromptRecord, prompt_key
from rlhf.rows import shorten

# Scripts that put no space between words are compared character by character. A mark (the vowel signs of
# Hindi and Thai) belongs to the letter before it.
HAN, KANA = r"\p{Han}", r"\u30fc\p{Hiragana}\p{Katakana}"
UNSPACED = HAN + KANA + r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
TOKEN = regex.compile(f"(?V1)[{UNSPACED}]\\p{{M}}*|[[\\w\\p{{M}}]--[_{UNSPACED}]]+")


class ReferenceScorer:
    """How near a response is to the references of its prompt; of several references the nearest counts.

    Kinds: "rouge_l" (F1 of the longest common subsequence), "rouge_avg" (mean F1 of ROUGE-1, -2 and -L;
    Lin 2004, https://aclanthology.org/W04-1013), "bleu" (smoothed BLEU-4 of a sentence; Papineni et al. 2002,
    https://aclanthology.org/P02-1040, smoothed as sacrebleu does). Raises ValueError for a prompt without a
    reference.
    """

    def __init__(self, kind: str, records: Sequence[PromptRecord], *, scale: float = 1.0):
        self.name, self.scale = kind if scale == 1 else f"{scale:g}*{kind}", scale
        self._score = KINDS[kind]()
        found: dict[str, dict[str, None]] = {}
        check_references(kind, records)
        for record in records:
            found.setdefault(prompt_key(record.prompt), {})[record.reference or ""] = None
        self._references = {key: list(texts) for key, texts in found.items()}

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        return [self.scale * self._nearest(prompt, response) for prompt, response in pairs]

    def _nearest(self, prompt: Prompt, response: str) -> float:
        if not response.strip():
            return 0.0
        return max(self._score(reference, response) for reference in self._references[prompt_key(prompt)])


def check_references(what: str, records: Sequence[PromptRecord]) -> None:
    """Raise ValueError for a prompt without a reference, as `what` needs one."""
    without = [record for record in records if not (record.reference or "").strip()]
    if without:
        raise ValueError(
            f"{what} needs references, and {len(without)} of {len(records)} prompts have none, "
            f"the first of them {shorten(without[0].prompt)}; add a `reference` to each row, or read "
            "demonstrations as prompts"
        )


def tokenize(text: str) -> list[str]:
    """The words of a text in lower case, each character by itself where its script does not part words.

    Of ASCII text they are those of rouge-score's own tokenizer, which drops all other characters.
    """
    return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


Score = Callable[[str, str], float]  # of a reference and a response


def _rouge(*types: str) -> Callable[[], Score]:
    def build() -> Score:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer

        class Words(Tokenizer):
            def tokenize(self, text: str) -> list[str]:
                return tokenize(text)

        scorer = RougeScorer(list(types), tokenizer=Words())

        def score(reference: str, response: str) -> float:
            found = scorer.score(reference, response)
            return math.fsum(each.fmeasure for each in found.values()) / len(types)

        return score

    return build


def _bleu() -> Score:
    """BLEU of sentences, by sacrebleu; its tokenizer follows from the script of the reference."""
    from sacrebleu.metrics import BLEU

    tokenizers = {f"[{KANA}]": "char", f"[{HAN}]": "zh", f"[{UNSPACED}]": "char", "": "13a"}
    scorers = {script: BLEU(effective_order=True, tokenize=name) for script, name in tokenizers.items()}

    def score(reference: str, response: str) -> float:
        script = next(each for each in scorers if regex.search(each, reference))
        return min(1.0, scorers[script].sentence_score(response, [reference]).score / 100)

    return score


KINDS: dict[str, Callable[[], Score]] = {
    "rouge_l": _rouge("rougeL"),
    "rouge_avg": _rouge("rouge1", "rouge2", "rougeL"),
    "bleu": _bleu,
}
