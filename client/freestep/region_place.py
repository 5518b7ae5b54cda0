"""Where a region stands between its run and the parent's: all that has to outlive its process, in one file.

A place is written before the act that it announces and after the act that it follows from, whole or not at all, so that
a process that begins anew finds what may have been done and does it again under the same key.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from freestep.answers import Pulled
from freestep.api.models import RunStatus
from freestep.errors import FreestepError, MalformedTensors
from freestep.files import writing
from freestep.tensor_file import content, read_tensors, stored

__all__ = ["Place", "PlaceFile"]

_METADATA = "freestep.region"
_VECTORS = ("base", "sent", "residual")


@dataclass(frozen=True)
class Place:
    """A region's place.

    stage: `training`, the region's run trains round `round`; `sending`, the push of that round was or is yet to be
    made; `moving`, the run was or is yet to be moved to where round `round` begins.
    worker: the region's name at the parent. run_id, parent_id: of the region's run and the parent's, None where a
    service tells none.
    epoch, step: of the parent's y in `base`. oldest: the step of the oldest of the parent's y that the round's steps
    were taken from.
    run_epoch, run_step: where the region's run stood when `sent` was read, or when the round began.
    lease, token, key, loss: of the claim of the push; empty before the first. push_format: how it is encoded.
    whole: the move leaves nothing of what the region's run is ahead of the parent's. joins: it follows no push.
    was_paused: somebody else had paused the region's run; None while that was not looked at.

    base: the parent's y that the region's run was moved to, or is to be. sent: the region's y in the push, None outside
    `sending` and `moving`. residual: what encoded pushes have left out so far, None for none. Each fp32 [numel].
    """

    stage: Literal["training", "sending", "moving"]
    round: int
    worker: str
    run_id: str | None
    parent_id: str | None
    epoch: int
    step: int
    oldest: int
    run_epoch: int
    run_step: int
    base: Tensor
    lease: str = ""
    token: int = 0
    key: str = ""
    push_format: str = ""
    loss: float | None = None
    whole: bool = False
    joins: bool = False
    was_paused: bool | None = None
    sent: Tensor | None = None
    residual: Tensor | None = None

    def after(self, **changes: Any) -> Place:
        """The place with some members changed."""
        return replace(self, **changes)

    def require_runs(self, *, run: RunStatus | None = None, parent: RunStatus | None = None) -> None:
        """Raises FreestepError where the region's run or the parent's is another one than the place is of."""
        for known, found in ((self.run_id, run), (self.parent_id, parent)):
            if found is not None and found.id != known:
                raise FreestepError(
                    f"the run {found.run!r} was deleted, and another has its name, which is not that of the region's "
                    "place: remove its file to join the new one"
                )

    def to_move(self, pulled: Pulled, base: Tensor) -> Place:
        """Before the move of the region's run to a y of the parent's, of an epoch and step: `base`."""
        return self.after(
            stage="moving",
            round=self.round + 1,
            epoch=pulled.epoch,
            step=pulled.step,
            # What is trained before the move begins at the base so far.
            oldest=self.step,
            base=base,
            # In another epoch the parent has lost the pushes that left the residual, perhaps on purpose.
            residual=self.residual if pulled.epoch == self.epoch else None,
            was_paused=None,
        )

    def moved(self, run_epoch: int, run_step: int) -> Place:
        """Behind the move of the region's run, which began an epoch at a step."""
        # Else the run is ahead of the base by what it has trained since `sent`, and the round has begun there.
        is_fresh = self.whole or run_step <= self.run_step
        return self.after(
            stage="training",
            oldest=self.step if is_fresh else self.oldest,
            run_epoch=run_epoch,
            run_step=run_step if is_fresh else self.run_step,
            sent=None,
            whole=False,
            joins=False,
            was_paused=None,
        )


class PlaceFile:
    """The file of one region's place, which one process has at a time.

    Args:
        path: The file; it and its folder need not exist yet.

    Raises:
        FreestepError: Another process has it.
        OSError: The folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] = path.with_name(f"{path.name}.lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise FreestepError(f"another process works for the region whose place is in {path}") from None

    def save(self, place: Place) -> None:
        """Writes the place, and returns when it is on disk. Raises OSError."""
        scalars = {each.name: getattr(place, each.name) for each in fields(place) if each.name not in _VECTORS}
        tensors = {name: tensor for name in _VECTORS if (tensor := getattr(place, name)) is not None}
        with writing(self.path) as file:
            for piece in content(stored(tensors), {_METADATA: json.dumps(scalars)}):
                file.write(piece)
        # A rename is on disk when its folder is.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load(self) -> Place | None:
        """The place in the file; None if there is no file.

        Raises:
            FreestepError: The file was not written by `save`.
            OSError: It cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            found, metadata = read_tensors(self.path)
            members: dict[str, Any] = json.loads(metadata[_METADATA])
            for name, tensor in found.items():
                members[name] = torch.frombuffer(bytearray(tensor.data), dtype=torch.float32)
            return Place(**members)
        except (MalformedTensors, KeyError, TypeError, ValueError) as error:
            raise FreestepError(f"{self.path} holds no region's place: name another file") from error

    def close(self) -> None:
        """Lets another process have the file."""
        self._lock.close()
