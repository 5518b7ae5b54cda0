"""Where the run of an optimizer lives: on a service, or in this process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from freestep.client import Client
from freestep.errors import FreestepError
from freestep.run import Run
from freestep.service_url import LOCAL
from freestep.worker_group import WorkerGroup

if TYPE_CHECKING:
    from freestep.local_run import LocalRun

__all__ = ["open_run"]


def open_run(
    run: str | None,
    url: str | None,
    token: str | None,
    client: Client | None,
    retry_for: float | None,
    ranks: WorkerGroup,
) -> tuple[Run | LocalRun, Client | None]:
    """The run that the arguments or the environment name, and the client that was made for it, if one was.

    Args:
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: As for Client, or "local", which needs no run.
        token: As for Client.
        client: A client to use instead of one made of `url`, `token` and `retry_for`.
        retry_for: As for Client; None takes the client's own default.
        ranks: The processes that are one worker together.

    Raises:
        FreestepError: No run is named, or a local one is not possible here.
    """
    run = run or os.environ.get("FREESTEP_RUN")
    if client is None and (url or os.environ.get("FREESTEP_URL")) == LOCAL:
        return _local_run(run or LOCAL, ranks), None
    if not run:
        raise FreestepError("no run is named: give run='...', or set FREESTEP_RUN")
    if client is not None:
        return client.run(run, ranks=ranks), None
    client = Client(url, token=token, retry_for=retry_for)
    return client.run(run, ranks=ranks), client


def _local_run(name: str, ranks: WorkerGroup) -> LocalRun:
    if ranks.size > 1:
        raise FreestepError("a run with url='local' is in one process: leave process_group out, or start a service")
    try:
        from freestep.local_run import LocalRun
    except ImportError as error:
        raise FreestepError(
            f"url='local' needs the service's package: pip install 'freestep[service]' ({error})"
        ) from error
    return LocalRun(name)
