"""A service in memory behind an httpx transport, which answers a push with y or with its receipt alone, as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx

from freestep import Client, EpochChanged, Flat, Int8, LeaseExpired, ProblemError, StepNotReached
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import MEDIA_TYPE

__all__ = ["FakeService", "Push"]


class Push:
    """A push of one shard's part: which one, under which key, and the how many-th of this key."""

    def __init__(self, shard: int, key: str, attempt: int) -> None:
        self.shard = shard
        self.key = key
        self.attempt = attempt


class FakeService:
    """One run, in which every push that counts makes one step, and every element of y at step n is n.

    A push counts when the last of its parts has arrived. Between a push and the next read others push too, so that a
    read is of a later step than the push's own answer: parts of two steps have different elements.

    without_y: the pushes that are answered with their receipt alone. unreached: reads that wait for a step in vain,
    before one gets it. scheduled_lr: what answers say of the learning rate; None: nothing, as older services.
    """

    def __init__(self, spec: dict[str, Any], shards: int = 1) -> None:
        self.spec = RunSpec.model_validate({**spec, "shards": shards})
        self.shards = shards
        self.manifest = Manifest.of(self.spec)
        self.step, self.epoch = 0, 1
        self.others = 1
        self.scheduled_lr: str | None = "1.0"
        self.without_y: Callable[[Push], bool] = lambda push: False
        self.unreached: list[Callable[[], None]] = []
        self.asked: list[httpx.Request] = []
        self._arrived: dict[str, set[int]] = {}
        self._attempts: dict[tuple[str, int], int] = {}
        self._receipts: dict[str, int] = {}
        self._reads: dict[str, int] = {}
        self._changed = threading.Condition()

    @property
    def counted(self) -> int:
        """How many pushes have counted."""
        return len(self._receipts)

    def client(self, **options: Any) -> Client:
        """A client of this service, which sends each request once unless told otherwise."""
        http = httpx.Client(base_url="http://fake.test", transport=httpx.MockTransport(self._handle))
        return Client(http=http, **{"retry_for": 0.0, **options})

    def reads(self) -> list[dict[str, str]]:
        """The queries of the reads so far."""
        return [dict(each.url.params) for each in self.asked if each.method == "GET" and "point" in each.url.params]

    def restore(self) -> None:
        """Goes back to the beginning, in a new epoch."""
        self.step, self.epoch = 0, self.epoch + 1

    def _handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        resource = request.url.path.removeprefix("/v1/runs/run").strip("/").partition("/")[0]
        try:
            return getattr(self, f"_{request.method.lower()}_{resource or 'run'}")(request)
        except ProblemError as problem:
            return httpx.Response(499, json=problem.to_document(499))

    def _get_run(self, request: httpx.Request) -> httpx.Response:
        status = {
            "run": "run",
            "epoch": self.epoch,
            "step": self.step,
            "initialized": True,
            "workers": [],
            "pushes": {},
        }
        spec = self.spec.model_dump(mode="json")
        return httpx.Response(
            200, json={**status, "spec": spec, "parameter_count": self.manifest.numel, "shards": self.shards}
        )

    _put_run = _get_run

    def _get_topology(self, request: httpx.Request) -> httpx.Response:
        parts = [self.manifest.part(shard, self.shards) for shard in range(self.shards)]
        shards = [
            {"index": shard, "url": f"http://owner-{shard}.test", "begin": part.begin, "end": part.end, "slices": []}
            for shard, part in enumerate(parts)
        ]
        return httpx.Response(200, json={"run": "run", "epoch": self.epoch, "shards": shards})

    def _post_leases(self, request: httpx.Request) -> httpx.Response:
        worker = json.loads(request.content)["worker"]
        lease = {"lease": f"lease-{self.epoch}", "token": 1, "worker": worker, "ttl_ms": 3_600_000}
        return httpx.Response(201, json={**lease, "epoch": self.epoch, "step": self.step})

    def _delete_leases(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(204)

    def _get_leases(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"leases": []})

    def _get_parameters(self, request: httpx.Request) -> httpx.Response:
        query = request.url.params
        with self._changed:
            if "min_step" in query and int(query["min_step"]) > 0 and self.unreached:
                self.unreached.pop(0)()
                raise StepNotReached
            read = query.get("cut", f"read-{len(self._reads)}")
            if read not in self._reads:
                self.step += self.others
                self._reads[read] = self.step
            step = self._reads[read]
            assert step >= int(query["min_step"])
        return self._point(query, step, cut=read)

    def _post_gradients(self, request: httpx.Request) -> httpx.Response:
        shard, key = int(request.url.params.get("shard", 0)), request.headers["idempotency-key"]
        count = int(request.url.params.get("of", 1))
        with self._changed:
            if request.headers["freestep-lease"] != f"lease-{self.epoch}":
                raise EpochChanged
            if request.headers["freestep-token"] != "1":
                raise LeaseExpired
            attempt = self._attempts[key, shard] = self._attempts.get((key, shard), 0) + 1
            replayed = key in self._receipts
            self._arrived.setdefault(key, set()).add(shard)
            if len(self._arrived[key]) == count and not replayed:
                self.step += 1
                self._receipts[key] = self.step
                self._changed.notify_all()
            assert self._changed.wait_for(lambda: key in self._receipts, timeout=30)
            step = self._receipts[key]
        receipt = {"decision": "applied", "step": step, "staleness": 0, "replayed": replayed}
        if "return=representation" not in request.headers["prefer"] or self.without_y(Push(shard, key, attempt)):
            return httpx.Response(200, json=receipt)
        headers = {"Freestep-Decision": "applied", "Freestep-Receipt-Step": str(step), "Freestep-Staleness": "0"}
        return self._point(request.url.params, step, cut=key, **headers, **{"Freestep-Replayed": str(replayed).lower()})

    def _point(self, query: httpx.QueryParams, step: int, *, cut: str, **headers: str) -> httpx.Response:
        count, shard = int(query.get("of", 1)), int(query.get("shard", 0))
        wide = query["dtype"] in ("F32", "I8")
        point = Flat(self.manifest, "F32" if wide else query["dtype"])
        point.vector.fill_(step)
        if query["dtype"] == "I8":
            encoder = Int8(point)
            encoder.begin()
            pieces = encoder.parts(count)[shard].body()
        else:
            pieces = point.parts(count)[shard].body()
        lines = {"Content-Type": MEDIA_TYPE, "Freestep-Epoch": str(self.epoch), "Freestep-Step": str(step)}
        lines |= {} if self.scheduled_lr is None else {"Freestep-Scheduled-Lr": self.scheduled_lr}
        return httpx.Response(200, headers={**lines, "Freestep-Cut": cut, **headers}, content=b"".join(pieces))
