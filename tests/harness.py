"""Real services for the tests: in a thread of this process, or in a process that can be killed."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPResponse
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import safetensors.torch
import torch
import uvicorn
from redis import Redis
from torch import Tensor

import forked
from freestep.wire import MEDIA_TYPE
from freestep_service.app import create_app
from freestep_service.connection import Connection
from freestep_service.settings import Settings
from freestep_service.tls import trusted_by, uvicorn_options

T = TypeVar("T")

TENSORS = {"w": torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]]), "b": torch.tensor(2.0), "e": torch.zeros(0, 4)}
"""The parameters of the runs that `Api.create` makes: a matrix, a scalar and an empty tensor."""

BODY = safetensors.torch.save(TENSORS)
"""TENSORS as a body."""

SGD = {"algorithm": "sgd", "lr": 1.0}
"""An optimizer that takes every gradient off the parameters as it is."""

ORDINARY: dict[str, Any] = {"checkpoint_seconds": 3600.0, "inline_elements": 0}
"""Settings, unless a test has its own: no checkpoint is written because a test takes long on a busy machine, and small
models are treated as large ones are."""


class ThreadService:
    """A service under a real uvicorn in a thread; `stop` shuts it down in order."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        port = listener.getsockname()[1]
        self.settings = Settings(data_dir=data_dir, port=port, **ORDINARY | settings)
        self.url = self.settings.url_of("127.0.0.1", port)
        self.trusted = trusted_by(self.settings)
        self.app = create_app(self.settings)
        config = uvicorn.Config(
            self.app,
            http=Connection,
            ws="none",
            lifespan="on",
            log_level="warning",
            timeout_graceful_shutdown=1,
            **uvicorn_options(self.settings),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        wait_ready(self.url, self._thread.is_alive, self.trusted)

    def redis(self, *, decode_responses: bool = True) -> Redis:
        """A client of the service's store; the caller closes it."""
        url = self.settings.redis_url or f"unix://{self.settings.data_dir.resolve()}/valkey/valkey.sock"
        return Redis.from_url(url, decode_responses=decode_responses)

    def redis_dump(self, prefix: str) -> dict[str, Any]:
        """The keys under a prefix and what they hold, but for when leases and ownerships end: those
        are renewed at any moment."""
        read = {
            "hash": lambda client, key: {
                field: value for field, value in client.hgetall(key).items() if not field.endswith(":ends")
            },
            "list": lambda client, key: client.lrange(key, 0, -1),
            "stream": lambda client, key: client.xrange(key),
            "zset": lambda client, key: client.zrange(key, 0, -1),
        }
        with self.redis() as client:
            types = {key: client.type(key) for key in client.keys(_escape(prefix) + "*")}
            # A key may end between two commands; its type is none then.
            return {key: read[kind](client, key) for key, kind in types.items() if kind != "none"}

    def stop(self) -> None:
        """Shuts down in order; once is enough."""
        self._server.should_exit = True
        self._thread.join()


class ProcessService:
    """`freestep serve` in a process of its own, on one port for all its lives; it ends with the tests at the latest."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.data_dir = data_dir
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self._settings = {"port": self.port, "data_dir": data_dir, **ORDINARY, **settings}
        its = Settings(**self._settings)
        self.url = its.url_of("127.0.0.1", self.port)
        self._trusted = trusted_by(its)
        self.process: BaseProcess | None = None
        self.start()

    def start(self) -> None:
        environment = {f"FREESTEP_{key.upper()}": str(value) for key, value in self._settings.items()}
        self.process = forked.start("serve", **environment)
        wait_ready(self.url, self.process.is_alive, self._trusted)

    def send_signal(self, number: signal.Signals) -> None:
        """Sends the process a signal."""
        assert self.process is not None and self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """SIGTERM, and the embedded store that a SIGKILL may have left."""
        assert self.process is not None
        if self.process.is_alive():
            self.send_signal(signal.SIGTERM)
            # A test that failed may have left it stopped.
            self.send_signal(signal.SIGCONT)
            self.process.join()


def _escape(text: str) -> str:
    """As a literal in a Redis glob."""
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in text)


def wait_ready(url: str, is_alive: Any, verify: ssl.SSLContext | bool = True) -> None:
    """Polls /readyz until it answers 200, as an orchestrator would."""
    pause = threading.Event()
    while True:
        try:
            if httpx.get(f"{url}/readyz", verify=verify).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert is_alive(), "the service ended before it was ready"
        pause.wait(0.05)


@dataclass
class Api:
    """Plain HTTP calls to one run, as a stranger's program would make them."""

    url: str
    run: str = field(default_factory=lambda: f"run-{uuid.uuid4().hex[:8]}")
    trusted: ssl.SSLContext | bool = True

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=self.trusted)

    def path(self, rest: str = "") -> str:
        return f"/v1/runs/{self.run}{rest}"

    def redis_key(self, name: str = "") -> str:
        """One of the run's keys in Redis; without a name, what they all begin with."""
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
        """All that a refusal must leave as it was: the points' bytes, the status and Redis, but for leases' ends."""
        points = [self.http.get(self.path("/parameters"), params={"point": point}).content for point in "xyz"]
        status = self.status()
        for worker in status["workers"]:
            del worker["expires_in_ms"]
        redis = service.redis_dump(self.redis_key())
        # What owners say of their shards, at every heartbeat.
        redis.pop(self.redis_key("shards"), None)
        return {"points": points, "status": status, "redis": redis}

    def status(self) -> dict[str, Any]:
        answer = self.http.get(self.path())
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@dataclass
class ShardedApi(Api):
    """Plain HTTP calls to the shards of a run, each at its owner's URL, by what the topology says of them."""

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
        """Reads where the shards of a run without weights are, once all have owners that are ready."""
        pause = threading.Event()
        while (topology := self.http.get(self.path("/topology")).json()).get("missing", True):
            pause.wait(0.02)
        self.shards = topology["shards"]
        for shard in range(len(self.shards)):
            while slug(self.pull_part(shard, f"learn-{shard}")) != "run-not-initialized":
                pause.wait(0.02)

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


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Makes calls at the same moment, in threads of their own; returns what they return."""
    start = threading.Barrier(len(calls))

    def make(call: Callable[[], T]) -> T:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(make, call) for call in calls]]


def under_way(call: Callable[[], T]) -> Future[T]:
    """Begins a call in a thread of its own; what it returns or raises is its future's."""
    future: Future[T] = Future()

    def make() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=make).start()
    return future


