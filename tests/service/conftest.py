"""Places where checkpoints are kept, and numbers of threads that compute."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from freestep_service.storage.media import Storage, open_storage


@pytest.fixture(params=["directory", "memory", "fsspec-directory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One of each kind: a directory, a backend without directories, and one with them.

    Memory is not for threads: fsspec lists the dict that it is while others delete from it, should a garbage collection
    in between let them.
    """
    places = {
        "directory": str(tmp_path / "new" / "place"),
        "memory": f"memory://{uuid.uuid4()}/data",
        "fsspec-directory": f"local://{tmp_path}/new/place",
    }
    return open_storage(places[request.param])


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
