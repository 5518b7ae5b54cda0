"""Curves in an experiment of MLflow's. MLFLOW_TRACKING_URI and the like hold as ever."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import time

from mlflow import MlflowClient
from mlflow.entities import Metric

__all__ = ["MLflow", "opened"]

_EXPERIMENT = "freestep"
"""Where only a URI is given."""
_TAG = "freestep.follow"
"""Of MLflow's run: the key by which it is found again."""
_REFUSED = re.compile(r"[^\w .:-]", re.ASCII)
_A_DIRECTORY = re.compile(r"\.*")


class MLflow:
    """A tracker that logs to a run of MLflow's.

    Args:
        client: Of the tracking server, or of a store.
        run_id: MLflow's run.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds points, which are stored by then. What MLflow does not take in a name becomes `_`."""
        now_ms = int(time() * 1000)
        points = [Metric(_accepted(name), value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=points)


@contextmanager
def opened(place: str, run: str, key: str) -> Iterator[MLflow]:
    """Begins a run of MLflow's in an experiment, which is made if there is none, or goes on with it."""
    uri, experiment = _parts(place)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    home = found.experiment_id if found is not None else client.create_experiment(experiment)
    begun = client.search_runs([home], filter_string=f"tags.`{_TAG}` = '{key}'")
    if begun:
        run_id = begun[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(home, run_name=run, tags={_TAG: key}).info.run_id
    try:
        yield MLflow(client, run_id)
    finally:
        client.set_terminated(run_id)


def _parts(place: str) -> tuple[str | None, str]:
    """The tracking URI, None for MLflow's own, and the experiment."""
    uri, bar, experiment = place.rpartition("|")
    if bar:
        return uri or None, experiment or _EXPERIMENT
    is_uri = "://" in place or place.startswith(("/", "./"))
    return (place, _EXPERIMENT) if is_uri else (None, place)


def _accepted(name: str) -> str:
    """A name that MLflow takes: it has to be a relative path without empty parts, `.` and `..`."""
    parts = (_REFUSED.sub("_", part) for part in name.split("/"))
    return "/".join("_" if _A_DIRECTORY.fullmatch(part) else part for part in parts)
