"""What tests of whole commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.station import Station
from tests.serving.tiny import make_model


@pytest.fixture
def station(tmp_path: Path) -> Station:
    found = Station(tmp_path)
    make_model(tmp_path / "tiny")
    done = found.tuneward("import", "tiny", "tiny", "--store", str(found.store))
    assert done.returncode == 0, done.stderr
    return found
