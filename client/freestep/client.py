"""The service's calls as Python: a Client for a service, a Run for one of its runs."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from torch import Tensor

from freestep.errors import UnexpectedResponse
from freestep.flat import Flat
from freestep.lease import Claim, HeldLease
from freestep.models import (
    Checkpoint,
    CheckpointList,
    Lease,
    LeaseList,
    Point,
    Receipt,
    RunList,
    RunSpec,
    RunStatus,
    WorkerStatus,
)
from freestep.transport import Answer, Transport
from freestep.wire import Manifest

__all__ = ["Client", "Pulled", "Run", "worker_name"]

Model = TypeVar("Model", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"


def worker_name() -> str:
    """A name that no other worker has: host, process and a random part."""
    return f"{socket.gethostname()[:100]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


class Client:
    """A freestep service.

    url, token: from FREESTEP_URL and FREESTEP_TOKEN where they are not given.
    timeout: seconds without progress after which an attempt is given up.
    retry_for: seconds for which a request is tried again when the service is away or busy.
    http: a client of your own, for proxies, certificates or hooks; then url, token and timeout are its affair.

    Every call may raise a ProblemError, ServiceUnreachable or UnexpectedResponse.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        retry_for: float = 60.0,
        http: httpx.Client | None = None,
    ) -> None:
        if http is None:
            token = token or os.environ.get("FREESTEP_TOKEN")
            http = httpx.Client(
                base_url=url or os.environ.get("FREESTEP_URL") or DEFAULT_URL,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=timeout,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            )
        self._transport = Transport(http, retry_for)

    def run(self, name: str) -> Run:
        """One run, which need not exist yet."""
        return Run(self._transport, name)

    def runs(self) -> list[RunStatus]:
        """Every run's status."""
        return _parsed(RunList, self._transport.request("GET", "/v1/runs")).runs

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Pulled:
    """Which epoch and step the pulled tensors are of."""

    epoch: int
    step: int

    @classmethod
    def of(cls, answer: Answer) -> Pulled:
        return cls(int(_header(answer, "freestep-epoch")), int(_header(answer, "freestep-step")))


class Run:
    """One run of a service."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.name = name
        self._transport = transport
        self._path = f"/v1/runs/{quote(name, safe='')}"
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The run's tensors, as the service has them."""
        if self._manifest is None:
            self._manifest = Manifest(self.status().spec.parameters)
        return self._manifest

    def create(self, spec: RunSpec | Mapping[str, Any]) -> RunStatus:
        """Creates the run, or finds it with the same spec. Raises RunExists and InvalidSpec."""
        document = spec.model_dump(mode="json") if isinstance(spec, RunSpec) else dict(spec)
        return self._status(self._transport.request("PUT", self._path, json=document))

    def status(self) -> RunStatus:
        return self._status(self._transport.request("GET", self._path))

    def delete(self) -> None:
        """Deletes the run, its checkpoints included."""
        self._transport.request("DELETE", self._path)
        self._manifest = None

    def workers(self) -> list[WorkerStatus]:
        """The live workers."""
        return _parsed(LeaseList, self._transport.request("GET", f"{self._path}/leases")).leases

    def initialize(self, tensors: Mapping[str, Tensor] | Flat) -> None:
        """Gives the run its initial weights. Raises AlreadyInitialized when another worker was first."""
        self._transport.request("PUT", f"{self._path}/parameters", body=self._flat(tensors).body())

    def lease(self, worker: str | None = None, ttl_ms: int | None = None) -> HeldLease:
        """Takes a lease and keeps it renewed; the worker's older one is fenced off."""
        wish: dict[str, Any] = {"worker": worker or worker_name()}
        if ttl_ms is not None:
            wish["ttl_ms"] = ttl_ms
        answer = self._transport.request("POST", f"{self._path}/leases", json=wish)
        return HeldLease(self._transport, f"{self._path}/leases", _parsed(Lease, answer))

    def push(self, tensors: Mapping[str, Tensor] | Flat, claim: Claim, *, wait: float = 0.0) -> Receipt:
        """Pushes a gradient: one tensor for each of the run's parameters. Safe to call again with the same claim.

        wait: seconds for which an accumulated push is waited with until its update is applied.
        """
        answer = self._transport.request(
            "POST",
            f"{self._path}/gradients",
            headers={**claim.headers(), **_prefer(wait)},
            body=self._flat(tensors).body(),
            wait=wait,
        )
        return _parsed(Receipt, answer)

    def exchange(self, gradient: Flat, claim: Claim, into: Flat, *, wait: float = 0.0) -> tuple[Receipt, Pulled]:
        """Pushes a gradient and receives fresh y into a flat vector: one round trip."""
        answer = self._transport.request(
            "POST",
            f"{self._path}/gradients",
            headers={**claim.headers(), **_prefer(wait, representation=True)},
            params={"dtype": into.dtype},
            body=gradient.body(),
            into=into,
            wait=wait,
        )
        document = {
            "decision": _header(answer, "freestep-decision"),
            "reason": answer.headers.get("freestep-reason"),
            "step": int(_header(answer, "freestep-receipt-step")),
            "staleness": int(_header(answer, "freestep-staleness")),
            "replayed": _header(answer, "freestep-replayed") == "true",
        }
        return Receipt.model_validate(document), Pulled.of(answer)

    def pull(
        self, point: Point = "x", *, dtype: str = "F32", min_step: int = 0, wait: float = 0.0
    ) -> tuple[dict[str, Tensor], int]:
        """A point's tensors, views of one flat vector, and the step they are of.

        x is the average, y where gradients are taken, z the base iterate. Raises StepNotReached when the run does
        not reach `min_step` within `wait` seconds.
        """
        flat = Flat(self.manifest, dtype)
        pulled = self.pull_into(flat, point, min_step=min_step, wait=wait)
        return flat.views, pulled.step

    def pull_into(self, into: Flat, point: Point = "x", *, min_step: int = 0, wait: float = 0.0) -> Pulled:
        """As `pull`, into a flat vector that is there already, in its dtype."""
        answer = self._transport.request(
            "GET",
            f"{self._path}/parameters",
            params={"point": point, "dtype": into.dtype, "min_step": min_step},
            headers=_prefer(wait),
            into=into,
            wait=wait,
        )
        return Pulled.of(answer)

    def checkpoint(self) -> Checkpoint:
        """Has a checkpoint written now."""
        return _parsed(Checkpoint, self._transport.request("POST", f"{self._path}/checkpoints"))

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that are kept, oldest first."""
        return _parsed(CheckpointList, self._transport.request("GET", f"{self._path}/checkpoints")).checkpoints

    def restore(self, step: int) -> RunStatus:
        """Goes back to a checkpoint, in a new epoch. Raises CheckpointNotFound."""
        return self._status(self._transport.request("POST", f"{self._path}/checkpoints/{step}/restore", retry=False))

    def _status(self, answer: Answer) -> RunStatus:
        status = _parsed(RunStatus, answer)
        self._manifest = Manifest(status.spec.parameters)
        return status

    def _flat(self, tensors: Mapping[str, Tensor] | Flat) -> Flat:
        if isinstance(tensors, Flat):
            return tensors
        flat = Flat(self.manifest)
        flat.fill(tensors)
        return flat


def _parsed(model: type[Model], answer: Answer) -> Model:
    try:
        return model.model_validate(answer.document)
    except ValidationError as error:
        raise UnexpectedResponse(f"what answered does not seem to be freestep: {error}") from error


def _header(answer: Answer, name: str) -> str:
    try:
        return answer.headers[name]
    except KeyError:
        raise UnexpectedResponse(f"an answer without the header {name} is not freestep's") from None


def _prefer(wait: float, *, representation: bool = False) -> dict[str, str]:
    preferences = ["return=representation"] if representation else []
    if wait:
        preferences.append(f"wait={wait:g}")
    return {"Prefer": ", ".join(preferences)} if preferences else {}
