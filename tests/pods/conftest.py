"""A cluster of containers with a release of the chart, which the tests share; each trains runs of its own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from chart.rendered import helm
from pods.cluster import Cluster
from pods.engine import Unavailable
from pods.release import Release
from pods.training import Training

_SETTINGS = {
    # No checkpoint is due while a test runs, but those that it asks for and those of an orderly end.
    "checkpoint-seconds": 3600,
    # Longer than a pod is away that comes back.
    "journal-wait-seconds": 600,
}


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    helm()
    try:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        made = Release(cluster, durability="journal", settings=_SETTINGS)
        cluster.wait_ready()
        yield made
    finally:
        cluster.close()


@pytest.fixture
def train(release: Release) -> Callable[..., Training]:
    """Has workers train two runs of the test's own; their number, 2 unless it is given, and more of `Training`."""
    return lambda workers=2, **more: Training(release, f"run-{uuid.uuid4().hex[:8]}", workers, **more)
