"""A service under faults: its processes, its workers, and the connections between them and to its Redis."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from chaos.history import Recorder
from chaos.relay import Relay
from chaos.schedule import Fault, Schedule
from chaos.store import LEASE_MS, PATIENCE_S, Store
from chaos.worker import NAMES, Clients
from forked import Script
from freestep.api.token_form import make_token
from meanwhile import under_way, wait_until
from ports import free_port

__all__ = ["System"]

OWNER_S = 1.0
SIZE = 4096
"""Coordinates, each for one push."""
_BLOCK = 256
"""Coordinates that one process of a worker may use."""
_HERE = Path(__file__).parent
_DISK_KIB = 24576


class System:
    """The system of a schedule, started in a folder of its own; `close` ends all of it.

    bug: which fault to put into the service on purpose.
    """

    def __init__(self, schedule: Schedule, folder: Path, bug: str = "") -> None:
        self.schedule = schedule
        self.folder = folder
        self.history = folder / "history"
        self.history.mkdir(parents=True)
        self.recorder = Recorder(self.history / "system.jsonl", "system")
        self._bug = bug
        self._stack = ExitStack()
        self._token = make_token("admin")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        folder, schedule = self.folder, self.schedule
        (folder / "token").write_text(self._token)
        (folder / "token").chmod(0o600)
        self._disk = folder / "disk"
        self._disk.mkdir()
        self.has_small_disk = _mount(self._disk)
        if self.has_small_disk:
            self._stack.callback(subprocess.run, ["umount", "--lazy", self._disk], check=True)
        self.store = Store(schedule.store, folder / "store", self._data_dir(0), self.recorder)
        self._stack.callback(self.store.close)
        self._ports = [free_port() for _ in range(schedule.processes)]
        self.services: list[Script] = []
        self._starts = 0
        self._stack.callback(self._end_services)
        self.services = [self._start_service(number) for number in range(schedule.processes)]
        self.relays = [Relay(port) for port in self._ports]
        for relay in self.relays:
            self._stack.callback(relay.close)
        self._next_coordinate = 0
        self.workers: list[Script] = []
        self._stack.callback(self._end_workers)
        self.clients = Clients(self._given(), "observer")
        self._create()
        self.workers = [self._start_worker(number) for number in range(schedule.workers)]
        # Faults come over what has begun.
        self._wait_until(self._all_have_pushed, 0.05)

    # Its parts

    @staticmethod
    def _wait_until(condition: Callable[[], bool], pause_s: float | None = None) -> None:
        wait_until(condition, pause_s, PATIENCE_S)

    def _all_have_pushed(self) -> bool:
        files = list(self.history.glob("worker-*.jsonl"))
        return len(files) == len(self.workers) and all('"receipt"' in file.read_text() for file in files)

    def _start_service(self, number: int) -> Script:
        self._starts += 1
        settings: dict[str, Any] = {
            "port": self._ports[number],
            "data_dir": self._data_dir(number),
            "checkpoint_url": self._disk / "checkpoints",
            # Who takes a shard over finds its journal there.
            "journal_dir": self._disk / "journal",
            "checkpoint_seconds": 0.7,
            "owner_ttl_seconds": OWNER_S,
            "commit_seconds": 3,
            "queue_seconds": 3,
            "stall_seconds": 2,
            "inline_elements": SIZE if self.schedule.is_inline else 0,
            "threads": 1,
            "log_level": "warning",
            "admin_token_file": self.folder / "token",
        }
        if self.store.relay is not None:
            settings["redis_url"] = f"redis://127.0.0.1:{self.store.relay.port}"
        environment = {f"FREESTEP_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {"CHAOS_FOLDER": str(self.history), "CHAOS_WHO": f"service-{number}-{self._starts}"}
        environment |= {"CHAOS_BUG": self._bug, "XDG_CONFIG_HOME": str(self.folder / "config")}
        return Script(_HERE / "service.py", **environment)

    def _data_dir(self, number: int) -> Path:
        return self.folder / f"process-{number}"

    def _given(self) -> dict[str, Any]:
        return {
            "urls": [f"http://127.0.0.1:{relay.port}" for relay in self.relays],
            "run": "chaos",
            "size": SIZE,
            "scale": 1.0 / self.schedule.batch,
            "folder": str(self.history),
            "seed": self.schedule.seed,
            "without_units": 0.7 if self.schedule.is_inline else 0.1,
            "bearer": self._token,
            "shards": self.schedule.shards,
            "ttl_ms": LEASE_MS,
            "pause_s": 0.02,
        }

    def _start_worker(self, number: int) -> Script:
        first = self._next_coordinate
        self._next_coordinate = min(first + _BLOCK, SIZE)
        # One of them asks for checkpoints.
        mine = {"worker": f"worker-{number}", "first": first, "last": self._next_coordinate}
        mine["checkpoints"] = 0.05 if number == 0 and self.schedule.durability != "none" else 0.0
        return Script(_HERE / "worker.py", json.dumps(self._given() | mine))

    def _create(self) -> None:
        spec = {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": self.schedule.policy,
            "parameters": [{"name": name, "shape": [SIZE]} for name in NAMES],
            "shards": self.schedule.shards,
            "durability": self.schedule.durability,
        }
        clients = self.clients

        def is_made() -> bool:
            with suppress(httpx.TransportError):
                return clients.http.put(clients.url(), json=spec).status_code in (200, 201)
            return False

        self._wait_until(is_made)

        def is_initialized() -> bool:
            clients.initialize()
            with suppress(httpx.TransportError):
                answer = clients.http.get(clients.url())
                return answer.status_code == 200 and answer.json()["initialized"]
            return False

        self._wait_until(is_initialized)
        self.clients.create_data()

    # Faults

    def inject(self, fault: Fault) -> None:
        """Begins a fault; `mend` ends it."""
        self.recorder.write("fault", fault=fault.kind, where=fault.where, for_s=fault.for_s, detail=fault.detail)
        service = self.services[min(fault.where, len(self.services) - 1)]
        match fault.kind:
            case "kill":
                _signal(service, signal.SIGKILL)
            case "segv":
                _signal(service, signal.SIGSEGV)
            case "stop":
                _signal(service, signal.SIGSTOP)
            case "gil":
                _tell(service, "now 1 gil")
            case "point":
                _tell(service, fault.detail)
            case "worker-kill":
                _signal(self.workers[fault.where], signal.SIGKILL)
            case "worker-stop":
                _signal(self.workers[fault.where], signal.SIGSTOP)
            case "worker-twin":
                self.workers.append(self._start_worker(fault.where))
            case "cut":
                self.relays[fault.where].cut()
            case "half-close":
                self.relays[fault.where].half_close()
            case "delay":
                self.relays[fault.where].delay_s = 0.1
            case "disk":
                self._fill()
            case "change":
                # The service may be away, and other faults do not wait for it.
                under_way(lambda: self.clients.change(float(fault.detail)))
            case _:
                self.store.inject(fault)

    def mend(self, fault: Fault) -> None:
        """Ends a fault. What died is started again by `revive`."""
        match fault.kind:
            case "stop":
                _signal(self.services[fault.where], signal.SIGCONT)
            case "worker-stop":
                _signal(self.workers[fault.where], signal.SIGCONT)
            case "delay":
                self.relays[fault.where].free()
            case "disk":
                self._free()
            case _:
                self.store.mend(fault)

    def revive(self, number: int) -> None:
        """Starts a process of the service again, which has ended."""
        self.services[number].wait()
        self.services[number] = self._start_service(number)

    def _revive_all(self) -> None:
        """Starts every process of the service again that has ended: by a fault, or as its store was away too long."""
        for number, service in enumerate(self.services):
            if service.poll() is not None:
                self.revive(number)

    def revive_worker(self, number: int) -> None:
        """Starts a worker of the same name in the place of one that was killed."""
        self.workers[number].wait()
        self.workers[number] = self._start_worker(number)

    def heal(self) -> None:
        """Ends what may still be wrong: processes that a fail point has stopped or killed."""
        for service in self.services:
            _signal(service, signal.SIGCONT)
            _tell(service, "calm")
        self._revive_all()
        for worker in self.workers:
            _signal(worker, signal.SIGCONT)

    def _fill(self) -> None:
        if not self.has_small_disk:
            return
        with suppress(OSError), open(self._disk / "filler", "wb") as filler:
            while True:
                filler.write(b"\0" * 65536)
                filler.flush()

    def _free(self) -> None:
        (self._disk / "filler").unlink(missing_ok=True)

    # The end

    def finish(self) -> None:
        """Has the workers come to an end, and looks at the weights; all faults have been mended."""
        for worker in self.workers:
            worker.close_stdin()

        def have_ended() -> bool:
            self._revive_all()
            return all(worker.poll() is not None for worker in self.workers)

        self._wait_until(have_ended, 0.02)
        self._look_at_data()
        if self.schedule.ending == "restart" and self.schedule.durability != "none":
            place = self._look()
            for service in self.services:
                _signal(service, signal.SIGTERM)
            for service in self.services:
                service.wait(PATIENCE_S)
            self.recorder.write("durable", epoch=place[0], step=place[1])
            for number in range(len(self.services)):
                self.revive(number)
            self._look_at_data()

    def _look_at_data(self) -> None:
        """How much the data set says to have counted, and the weights of that moment, on every process."""

        def is_at_rest() -> bool:
            before = self.clients.data_counts()
            place = self._look()
            if before is None:
                # A run that has lost everything has no data set until somebody creates one.
                self.clients.create_data()
                return False
            if self.clients.data_counts() != before:
                return False
            self.recorder.write("data", epoch=place[0], step=place[1], **before)
            return True

        self._wait_until(is_at_rest)

    def _look(self) -> tuple[int, int]:
        """Pulls x from each process, as soon as it answers; epoch and step of the last."""
        place: list[tuple[int, int]] = []
        for relay in self.relays:

            def answers(relay: Relay = relay) -> bool:
                self._revive_all()
                found = self.clients.pull("x", f"http://127.0.0.1:{relay.port}{self.clients.path}")
                place.extend([found] if found else [])
                return found is not None

            self._wait_until(answers)
        return place[-1]

    def _end_services(self) -> None:
        for service in self.services:
            if service.poll() is None:
                _signal(service, signal.SIGCONT)
                # In order, so that the embedded store ends, too.
                _signal(service, signal.SIGTERM)
        for service in self.services:
            with suppress(TimeoutError):
                service.wait(PATIENCE_S)
            service.__exit__(None, None, None)

    def _end_workers(self) -> None:
        for worker in self.workers:
            worker.__exit__(None, None, None)

    def close(self) -> None:
        with suppress(AttributeError):
            self.clients.http.close()
        self._stack.close()


def _mount(folder: Path) -> bool:
    """Mounts a small file system, where that is allowed."""
    if os.geteuid() or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_KIB}k", "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


def _signal(process: Script, number: signal.Signals) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _tell(process: Script, line: str) -> None:
    with suppress(OSError):
        process.write_line(line)
