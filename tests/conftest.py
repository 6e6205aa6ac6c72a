"""Fixtures that several test folders use."""

import os
import signal
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[1]

# A shell that starts the tests in the background has Ctrl-C ignored, and child processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def shared() -> Path:
    """Return the folder of shared test material: $RLHF_SHARED, else `shared` next to the project folder."""
    folder = Path(os.environ.get("RLHF_SHARED") or PROJECT_DIR.parent / "shared")
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and reward model of every family, for tests to read."""
    from tests.models.families import FAMILIES, write_family

    path = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_family(path, family)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of all stages on the tiny model, for tests to read or copy."""
    from tests.stage_runs import run_chain

    return run_chain(tmp_path_factory.mktemp("chain"))
