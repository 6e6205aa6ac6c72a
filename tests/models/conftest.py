"""What tests of layers share."""

import pytest

from rlhf.models import products


@pytest.fixture(params=[products.NARROW, 0], ids=["held", "again"])
def what_comes_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers hold what comes before their products, or compute it again as wide ones do."""
    monkeypatch.setattr(products, "NARROW", request.param)
