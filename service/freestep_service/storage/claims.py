"""Claims on storage: which Redis the services that use it share. Services with another Redis would overwrite its runs.

A directory is claimed by a lock on a file in it, which the system takes back from whoever ends. An object store has no
locks: each service writes a small object there again and again, and counts as live as long as its object changes.
Beside them stands whose the place is; who was away for so long that another took it finds the other's identity there.
"""

from __future__ import annotations

import fcntl
import math
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from freestep.errors import StorageUnavailable
from freestep_service.storage.medium import Storage

__all__ = ["Claim", "DirectoryClaim", "ObjectClaim", "StorageInUse"]

_OBJECTS = "claims"
_HOLDER = "claimed-by"
"""The object that contains the identity of the Redis whose services may use an object store."""
_UNWRITTEN = ""
"""What a lock file contains on a disk that was full when it was made."""


class StorageInUse(Exception):
    """Services with another Redis use the storage."""

    def __init__(self, place: str) -> None:
        super().__init__(
            f"another service uses {place}, with another Redis, and each would overwrite the other's runs: end it, "
            "name its Redis with redis_url, or another place with data_dir and checkpoint_url"
        )


class Claim(ABC):
    """The claim of one service on one place. All calls block, and raise StorageUnavailable."""

    place: str
    """As it stands in messages."""
    patience_s: float
    """Seconds after which who is in the way, and has not changed, is no more or stays."""
    lapses_s: float
    """Seconds after which a claim that was not renewed may be another's: less than the patience of others."""

    @abstractmethod
    def is_held(self) -> bool:
        """Whether another service has a claim on the place, or had one when it was killed."""

    @abstractmethod
    def take(self, identity: str) -> dict[str, bytes]:
        """Claims the place for the services of a Redis.

        Returns who is in the way, by name, with what changes while they are live: none where the place is claimed.
        Raises StorageInUse where somebody is certainly live.
        """

    @abstractmethod
    def dismiss(self, names: Iterable[str]) -> None:
        """Removes those who are in the way and have not changed. Raises StorageInUse where they need not change."""

    @abstractmethod
    def renew(self, identity: str, former: str) -> dict[str, bytes]:
        """Keeps the claim, and returns who else is there. `former` is the identity with which it was kept before.

        Raises StorageInUse, and changes nothing, where another has the place.
        """

    @abstractmethod
    def release(self) -> None:
        """Ends the claim."""


class DirectoryClaim(Claim):
    """A lock on the file `lock` of a directory, which contains the identity of the Redis.

    Services of one Redis share the lock; who has it alone may write another identity. Raises OSError when it is made.

    A file that is removed, or moved away with its directory, keeps nobody from the place: a claim that is renewed finds
    that, and takes the lock of the file that is there then.
    """

    patience_s = 5.0
    lapses_s = math.inf

    def __init__(self, directory: Path) -> None:
        self.place = f"the directory {directory}"
        self._path = directory / "lock"
        self._file = self._open()

    @property
    def identity(self) -> str:
        """What the file contains."""
        with self._refusing():
            return os.pread(self._file.fileno(), 64, 0).decode("ascii", "replace")

    def take_alone(self) -> bool:
        """Whether this service has the lock now, and nobody else can have it before it is released."""
        return self._locked(fcntl.LOCK_EX)

    def write(self, identity: str) -> None:
        """Writes an identity; they are all of one length."""
        with self._refusing():
            os.pwrite(self._file.fileno(), identity.encode(), 0)

    def is_held(self) -> bool:
        if not self.take_alone():
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False

    def take(self, identity: str) -> dict[str, bytes]:
        try:
            if self.take_alone():
                self.write(identity)
        except StorageUnavailable:
            self._locked(fcntl.LOCK_SH)
            raise
        # A service that starts has the lock alone for a moment, also where this one had it until now.
        if not self._locked(fcntl.LOCK_SH):
            return {"lock": b""}
        if self.identity not in (identity, _UNWRITTEN):
            fcntl.flock(self._file, fcntl.LOCK_UN)
            raise StorageInUse(self.place)
        return {}

    def dismiss(self, names: Iterable[str]) -> None:
        raise StorageInUse(self.place)

    def renew(self, identity: str, former: str) -> dict[str, bytes]:
        self._follow()
        found = self.identity
        if found not in (identity, former, _UNWRITTEN):
            raise StorageInUse(self.place)
        if not self._locked(fcntl.LOCK_SH):
            return {"lock": b""}
        if found != identity:
            self.write(identity)
        return {}

    def release(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        # A link would have a file made, or locked, elsewhere.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        return open(descriptor, "r+b", buffering=0)

    def _follow(self) -> None:
        """Goes on with the file that is there, where it is another. Raises StorageUnavailable."""
        with self._refusing():
            with suppress(FileNotFoundError):
                if os.path.samestat(self._path.lstat(), os.fstat(self._file.fileno())):
                    return
            found = self._open()
        self._file.close()
        self._file = found

    def _locked(self, kind: int) -> bool:
        with self._refusing():
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A block whose calls of the system may fail, as those on a network's file system do."""
        try:
            yield
        except OSError as error:
            raise StorageUnavailable(f"{self.place} cannot be claimed: {error.strerror}") from error


class ObjectClaim(Claim):
    """Objects `claims/IDENTITY.SERVICE`, one for each service, which its service replaces again and again.

    A service writes its own before it looks for others, so that of two that start at once one sees the other.
    """

    patience_s = 20.0
    """Four times as long as a service takes between two renewals."""
    lapses_s = 15.0

    def __init__(self, storage: Storage, service: str) -> None:
        self.place = str(storage)
        self._storage = storage
        self._service = service
        self._identity = ""

    def is_held(self) -> bool:
        return bool(self._others(""))

    def take(self, identity: str) -> dict[str, bytes]:
        self._show(identity)
        if not (others := self._others(identity)):
            self._storage.write(_HOLDER, [identity.encode()])
        return others

    def dismiss(self, names: Iterable[str]) -> None:
        for name in names:
            self._storage.remove(f"{_OBJECTS}/{name}")

    def renew(self, identity: str, former: str) -> dict[str, bytes]:
        if (holder := self._holder()) not in (identity, former, _UNWRITTEN):
            raise StorageInUse(self.place)
        self._show(identity)
        if holder != identity:
            self._storage.write(_HOLDER, [identity.encode()])
        if former != identity:
            self._storage.remove(self._path(former))
        return self._others(identity)

    def release(self) -> None:
        if self._identity:
            self._storage.remove(self._path(self._identity))

    def _show(self, identity: str) -> None:
        """Replaces this service's object."""
        self._identity = identity
        self._storage.write(self._path(identity), [secrets.token_hex(8).encode()])

    def _holder(self) -> str:
        """The identity of the Redis whose services may use the place."""
        try:
            return self._storage.read(_HOLDER).decode("ascii", "replace")
        except FileNotFoundError:
            return _UNWRITTEN

    def _others(self, identity: str) -> dict[str, bytes]:
        """The objects of services whose Redis does not have this identity."""
        found = {}
        for name in self._storage.names(_OBJECTS):
            its, _, service = name.partition(".")
            if its != identity and service != self._service:
                with suppress(FileNotFoundError, IsADirectoryError):
                    found[name] = self._storage.read(f"{_OBJECTS}/{name}")
        return found

    def _path(self, identity: str) -> str:
        return f"{_OBJECTS}/{identity}.{self._service}"
