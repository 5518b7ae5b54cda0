"""Places where checkpoints are kept."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from freestep_service.storage import Storage, open_storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "local" else f"memory://{uuid.uuid4()}/data")
