"""What tests of layers share."""

import pytest

from rlhf.models import llama, products


@pytest.fixture(params=[products.NARROW, 0], ids=["held", "again"])
def what_comes_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers hold what comes before their products, turn pairs and have gate and up apart; or do as wide ones
    do.
    """
    for module in (products, llama):
        monkeypatch.setattr(module, "NARROW", request.param)
