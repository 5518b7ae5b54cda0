"""`freestep serve` for the chaos tests, in a process of its own: with fail points, and bugs that are put in on purpose.

Both are put around the service's methods from outside, so nothing of them is in the service. Lines of stdin say what is
to happen at a point: `POINT HITS ACTION` has the process do something when it comes there for the HITSth time from now,
`now 1 ACTION` at once, and `calm` takes back what has not happened yet. Actions are `kill`, `segv`, `stop`, `gil` (a
thread keeps the interpreter to itself) and `power`: what was written to journals and not made durable is lost, or half
of it, and the process dies.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos.history import Recorder
from freestep.cli import main as freestep
from freestep_service.coordination.pushes import RunPushes
from freestep_service.coordination.store import Store
from freestep_service.domain.control import ControlChange
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.records import Admission, Behind, Claim, Owner, Record, StagedPart
from freestep_service.runs.local_shard import LocalShard
from freestep_service.state.buffers import Hold
from freestep_service.state.shard import Shard
from freestep_service.state.staging import Staging
from freestep_service.storage.journal_thread import JournalThread
from freestep_service.storage.local import LocalStorage

GIL_US = 1_800_000
"""How long a thread keeps the interpreter: longer than an ownership."""


class Disk:
    """What was written to journals and not made durable, so that it can be lost."""

    def __init__(self) -> None:
        self.before_sync: Callable[[], None] = lambda: None
        """Called when something is written and is about to be made durable."""
        self.honest_calls = 1 << 62
        """Calls that make durable, after which they do nothing any more."""
        self._lock = threading.Lock()
        self._write, self._sync, self._close_file = os.pwritev, os.fdatasync, os.close
        self._open: dict[int, list[tuple[int, int]]] = {}
        os.pwritev, os.fdatasync, os.close = self._pwritev, self._fdatasync, self._close

    def _pwritev(self, file: int, buffers: Sequence[memoryview], at: int) -> int:
        with self._lock:
            written = self._write(file, buffers, at)
            self._open.setdefault(file, []).append((at, written))
            return written

    def _fdatasync(self, file: int) -> None:
        self.before_sync()
        with self._lock:
            self.honest_calls -= 1
            if self.honest_calls >= 0:
                self._sync(file)
                self._open.pop(file, None)

    def _close(self, file: int) -> None:
        """Segments are closed when they are removed."""
        with self._lock:
            self._open.pop(file, None)
            self._close_file(file)

    def lose(self) -> bool:
        """Takes back what is not durable, but for half of the first of it; whether a part was torn so.

        Nothing can be written or made durable after it.
        """
        self._lock.acquire()
        torn = False
        for file, writes in self._open.items():
            for index, (at, length) in enumerate(writes):
                kept = length // 2 if index == 0 else 0
                os.pwrite(file, bytes(length - kept), at + kept)
                torn = torn or kept > 0
        return torn


class FailPoints:
    """Places on the way of a push, which are told to do something once."""

    def __init__(self, recorder: Recorder, disk: Disk) -> None:
        self._recorder = recorder
        self._disk = disk
        self._armed: dict[str, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def arm(self, point: str, hits: int, action: str) -> None:
        with self._lock:
            self._armed[point] = hits, action
        if point == "now":
            self.reach(point)

    def disarm(self) -> None:
        with self._lock:
            self._armed.clear()

    def reach(self, point: str) -> None:
        with self._lock:
            hits, action = self._armed.pop(point, (0, ""))
            if hits > 1:
                self._armed[point] = hits - 1, action
        if hits == 1:
            self._recorder.write("seen", what="hit", point=point, action=action)
            self._act(action)

    def _act(self, action: str) -> None:
        match action:
            case "power":
                if self._disk.lose():
                    self._recorder.write("seen", what="torn")
                os.kill(os.getpid(), signal.SIGKILL)
            case "gil":
                # Calls through PyDLL keep the interpreter's lock.
                ctypes.PyDLL(None).usleep(GIL_US)
            case _:
                number = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}[action]
                os.kill(os.getpid(), number)

    def around(self, owner: type, name: str, before: str = "", after: str = "") -> None:
        """Puts points before and after an async method."""
        method = getattr(owner, name)

        @functools.wraps(method)
        async def wrapped(*args: Any, **options: Any) -> Any:
            if before:
                self.reach(before)
            try:
                result = await method(*args, **options)
            except Behind:
                self._recorder.write("seen", what="behind")
                raise
            if after and result is not None:
                self.reach(after)
            return result

        setattr(owner, name, wrapped)

    def around_call(self, owner: type, name: str, before: str, after: str) -> None:
        """Puts points before and after a plain method."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **options: Any) -> Any:
            self.reach(before)
            result = method(*args, **options)
            self.reach(after)
            return result

        setattr(owner, name, wrapped)


BETWEEN = (
    "staged",
    "committing",
    "committed",
    "journaling",
    "flushing",
    "journaled",
    "applying",
    "applied",
    "answering",
)
"""Points on the way of a push, after its body has come and before its answer goes."""
POINTS = ("admitted", *BETWEEN, "writing", "written")


