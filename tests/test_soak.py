"""A minute of what `make soak` does for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import require_programs, require_root
from tests.soak import FLAPS, KILLS, plot, soak

pytest_plugins = ("tests.mount_fixtures",)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("view", "runtime")
def test_a_minute_of_trouble(demo_image: str, tmp_path: Path, view: str) -> None:
    """Half of it in each view."""
    require_root()
    require_programs("docker-registry", "skopeo", "runc")
    result = soak(demo_image, 0.5, tmp_path / "soak", seed=len(view))
    assert result.wrong == []
    assert len(result.digests) >= 2
    assert (result.upgrades, result.flaps) == (1, FLAPS // 2)
    assert result.kills >= KILLS // 4
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "soak.svg")
    assert (tmp_path / "soak.svg").stat().st_size > 1000
