"""Memory that is counted before it is allocated: by run when it is created or changed, by buffer while it is served.

Without it, a run that is too large for the machine would be noticed by the kernel, which ends the process and with it
all runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import torch

from freestep.api.models import RunSpec
from freestep.errors import InvalidSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.aggregation import Policy
from freestep_service.optimizers import method_of
from freestep_service.state.bodies import room
from freestep_service.state.compute import HOST
from freestep_service.state.staging import staging_vectors

__all__ = ["MemoryBudget", "Vectors", "available_memory", "machine_memory", "run_bytes", "snapshot_vectors"]


class MemoryBudget:
    """`total` bytes of host memory, reserved under names, which stand for runs, or in amounts, which stand for buffers.

    What is lent besides, names come before: they may be reserved in its place, and who lends it out gets it back then.

    It only counts. Safe to use from several threads.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._named: dict[str, int] = {}
        self._amounts = self._lent = 0
        self._lock = threading.Lock()
        self.recall: Callable[[int], None] = lambda size: None
        """Is told how many lent bytes a name has been reserved in the place of; called by the thread that reserves."""

    @property
    def free(self) -> int:
        """Bytes that are neither reserved nor lent; below 0, as many are counted twice, or held beyond `total`."""
        with self._lock:
            return self._free() - self._lent

    def _free(self) -> int:
        return self.total - self._amounts - sum(self._named.values())

    def reserve(self, name: str, size: int) -> None:
        """Reserves `size` bytes under a name, in place of what is reserved under it already.

        Raises InvalidSpec, with the figures, where more than that is wanted and not free; then nothing has changed.
        """
        with self._lock:
            own = self._named.get(name, 0)
            free = max(self._free() + own, 0)
            if size > max(free, own):
                raise InvalidSpec(
                    f"the run needs up to {_gib(size)} of memory, and {_gib(free)} of {_gib(self.total)} are free",
                    field="parameters",
                    needed_bytes=size,
                    free_bytes=free,
                    total_bytes=self.total,
                )
            self._named[name] = size
            missing = self._lent - self._free()
        if missing > 0:
            self.recall(missing)

    def count(self, name: str, size: int) -> int:
        """Counts `size` bytes that are held under a name, free or not, in place of what is reserved under it.

        Returns how many bytes more than `total` are reserved then.
        """
        with self._lock:
            self._named[name] = size
            beyond = max(-self._free(), 0)
            missing = self._lent - self._free()
        if missing > 0:
            self.recall(missing)
        return beyond

    def cancel(self, name: str) -> None:
        """Gives back what is reserved under a name, if anything is."""
        with self._lock:
            self._named.pop(name, None)

    def try_reserve(self, size: int) -> bool:
        """Reserves `size` bytes; False, and nothing has changed, where they are not free."""
        with self._lock:
            if size > self._free() - self._lent:
                return False
            self._amounts += size
            return True

    def release(self, size: int) -> None:
        """Gives back bytes of `try_reserve`."""
        with self._lock:
            assert 0 <= size <= self._amounts, "more is released than was reserved"
            self._amounts -= size

    def lend(self, size: int) -> bool:
        """Lends `size` bytes, of which as many again are free; False, and nothing has changed, where they are not."""
        with self._lock:
            if 2 * size > self._free() - self._lent:
                return False
            self._lent += size
            return True

    def give_back(self, size: int) -> None:
        """Ends a loan."""
        with self._lock:
            assert 0 <= size <= self._lent, "more is given back than was lent"
            self._lent -= size


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"


def snapshot_vectors(shards: int) -> int:
    """How many points a shard may hold for fast peers at once: of several shards, as lua/_prelude.lua grants them."""
    return 2 if shards == 1 else 6


class Vectors(NamedTuple):
    """How many vectors a shard may have beside its state and the points of it.

    bodies: into which bodies of fast peers are received. gathered: in which the pushes of an update are gathered.
    """

    bodies: int
    gathered: int

    @classmethod
    def of(cls, policy: Policy, shards: int) -> Self:
        """Those of a shard under a policy, in a run of so many shards."""
        return cls(staging_vectors(policy, shards), policy.gathered_vectors)

    @classmethod
    def most(cls, each: Iterable[Vectors]) -> Self:
        """The most of each kind."""
        return cls(*map(max, zip(*each, strict=True)))