def put_points(points: FailPoints, disk: Disk) -> None:
    points.around(RunPushes, "admit", after="admitted")
    points.around(Staging, "receive", after="staged")
    points.around(RunPushes, "commit", before="committing", after="committed")
    points.around(RunPushes, "push", before="committing", after="committed")
    points.around_call(Shard, "apply", before="applying", after="applied")
    points.around(LocalShard, "push", after="answering")
    points.around_call(LocalStorage, "_write", before="writing", after="written")
    points.around_call(JournalThread, "_do_all", before="journaling", after="journaled")
    disk.before_sync = lambda: points.reach("flushing")


def watch_owners(recorder: Recorder) -> None:
    """Writes down which owners admit pushes. Receipts that are repeated say nothing: any process may."""
    admit, push = RunPushes.admit, RunPushes.push

    async def admitted(self: RunPushes, claim: Claim, owner: Owner, sent: Sequence[str] = ()) -> Admission:
        call = recorder.begin("admitting", shard=owner.shard, token=int(owner.token))
        found = await admit(self, claim, owner, sent)
        if not found.replayed:
            recorder.write("admitted", id=call)
        return found

    async def pushed(
        self: RunPushes, claim: Claim, owner: Owner, part: StagedPart, largest_norm: float | None, generation: int
    ) -> tuple[Record, list[str], bool]:
        call = recorder.begin("admitting", shard=owner.shard, token=int(owner.token))
        record, evicted, replayed = await push(self, claim, owner, part, largest_norm, generation)
        if not replayed:
            recorder.write("admitted", id=call)
        return record, evicted, replayed

    RunPushes.admit = admitted  # type: ignore[method-assign]
    RunPushes.push = pushed  # type: ignore[method-assign]


def _edit_scripts(edits: dict[str, list[tuple[str, str]]]) -> None:
    """Changes the text of Lua scripts; each text that is to be replaced has to be there."""
    made = Store.__init__

    def init(self: Store, *args: Any) -> None:
        made(self, *args)
        for script, replacements in edits.items():
            for name, (_, source) in self._scripts.items():
                if script not in (name, "*"):
                    continue
                for old, new in replacements:
                    assert old in source, f"{name}.lua has changed: {old}"
                    source = source.replace(old, new)
                self._scripts[name] = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source

    Store.__init__ = init  # type: ignore[method-assign]


def forget_receipts(disk: Disk) -> None:
    """A push that comes again is taken for a new one."""
    lookup = ("local record = redis.call('HGET', RECEIPTS, key)", "local record = false")
    pending = ("local pending = redis.call('HGET', PENDING, key)", "local pending = false")
    _edit_scripts({"admit": [lookup, pending], "commit": [lookup], "push": [lookup, pending]})


def fence_nobody(disk: Disk) -> None:
    """A lease stays good although its worker has a newer one."""
    newest = ("if redis.call('HGET', WORKERS, worker) ~= lease then return false end", "")
    _edit_scripts({"*": [newest], "lease_grant": [("redis.call('DEL', KEYS[15])", "")]})


def release_early(disk: Disk) -> None:
    """A vector is given back as soon as its body was received, while its push still needs it."""
    receive, release = Staging.receive, Hold.release

    async def received(*args: Any, **options: Any) -> Any:
        staged = await receive(*args, **options)
        release(staged.hold)
        staged.hold.release = lambda: None
        return staged

    Staging.receive = received  # type: ignore[method-assign]


def repeat_units(disk: Disk) -> None:
    """The units of a push that counts are handed out again, and no shard notices."""
    counted = ("  take_units(lease, units)\n  local counts", "  give_back(lease, units)\n  units = {}\n  local counts")
    _edit_scripts({"commit": [counted], "push": [counted]})
    DataSets.count = lambda self, marks, *, advance: None  # type: ignore[method-assign]


def make_nothing_durable(disk: Disk) -> None:
    """What is written to a journal, but for its beginning, is left to the system's memory."""
    disk.honest_calls = 5


def miss_changes(disk: Disk) -> None:
    """The first shard goes on as if nothing had been changed."""
    change = Shard._change

    def changed(self: Shard, made: ControlChange) -> None:
        if self.manifest.begin:
            change(self, made)

    Shard._change = changed  # type: ignore[method-assign]


BUGS: dict[str, Callable[[Disk], None]] = {
    "deduplication": forget_receipts,
    "fencing": fence_nobody,
    "release": release_early,
    "units": repeat_units,
    "fsync": make_nothing_durable,
    "changes": miss_changes,
}


def main() -> None:
    folder, who = Path(os.environ["CHAOS_FOLDER"]), os.environ["CHAOS_WHO"]
    log = os.open(folder / f"{who}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    disk = Disk()
    if bug := os.environ.get("CHAOS_BUG"):
        BUGS[bug](disk)
    recorder = Recorder(folder / f"{who}.jsonl", who)
    points = FailPoints(recorder, disk)
    put_points(points, disk)
    watch_owners(recorder)

    def obey() -> None:
        for line in sys.stdin:
            match line.split():
                case ["calm"]:
                    points.disarm()
                case [point, hits, action]:
                    points.arm(point, int(hits), action)

    threading.Thread(target=obey, daemon=True).start()
    sys.argv = ["freestep", "serve"]
    freestep()


if __name__ == "__main__":
    main()
