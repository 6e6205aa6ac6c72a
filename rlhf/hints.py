"""How a misspelt word finds the right one."""

import difflib
from collections.abc import Iterable


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `word`, or None where none is like it.

    A dotted candidate is compared as a whole and by its last part, so that `coef` finds `kl.coef`.
    """

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, word.split(".")[-1], candidate.split(".")[-1]).ratio()
        begins = 0.7 if len(word) >= 3 and candidate.startswith(word) else 0.0
        initials = "".join(part[:1] for part in candidate.split("_"))
        return max(whole, 0.95 * last, begins, 0.9 if len(word) > 1 and word == initials else 0.0)

    best = max(candidates, key=likeness, default="")
    return best if best and likeness(best) >= 0.6 else None


def hint(word: str, candidates: Iterable[str]) -> str:
    """Return `did you mean …? ` for an error message, or an empty string."""
    best = nearest(word, candidates)
    return f"did you mean {best}? " if best else ""
