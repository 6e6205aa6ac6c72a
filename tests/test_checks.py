"""Checks print their verdict in words and fail together when one fails."""

import dataclasses

import pytest

from rlhf.checks import Check, all_passed, print_checks

GOOD = Check("ends with EOS", True, "0.93", "most responses end by themselves")
BAD = Check("beats chance", False, "0.49 [0.44, 0.54]", "the scores say nothing about the ranks")


def test_one_failure_fails_all() -> None:
    assert all_passed([]) and all_passed([GOOD, GOOD])
    assert not all_passed([GOOD, BAD])


def test_every_check_is_one_line_with_verdict_value_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks(check for check in (GOOD, BAD))
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["ok", *GOOD.name.split(), GOOD.value, *f"({GOOD.meaning})".split()]
    assert second.startswith("  FAILED  beats chance ")
    assert BAD.value in second and BAD.meaning in second
    assert first.index(GOOD.value) == second.index(BAD.value)


def test_no_checks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks([])
    assert capsys.readouterr().out == ""


def test_a_check_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BAD.passed = True  # type: ignore[misc]