def run_bytes(
    spec: RunSpec, shards_here: int, shards: int, device: torch.device = HOST, vectors: Vectors | None = None
) -> int:
    """The most host memory, in bytes, that a process needs for `shards_here` of a run's `shards`, the largest ones.

    That is, of each: the state vectors, a group's accumulator or its pushes where a robust rule keeps them apart, the
    vectors of bodies and of points, a copy of the state while it is written or loaded, and y once more while it is
    loaded; of several, a vector for bodies of the whole model. What slow peers hold is reserved apart. device: where
    the state is; on a GPU it takes no host memory. vectors: those of a shard, None for those of the spec's policy.
    """
    manifest = Manifest.of(spec)
    vectors = vectors or Vectors.of(Policy.of(spec.aggregation), shards)
    parts = [manifest.part(index, shards) for index in range(shards)]
    largest = sorted((_shard_bytes(spec, part, shards, device, vectors) for part in parts), reverse=True)
    return sum(largest[:shards_here]) + (4 * manifest.numel if shards > 1 else 0)


def _shard_bytes(spec: RunSpec, part: Manifest, shards: int, device: torch.device, vectors: Vectors) -> int:
    method = method_of(spec.optimizer)
    vector, point = 4 * part.numel, max(4 * part.numel, room(part))
    state = (len(method.buffers) + vectors.gathered) * vector
    total = vectors.bodies * vector + snapshot_vectors(shards) * point + state
    if device == HOST:
        # y lies in a vector that any point fits into. A direction is made in a vector of its own.
        total += state - vector + 2 * point + (vector if method.direction is not None else 0)
    return total


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or the least limit of the cgroups that it is in.

    root: where /proc and /sys are.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for limit, _ in _cgroups(root))])


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could take now: of the machine, and of each cgroup's limit what its processes leave.

    What cgroups count as used has pages of files in it, of which those that are inactive can be had. Reads files;
    raises OSError where there are none of Linux's.
    """
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
            return min([available, *(max(limit - used, 0) for limit, used in _cgroups(root))])
    raise OSError("the kernel does not say how much memory is available")


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, of the process's cgroups and of those above them, version 1 and version 2 (man 7 cgroups)."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        # Not Linux.
        return
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in memberships)}
    for mount in mounts:
        # man 5 proc: ... root, mount point, options, optional fields, "-", type, source, options of the file system
        fields, _, system = mount.partition(" - ")
        mount_root, mount_point = (field.replace("\\040", " ") for field in fields.split()[3:5])
        kind, _, options = system.split(maxsplit=2)
        if kind == "cgroup2":
            path, files = paths.get(""), ("memory.max", "memory.current", "inactive_file")
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((path for controllers, path in paths.items() if "memory" in controllers.split(",")), None)
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        if path is not None:
            top = root / mount_point.lstrip("/")
            yield from _limits(top, _below(path, mount_root), *files)


def _below(path: str, mount_root: str) -> PurePosixPath:
    """A cgroup's path from its mount point; that of the mount point where the cgroup lies outside of it."""
    cgroup = PurePosixPath(path)
    if ".." in cgroup.parts or not cgroup.is_relative_to(mount_root):
        return PurePosixPath(".")
    return cgroup.relative_to(mount_root)


def _limits(top: Path, below: PurePosixPath, limit: str, use: str, inactive: str) -> Iterator[tuple[int, int]]:
    for path in [below, *below.parents]:
        # The file is missing at the root, and "max" is no number.
        with suppress(OSError, ValueError):
            limited, used = int((top / path / limit).read_text()), 0
            with suppress(OSError, ValueError):
                used = int((top / path / use).read_text())
                stat = dict(line.split() for line in (top / path / "memory.stat").read_text().splitlines())
                used -= int(stat.get(inactive, 0))
            yield limited, used