def persistently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer of a service that says to ask again until it gives another."""
    pause = threading.Event()
    while (answer := call()).status_code in (429, 503):
        assert slug(answer) in ("shard-unavailable", "overloaded", "coordinator-unavailable")
        pause.wait(0.02)
    return answer


def slug(response: httpx.Response) -> str:
    """The slug of a problem answer, whose form is checked on the way."""
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"] and document["detail"]
    prefix, _, name = document["type"].rpartition(":")
    assert prefix == "urn:freestep:problem"
    return str(name)


def head_of_a_push(target: str, headers: Mapping[str, str | list[str]], length: int = len(BODY)) -> bytes:
    """The head of a push as raw bytes; a header whose value is a list stands as often."""
    lines = [f"POST {target} HTTP/1.1"]
    for name, value in {"Host": "test", "Content-Length": str(length), **headers}.items():
        lines += [f"{name}: {each}" for each in ([value] if isinstance(value, str) else value)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def half_of_a_push(api: Api, lease: dict[str, Any], step: int, key: str) -> bytes:
    """A push of BODY as raw bytes, up to the middle of the body."""
    return head_of_a_push(api.path("/gradients"), api.headers(lease, step, key)) + BODY[: len(BODY) // 2]


def connected(url: str, trusted: ssl.SSLContext | None = None) -> socket.socket:
    """A connection of the test's own to a service; `trusted` says whose certificate it may show."""
    address = urlsplit(url)
    made = socket.create_connection((address.hostname, address.port))
    if address.scheme == "http":
        return made
    assert trusted is not None
    return trusted.wrap_socket(made, server_hostname=address.hostname)


def begun_push(api: Api, lease: dict[str, Any], sent: bytes, key: str = "raw", **more: str) -> socket.socket:
    """The connection over which a push of BODY at step 0 was begun: its head was sent, and these bytes of the body."""
    connection = connected(api.url)
    connection.sendall(head_of_a_push(api.path("/gradients"), api.headers(lease, 0, key, **more)) + sent)
    return connection


def answered(connection: socket.socket) -> bytes:
    """The body of the answer that comes over a connection."""
    response = HTTPResponse(connection)
    response.begin()
    return response.read()


def is_pending(service: ThreadService, api: Api, key: str) -> bool:
    """Whether a push is admitted and not yet committed."""
    pending = api.redis_key("pending")
    return key in service.redis_dump(pending).get(pending, {})


def wait_until(condition: Callable[[], bool], pause_s: float = 0.005) -> None:
    """Asks again and again, with pauses in which those who are waited for, perhaps in this process, get on."""
    pause = threading.Event()
    while not condition():
        pause.wait(pause_s)
