"""The checks a stage ends with: whether its product is good, in words and numbers."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Check:
    """One question about a stage's product: its name, whether it holds, what was seen, what that means."""

    name: str
    passed: bool
    value: str
    meaning: str


def all_passed(checks: Iterable[Check]) -> bool:
    """Return whether no check failed."""
    return all(check.passed for check in checks)


def print_checks(checks: Iterable[Check]) -> None:
    """Print one line per check: ok or FAILED, name, value, meaning."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        verdict = "ok    " if check.passed else "FAILED"
        # A bar that is open keeps its own line.
        tqdm.write(f"  {verdict}  {check.name:<{width}}  {check.value}  ({check.meaning})", file=sys.stdout)
