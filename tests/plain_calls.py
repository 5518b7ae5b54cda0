"""Plain HTTP calls to a run of a small known model, without the client library."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import safetensors.torch
import torch
from torch import Tensor

from freestep.wire.receiver import MEDIA_TYPE
from harness import AUTHORIZED, ThreadService
from meanwhile import at_once, wait_until

TENSORS = {"w": torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]]), "b": torch.tensor(2.0), "e": torch.zeros(0, 4)}
"""The parameters of the runs that `Api.create` makes: a matrix, a scalar and an empty tensor."""

BODY = safetensors.torch.save(TENSORS)
"""TENSORS as a body."""

SGD = {"algorithm": "sgd", "lr": 1.0}
"""An optimizer that subtracts every gradient from the parameters."""


@dataclass
class Api:
    """Plain HTTP calls to one run."""

    url: str
    run: str = field(default_factory=lambda: f"run-{uuid.uuid4().hex[:8]}")
    trusted: ssl.SSLContext | bool = True

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=self.trusted, headers=AUTHORIZED)

    def path(self, rest: str = "") -> str:
        return f"/v1/runs/{self.run}{rest}"

    def redis_key(self, name: str = "") -> str:
        """One of the run's keys in Redis; without a name, their common prefix."""
        return f"freestep:{{{self.run}}}:{name}"

    def spec(self, **changes: Any) -> dict[str, Any]:
        parameters = [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()]
        return {
            "optimizer": {"algorithm": "sgd_schedule_free", "lr": 0.5},
            "aggregation": {"policy": "async"},
            "parameters": parameters,
            **changes,
        }

    def create(self, **changes: Any) -> httpx.Response:
        """Creates the run and gives it TENSORS as its weights."""
        made = self.http.put(self.path(), json=self.spec(**changes))
        assert made.status_code == 201, made.text
        answer = self.initialize()
        assert answer.status_code == 201, answer.text
        return made

    def initialize(self, tensors: Mapping[str, Tensor] = TENSORS) -> httpx.Response:
        return self.http.put(
            self.path("/parameters"),
            content=safetensors.torch.save(dict(tensors)),
            headers={"Content-Type": MEDIA_TYPE},
        )

    def lease(self, worker: str = "worker", **wish: Any) -> dict[str, Any]:
        answer = self.http.post(self.path("/leases"), json={"worker": worker, **wish})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def headers(self, lease: Mapping[str, Any], step: int, key: str | None = None, **more: str) -> dict[str, str]:
        """A push's headers; `more` has names with underscores."""
        return {
            "Content-Type": MEDIA_TYPE,
            "Freestep-Lease": lease["lease"],
            "Freestep-Token": str(lease["token"]),
            "Freestep-Step": str(step),
            "Idempotency-Key": key or uuid.uuid4().hex,
            **{name.replace("_", "-"): value for name, value in more.items()},
        }

    def push(
        self,
        lease: Mapping[str, Any],
        step: int,
        key: str | None = None,
        *,
        tensors: Mapping[str, Tensor] = TENSORS,
        body: bytes | None = None,
        **more: str,
    ) -> httpx.Response:
        content = safetensors.torch.save(dict(tensors)) if body is None else body
        return self.http.post(self.path("/gradients"), content=content, headers=self.headers(lease, step, key, **more))

    def pull(self, point: str = "x", **query: Any) -> tuple[dict[str, Tensor], int]:
        answer = self.http.get(self.path("/parameters"), params={"point": point, **query})
        assert answer.status_code == 200, answer.text
        return safetensors.torch.load(answer.content), int(answer.headers["Freestep-Step"])

    def state(self, service: ThreadService) -> dict[str, Any]:
        """All that a refusal must not change: the points' bytes, the status and Redis, without the ends of leases."""
        points = [self.http.get(self.path("/parameters"), params={"point": point}).content for point in "xyz"]
        status = self.status()
        for worker in status["workers"]:
            del worker["expires_in_ms"]
        redis = service.redis_dump(self.redis_key())
        # Owners rewrite it at every heartbeat.
        redis.pop(self.redis_key("shards"), None)
        return {"points": points, "status": status, "redis": redis}

    def status(self) -> dict[str, Any]:
        answer = self.http.get(self.path())
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@dataclass
class ShardedApi(Api):
    """Plain HTTP calls to the shards of a run, each at its owner's URL by the run's topology."""

    shards: list[dict[str, Any]] = field(default_factory=list)

    def create(self, *, tensors: Mapping[str, Tensor] = TENSORS, **changes: Any) -> httpx.Response:
        """Creates the run and gives it its weights, as soon as its shards have owners."""
        made = self.http.put(self.path(), json=self.spec(**changes))
        assert made.status_code == 201, made.text
        self.learn()
        answer = persistently(lambda: self.initialize(tensors))
        assert answer.status_code == 201, answer.text
        return made

    def learn(self) -> None:
        """Waits until all shards of a run without weights have owners that are ready; reads their URLs."""

        def have_owners() -> bool:
            topology = self.http.get(self.path("/topology")).json()
            self.shards = topology.get("shards", [])
            return not topology.get("missing", True)

        def are_ready() -> bool:
            answers = [self.pull_part(shard, f"learn-{shard}") for shard in range(len(self.shards))]
            return {slug(answer) for answer in answers} == {"run-not-initialized"}

        wait_until(have_owners)
        wait_until(are_ready)

    def part(self, tensors: Mapping[str, Tensor], shard: int, dtype: torch.dtype | None = None) -> bytes:
        """The body that holds a shard's part of some tensors."""
        slices = {}
        for each in self.shards[shard]["slices"]:
            stretch = tensors[each["name"]].reshape(-1)[each["begin"] : each["end"]]
            slices[each["name"]] = stretch.reshape(each["shape"]).to(dtype or stretch.dtype)
        return safetensors.torch.save(slices)

    def url_of(self, shard: int, path: str, url: str | None = None) -> str:
        """A path of a shard, at its owner's URL or through another's."""
        return f"{url or self.shards[shard]['url']}{self.path(path)}"

    def query(self, shard: int, **more: Any) -> dict[str, Any]:
        return {"shard": shard, "of": len(self.shards), **more}

    def push_part(
        self,
        shard: int,
        lease: Mapping[str, Any],
        step: int,
        key: str,
        body: bytes,
        url: str | None = None,
        dtype: str = "F32",
        **more: str,
    ) -> httpx.Response:
        return self.http.post(
            self.url_of(shard, "/gradients", url),
            params=self.query(shard, dtype=dtype),
            content=body,
            headers=self.headers(lease, step, key, **more),
        )

    def push_parts(
        self, lease: Mapping[str, Any], step: int, key: str, bodies: Sequence[bytes], **more: str
    ) -> list[httpx.Response]:
        """Pushes all parts at once; the answers by shard."""
        return at_once(
            *(
                lambda shard=shard, body=body: self.push_part(shard, lease, step, key, body, **more)
                for shard, body in enumerate(bodies)
            )
        )

    def bodies(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[bytes]:
        """The bodies of all shards' parts."""
        return [self.part(tensors, shard, dtype) for shard in range(len(self.shards))]

    def pull_part(self, shard: int, cut: str, point: str = "x", url: str | None = None, **more: Any) -> httpx.Response:
        headers = more.pop("headers", None)
        return self.http.get(
            self.url_of(shard, "/parameters", url),
            params=self.query(shard, cut=cut, point=point, **more),
            headers=headers,
        )

    def pull_parts(self, cut: str, point: str = "x", **more: Any) -> list[httpx.Response]:
        """Pulls all parts of one cut at once; the answers by shard."""
        return at_once(
            *(lambda shard=shard: self.pull_part(shard, cut, point, **more) for shard in range(len(self.shards)))
        )


def persistently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """Repeats a call while it is answered with 429 or 503; returns the first other response."""
    answers: list[httpx.Response] = []

    def is_final() -> bool:
        answers[:] = [call()]
        if answers[0].status_code not in (429, 503):
            return True
        assert slug(answers[0]) in ("shard-unavailable", "overloaded", "coordinator-unavailable")
        return False

    wait_until(is_final, 0.02)
    return answers[0]


def slug(response: httpx.Response) -> str:
    """The slug of a problem answer, whose form is checked on the way."""
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"] and document["detail"]
    prefix, _, name = document["type"].rpartition(":")
    assert prefix == "urn:freestep:problem"
    return str(name)
