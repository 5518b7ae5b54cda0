"""A run's curves, from its service's events to trackers, over restarts of either.

The law of this file: an event counts as told once all trackers have taken its points, and is then in the state file. So
none is left out, and after a crash at most one is told twice.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from freestep.api.events import GapEvent, RunEvent
from freestep.api.validation import first_fault
from freestep.errors import FreestepError, InvalidSetting
from freestep.files import writing
from freestep.integrations.curves import Curves
from freestep.integrations.trackers import Target, Tracker, TrackerFailed, open_tracker
from freestep.run import Run

__all__ = ["Ending", "Followed", "follow"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Followed:
    """How far a run has been followed.

    run: its name. run_id: which tells it from another of this name, None where that is not known. key: by which
    trackers find what they have begun. after: the last event that has counted. gathered: what there is for the next
    point.
    """

    run: str
    run_id: str | None
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    after: str | None = None
    gathered: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, run: str, run_id: str | None) -> Followed:
        """What a file has, or a beginning where there is none.

        Raises InvalidSetting where it is of another run, or no such file; and OSError.
        """
        try:
            found = _FOLLOWED.validate_json(path.read_bytes(), strict=True)
            Curves(gathered=found.gathered)
        except FileNotFoundError:
            return cls(run, run_id)
        except ValidationError as error:
            raise InvalidSetting(f"{path} does not tell how far a run was followed: {first_fault(error)[1]}") from error
        except ValueError as error:
            raise InvalidSetting(f"{path} does not tell how far a run was followed: {error}") from error
        is_same = run_id is None or found.run_id in (None, run_id)
        if found.run != run or not is_same:
            other = f"another run, {found.run}" if found.run != run else f"an earlier run that was named {run}"
            raise InvalidSetting(f"{path} is of {other}: name another file with --state, or delete it")
        found.run_id = run_id or found.run_id
        return found

    def save(self, path: Path) -> None:
        """Writes the file. Raises OSError."""
        with writing(path) as file:
            file.write(json.dumps(asdict(self)).encode() + b"\n")


_FOLLOWED = TypeAdapter(Followed)


class Ending:
    """Has signals end what waits, and nothing else: SIGTERM and SIGINT, while the block lasts."""

    def __init__(self) -> None:
        self.is_due = False
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Ending:
        for each in _SIGNALS:
            # A signal that is ignored, as nohup does, stays ignored.
            if signal.getsignal(each) is not signal.SIG_IGN:
                self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_due = True
        if self._waits:
            self._waits = False
            raise _Ended

    def next_of(self, events: Iterator[RunEvent]) -> RunEvent | None:
        """The next event; None where there is none, or a signal has come."""
        try:
            self._waits = True
            if self.is_due:
                return None
            event = next(events, None)
            self._waits = False
            return event
        except _Ended:
            return None
        finally:
            self._waits = False


class _Ended(BaseException):
    """A signal has come."""


def follow(
    run: Run,
    to: Sequence[Target | Tracker],
    state: Path,
    *,
    every: int = 1,
    is_live: bool = True,
    ending: Ending | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Tells trackers of a run's curves, from where the state file says that the last call has ended.

    Args:
        run: The run.
        to: Trackers; those that are only named are opened, and closed in the end.
        state: The file that keeps how far the run was followed; made where there is none.
        every: Steps for which there is one point of what pushes told.
        is_live: Whether to go on with what is yet to happen; else the call ends with what has.
        ending: What ends the call; by default nothing does.
        say: Called with lines for people: where it begins, and of gaps.

    Returns:
        The number of points that were logged.

    Raises:
        TrackerFailed: A tracker has not taken a point. It is told again from there by the next call.
        InvalidSetting: A tracker's package is not installed; or the state file is of another run, is no such file, or
            another process uses it.
        RunNotFound: There is no such run, or it was deleted.
        OSError: The state file cannot be read or written.
    """
    with ExitStack() as stack:
        stack.enter_context(_alone(state))
        followed = Followed.load(state, run.name, run.status().id)
        trackers = [(_name(each), _opened(each, followed, stack)) for each in to]
        followed.save(state)
        begin = f"behind {followed.after}" if followed.after else "from the oldest event that its service still has"
        say(f"{run.name} is followed {begin}")
        curves, logged = Curves(every, followed.gathered), 0
        events = stack.enter_context(closing(run.events(followed.after, follow=is_live)))  # type: ignore[type-var]
        ending = ending or Ending()
        while (event := ending.next_of(events)) is not None:
            if isinstance(event, GapEvent):
                say(f"there is a gap in the curves behind {event.after or 'the beginning'}: {_missing(event)}")
            for point in curves.points(event):
                logged += 1
                for name, tracker in trackers:
                    with _reported(name):
                        tracker.log(point.step, point.metrics)
            followed.after, followed.gathered = event.id, curves.gathered
            followed.save(state)
    return logged


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else follows by this file until the block ends. Raises InvalidSetting, OSError."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidSetting(f"another process follows a run by {path}: end it, or name another file") from None
        yield


def _name(each: Target | Tracker) -> str:
    return str(each) if isinstance(each, Target) else type(each).__name__


def _opened(each: Target | Tracker, followed: Followed, stack: ExitStack) -> Tracker:
    """A tracker, which `stack` closes if it was only named. Raises TrackerFailed and InvalidSetting."""
    if not isinstance(each, Target):
        return each
    own = ExitStack()
    with _reported(str(each)):
        tracker = own.enter_context(open_tracker(each, followed.run, followed.key))
    stack.callback(_close, str(each), own)
    return tracker


def _close(name: str, own: ExitStack) -> None:
    """Closes a tracker: what it raises then is its failure, and what has ended the block is not."""
    with _reported(name):
        own.close()


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Turns what a tracker raises into TrackerFailed."""
    try:
        yield
    except FreestepError:
        raise
    except Exception as error:
        raise TrackerFailed(f"{name}: {type(error).__name__}: {error}") from error


def _missing(event: GapEvent) -> str:
    if event.entries is None:
        return "the service does not know what happened there"
    return f"the service does not know {event.entries} entries of the log any more"
