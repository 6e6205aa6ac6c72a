"""Fixtures that several test folders use."""

import os
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[1]


@pytest.fixture
def shared() -> Path:
    """Return the folder of shared test material: $RLHF_SHARED, else `shared` next to the project folder."""
    folder = Path(os.environ.get("RLHF_SHARED") or PROJECT_DIR.parent / "shared")
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder
