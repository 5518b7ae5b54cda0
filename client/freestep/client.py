"""The service's calls as Python: a Client for a service, a Run for one of its runs."""

from __future__ import annotations

import os
import socket
import ssl
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from torch import Tensor

from freestep.api.models import (
    MOST_SHARDS,
    Checkpoint,
    CheckpointList,
    Lease,
    LeaseList,
    MetricReceipt,
    MetricReport,
    Point,
    Receipt,
    RunList,
    RunSpec,
    RunStatus,
    Topology,
    WorkerStatus,
)
from freestep.bulk import BulkTransport, direct_mounts
from freestep.encoders import Encoder
from freestep.errors import ProblemError, UnexpectedResponse
from freestep.flat import Flat
from freestep.in_place_gradient import Loose
from freestep.lease import Claim, HeldLease
from freestep.sharding import PASSING, Begun, Call, Shards
from freestep.transport import Answer, Transport
from freestep.wire.manifest import Manifest
from freestep.worker_group import ALONE, Ranks

__all__ = ["Client", "Exchange", "Pulled", "Run", "worker_name"]

Model = TypeVar("Model", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"

_KEEPALIVE_S = 50.0
"""Less than the 60 s after which the service closes a connection that is idle."""
_MOST_PULLS = 100
"""How often shards are asked anew for one cut: every time, one of them had to be asked again meanwhile."""


def worker_name() -> str:
    """A name that no other worker has: host, process and a random part."""
    return f"{socket.gethostname()[:100]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


class Client:
    """A freestep service.

    url, token: from FREESTEP_URL and FREESTEP_TOKEN where they are not given.
    verify: whose certificates are good at https URLs: a file of CA certificates, as PEM, or an SSL context. True is the
        file that FREESTEP_CA_CERTS names, else SSL_CERT_FILE or SSL_CERT_DIR, else the CAs that certifi has. False
        trusts anybody, who can then read tokens and weights and change them.
    timeout: seconds without progress after which an attempt is given up.
    retry_for: seconds for which a request is tried again when the service is away or busy.
    http: a client of your own, for proxies or hooks; then url, token, verify and timeout are its affair. It needs a
        connection for each shard of a run, and is fastest over a `freestep.bulk.BulkTransport`.

    Every call may raise a ProblemError, ServiceUnreachable or UnexpectedResponse. Raises OSError when there are no CA
    certificates where they should be.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        verify: ssl.SSLContext | str | os.PathLike[str] | bool = True,
        timeout: float = 30.0,
        retry_for: float = 60.0,
        http: httpx.Client | None = None,
    ) -> None:
        if http is None:
            token = token or os.environ.get("FREESTEP_TOKEN")
            context = _trusting(verify)
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=MOST_SHARDS, keepalive_expiry=_KEEPALIVE_S
            )
            http = _Http(
                base_url=url or os.environ.get("FREESTEP_URL") or DEFAULT_URL,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=timeout,
                verify=context,
                limits=limits,
                mounts=direct_mounts(BulkTransport(context, limits=limits)),
            )
        self._transport = Transport(http, retry_for)

    def run(self, name: str, *, ranks: Ranks = ALONE) -> Run:
        """One run, which need not exist yet.

        ranks: the processes that are one worker together, each of which makes every `exchange` and `pull`.
        """
        return Run(self._transport, name, ranks)

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


class _Cookies(httpx.Cookies):
    """Looks for cookies in the answers that set some: httpx makes a request of urllib's of every answer to look."""

    def extract_cookies(self, response: httpx.Response) -> None:
        if "set-cookie" in response.headers:
            super().extract_cookies(response)


class _Http(httpx.Client):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._cookies = _Cookies()


def _trusting(verify: ssl.SSLContext | str | os.PathLike[str] | bool) -> ssl.SSLContext:
    """The SSL context that `Client` is given, or makes of what it is given."""
    if verify is True:
        verify = os.environ.get("FREESTEP_CA_CERTS") or True
    if isinstance(verify, ssl.SSLContext | bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        # Its own words do not name the file.
        raise OSError(f"{os.fspath(verify)}: no CA certificates can be read there: {error.strerror}") from error


@dataclass(frozen=True)
class Pulled:
    """Which epoch and step the pulled tensors are of."""

    epoch: int
    step: int

    @classmethod
    def of(cls, answer: Answer) -> Pulled:
        return cls(int(_header(answer, "freestep-epoch")), int(_header(answer, "freestep-step")))


@dataclass(frozen=True)
class Exchange:
    """An exchange that goes on in the background.

    result: waits for it, and returns or raises what `Run.exchange` does; it may be called again. abandon: has nothing
    of it sent again.
    """

    result: Callable[[], tuple[Receipt, Pulled]]
    abandon: Callable[[], None]


class Run:
    """One run of a service; it takes one shard or many, which are asked in parallel."""

    def __init__(self, transport: Transport, name: str, ranks: Ranks = ALONE) -> None:
        self.name = name
        self._transport = transport
        self._path = f"/v1/runs/{quote(name, safe='')}"
        self._manifest: Manifest | None = None
        self._ranks = ranks
        self._shards = Shards(transport, self._read_status, self._read_topology, ranks)

    @property
    def manifest(self) -> Manifest:
        """The run's tensors, as the service has them."""
        if self._manifest is None:
            self._manifest = Manifest.of(self.status().spec)
        return self._manifest

    def create(self, spec: RunSpec | Mapping[str, Any]) -> RunStatus:
        """Creates the run, or finds it with the same spec. Raises RunExists and InvalidSpec."""
        document = spec.model_dump(mode="json") if isinstance(spec, RunSpec) else dict(spec)
        return self._noted(self._transport.request("PUT", self._path, json=document))

    def status(self) -> RunStatus:
        return self._noted(self._transport.request("GET", self._path))

    def topology(self) -> Topology:
        """Where the run's shards are, and which of them nobody owns."""
        return self._read_topology(retry=True)

    def reshard(self, shards: int) -> RunStatus:
        """ConsistentReads the run into another number of shards, in a new epoch."""
        wish = {"shards": shards}
        return self._noted(self._transport.request("POST", f"{self._path}/reshard", json=wish, retry=False))

    def delete(self) -> None:
        """Deletes the run, its checkpoints included."""
        self._transport.request("DELETE", self._path)
        self._manifest = None

    def workers(self) -> list[WorkerStatus]:
        """The live workers."""
        return _parsed(LeaseList, self._transport.request("GET", f"{self._path}/leases")).leases

    def initialize(self, tensors: Mapping[str, Tensor] | Flat) -> None:
        """Gives the run its initial weights. Raises AlreadyInitialized when another worker was first."""
        self._shards.ask(Call("PUT", f"{self._path}/parameters", body=self._flat(tensors)), alone=True)

    def lease(self, worker: str | None = None, ttl_ms: int | None = None) -> HeldLease:
        """Takes a lease and keeps it renewed; the worker's older one is fenced off."""
        wish: dict[str, Any] = {"worker": worker or worker_name()}
        if ttl_ms is not None:
            wish["ttl_ms"] = ttl_ms
        granted = _parsed(Lease, self._transport.request("POST", f"{self._path}/leases", json=wish))
        self._shards.heard(granted.epoch)
        return HeldLease(self._transport, f"{self._path}/leases", granted)

    def push(self, tensors: Mapping[str, Tensor] | Flat | Encoder, claim: Claim, *, wait: float = 0.0) -> Receipt:
        """Pushes a gradient: one tensor for each of the run's parameters. Safe to call again with the same claim.

        wait: seconds for which an accumulated push is waited with until its update is applied.
        """
        headers = {**claim.headers(), **_prefer(wait)}
        body = tensors if isinstance(tensors, Encoder) else self._flat(tensors)
        call = Call("POST", f"{self._path}/gradients", headers, body=body, wait=wait)
        receipt, _ = self._pushed(call, lambda answer: _parsed(Receipt, answer), alone=True)
        return receipt

    def exchange(
        self, gradient: Flat | Loose | Encoder, claim: Claim, into: Flat, *, wait: float = 0.0
    ) -> tuple[Receipt, Pulled]:
        """Pushes a gradient and receives fresh y into a flat vector: one round trip."""
        return self._exchanged(self._exchange(gradient, claim, into, wait), into)

    def begin_exchange(
        self, gradient: Flat | Loose | Encoder, claim: Claim, into: Flat, *, wait: float = 0.0
    ) -> Exchange:
        """Begins an exchange in the background; until its result is there, the two vectors are its own."""
        call = self._exchange(gradient, claim, into, wait)
        begun = self._shards.begin(call)
        return Exchange(lambda: self._exchanged(call, into, begun), begun.abandon)

    def _exchange(self, gradient: Flat | Loose | Encoder, claim: Claim, into: Flat, wait: float) -> Call:
        headers = {**claim.headers(), **_prefer(wait, representation=True)}
        return Call("POST", f"{self._path}/gradients", headers, {"dtype": into.arrives}, gradient, into, wait)

    def _exchanged(self, call: Call, into: Flat, begun: Begun | None = None) -> tuple[Receipt, Pulled]:
        receipt, answers = self._pushed(call, _receipt, begun=begun)
        # Parts are of different cuts where some were asked for again.
        return receipt, self._received(answers, into) or self.pull_into(into, "y")

    def _pushed(
        self, call: Call, read: Callable[[Answer], Receipt], *, alone: bool = False, begun: Begun | None = None
    ) -> tuple[Receipt, list[Answer]]:
        """Makes a push, and tells an encoder what became of it, as far as that is known."""
        encoder = call.body if isinstance(call.body, Encoder) else None
        try:
            answers = self._shards.ask(call, alone=alone, begun=begun)
        except ProblemError as error:
            # What may pass was asked again for long, and perhaps not in vain.
            if encoder is not None and not isinstance(error, PASSING):
                encoder.settle(False)
            raise
        receipt = Receipt.merged([read(answer) for answer in answers])
        if encoder is not None:
            encoder.settle(receipt.decision != "dropped")
        return receipt, answers

    def pull(
        self, point: Point = "x", *, dtype: str = "F32", min_step: int = 0, wait: float = 0.0
    ) -> tuple[dict[str, Tensor], int]:
        """A point's tensors, views of one flat vector, and the step they are of.

        x is the average, y where gradients are taken, z the base iterate. dtype: F32, BF16 or F16; or I8, for tensors
        that travel as int8 and are F32 here, each element off by up to 1/254 of the largest of its block of 256.
        Raises StepNotReached when the run does not reach `min_step` within `wait` seconds.
        """
        flat = Flat(self.manifest, dtype)
        pulled = self.pull_into(flat, point, min_step=min_step, wait=wait)
        return flat.views, pulled.step

    def pull_into(self, into: Flat, point: Point = "x", *, min_step: int = 0, wait: float = 0.0) -> Pulled:
        """As `pull`, into a flat vector that is there already, as what it arrives as."""
        params: dict[str, str | int] = {"point": point, "dtype": into.arrives, "min_step": min_step}
        call = Call("GET", f"{self._path}/parameters", _prefer(wait), params, into=into, wait=wait)
        for _ in range(_MOST_PULLS):
            pulled = self._received(self._shards.ask(call), into)
            if pulled is not None:
                return pulled
        raise UnexpectedResponse(f"the shards of {self.name!r} do not answer with one cut of the model")

    def _received(self, answers: list[Answer], into: Flat) -> Pulled | None:
        """Which cut of the model was received, by all ranks; None if the parts are of several."""
        cuts = {Pulled.of(answer) for answer in answers}
        if len(answers) > 1:
            cuts_in_the_log = {_header(answer, "freestep-cut") for answer in answers}
            if len(cuts) > 1 or len(cuts_in_the_log) > 1:
                return None
        (pulled,) = cuts
        self._shards.heard(pulled.epoch)
        self._ranks.spread(into, len(answers))
        return pulled

    def report(self, name: str, value: float, step: int, *, epoch: int | None = None) -> MetricReceipt:
        """Reports what was measured at the x of a step; plateau schedules hear of it, and the run's status shows it.

        A report counts once, however often it is made. Raises IdempotencyConflict when another value was reported of
        that step, MalformedRequest when the run has not come to it, and EpochChanged when `epoch` is given and over.
        """
        report = MetricReport(name=name, value=float(value), step=step, epoch=epoch)
        document = report.model_dump(exclude_none=True)
        return _parsed(MetricReceipt, self._transport.request("POST", f"{self._path}/metrics", json=document))

    def checkpoint(self) -> Checkpoint:
        """Has a checkpoint written now."""
        return _parsed(Checkpoint, self._transport.request("POST", f"{self._path}/checkpoints"))

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that are kept, oldest first."""
        return _parsed(CheckpointList, self._transport.request("GET", f"{self._path}/checkpoints")).checkpoints

    def restore(self, step: int) -> RunStatus:
        """Goes back to a checkpoint, in a new epoch. Raises CheckpointNotFound."""
        return self._noted(self._transport.request("POST", f"{self._path}/checkpoints/{step}/restore", retry=False))

    def _noted(self, answer: Answer) -> RunStatus:
        status = _parsed(RunStatus, answer)
        self._manifest = Manifest.of(status.spec)
        self._shards.heard(status.epoch, status.shards)
        return status

    def _read_status(self, retry: bool) -> RunStatus:
        status = _parsed(RunStatus, self._transport.request("GET", self._path, retry=retry))
        self._manifest = Manifest.of(status.spec)
        return status

    def _read_topology(self, retry: bool) -> Topology:
        return _parsed(Topology, self._transport.request("GET", f"{self._path}/topology", retry=retry))

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


def _receipt(answer: Answer) -> Receipt:
    """The receipt of an answer whose body is y."""
    document = {
        "decision": _header(answer, "freestep-decision"),
        "reason": answer.headers.get("freestep-reason"),
        "step": int(_header(answer, "freestep-receipt-step")),
        "staleness": int(_header(answer, "freestep-staleness")),
        "replayed": _header(answer, "freestep-replayed") == "true",
    }
    return Receipt.model_validate(document)


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
