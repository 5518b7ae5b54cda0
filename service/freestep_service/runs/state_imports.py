"""A run's whole state as it is imported: received, held by the shards' owners, and then what the run opens with.

It goes the way of a restore, but the state is in memory and not in a checkpoint: an import that comes to nothing leaves
none behind that the run could return to. Once the run is open, a checkpoint of the state is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

from freestep.api.models import RunSpec
from freestep.api.run_state import StateDocument
from freestep.errors import (
    AlreadyInitialized,
    CoordinatorUnavailable,
    EpochChanged,
    FreestepError,
    IdempotencyConflict,
    RunNotInitialized,
    ShardUnavailable,
)
from freestep.wire.manifest import Manifest
from freestep_service.domain.opening import Decision
from freestep_service.domain.records import CheckpointId
from freestep_service.domain.run_view import RunView
from freestep_service.domain.specs import require_same_spec
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.held_states import HeldStates
from freestep_service.runs.loading import Loading
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.ownership import Ownership
from freestep_service.runs.resources import Resources
from freestep_service.runs.run_memory import RunMemory
from freestep_service.runs.stored_states import StoredStates
from freestep_service.state.compute import uninterrupted
from freestep_service.state.received_state import ReceivedState
from freestep_service.state.staging import Body

__all__ = ["ImportTerms", "StateImports", "receive_state"]


@dataclass(frozen=True)
class ImportTerms:
    """What an import may change.

    upload: the import's name; one that has been made under it is not made again. replaces: whether a run that has
    weights is to have this state in their place. place: the epoch and step that the run has to stand at, if given.
    attempt: the request's own name, under which owners hold its parts: requests of one upload may come at once.
    """

    upload: str
    replaces: bool = False
    place: tuple[int, int] | None = None
    attempt: str = field(default_factory=lambda: secrets.token_hex(16))

    def is_met(self, view: RunView) -> bool:
        """Whether the run may take the state; False if it has taken it already.

        Raises AlreadyInitialized, RunNotInitialized, EpochChanged, and ShardUnavailable while the run is being opened
        after a loss of Redis's data.
        """
        if "lost" in view.run:
            raise ShardUnavailable("the run is being opened")
        is_initialized = view.number("initialized") == 1
        if is_initialized and view.run.get("upload") == self.upload:
            return False
        if self.place is not None:
            if not is_initialized:
                raise RunNotInitialized
            epoch, step = view.number("epoch"), view.number("step")
            if (epoch, step) != self.place:
                raise EpochChanged(
                    f"the run is at step {step} of epoch {epoch}, and not where If-Match takes it to be",
                    epoch=epoch,
                    step=step,
                )
        if is_initialized and not self.replaces:
            raise AlreadyInitialized
        return True


async def receive_state(
    resources: Resources, body: Body, accept: Callable[[StateDocument], None], manifest: Manifest | None = None
) -> ReceivedState:
    """A state's body, or a shard's part of it, whose memory the caller releases.

    accept: called with the document before the vectors are received; it may raise. manifest: of the body's tensors,
    None for those of the document's spec. Raises MalformedTensors, InvalidSpec, MalformedRequest and Overloaded.
    """
    received = ReceivedState(resources.memory, accept)
    try:
        received.digest = await body.receive_into(received.receiver(body.length, manifest))
        await uninterrupted(resources.locks.decoding(received.require_values))
    except BaseException:
        received.release()
        raise
    return received


class StateImports:
    """The imports of one run."""

    def __init__(
        self,
        context: RunContext,
        shards: OwnedShards,
        memory: RunMemory,
        ownership: Ownership,
        stored: StoredStates,
        loading: Loading,
        checkpointing: Checkpointing,
        held: HeldStates,
    ) -> None:
        self._context = context
        self._opening = context.coordinator.opening
        self._shards = shards
        self._memory = memory
        self._ownership = ownership
        self._stored = stored
        self._loading = loading
        self._checkpointing = checkpointing
        self._held = held

    def require_spec(self, spec: RunSpec) -> None:
        """Raises RunExists for another spec than the run's; they may differ in the number of shards."""
        own = self._context.spec
        require_same_spec(self._context.name, spec.model_copy(update={"shards": own.shards}), own)

    async def is_wanted(self, terms: ImportTerms) -> bool:
        """Whether an import is still to be made, and may be. Raises what `ImportTerms.is_met` does."""
        view = await self._opening.read()
        if view is None:
            raise ShardUnavailable("the run is being opened")
        return terms.is_met(view)

    async def receive_part(self, index: int, body: Body, attempt: str) -> str:
        """Receives and holds the part of a shard that is owned here; the token under which it is."""
        core = self._shards.require(index).core
        received = await receive_state(
            self._context.resources, body, lambda document: self.require_spec(document.spec), core.manifest
        )
        return self.hold(index, received, attempt)

    def hold(self, index: int, received: ReceivedState, attempt: str) -> str:
        """Holds a part that was received; the token under which its shard is owned here."""
        try:
            token = self._shards.require(index).core.token
        except BaseException:
            received.release()
            raise
        self._held.hold(attempt, index, received)
        return token

    async def adopt(self, terms: ImportTerms, step: int, digest: str, tokens: Sequence[str]) -> None:
        """Has the run opened, in a new epoch, with the state that the shards' owners hold; returns when it is durable.

        `forget` is to follow. digest: of the state's body. tokens: by shard, those under which the owners hold their
        parts. Raises what `ImportTerms.is_met` does, IdempotencyConflict, ShardUnavailable, InvalidSpec where there is
        no memory for what is changed of the state's run, and StorageUnavailable before anything is changed, or where
        the run has the state and its checkpoint cannot be written.
        """
        context = self._context
        if context.keeps_checkpoints:
            await context.resources.disk.run(context.resources.storage.require_writable)
        refusal: FreestepError | None = None
        async with AsyncExitStack() as room:
            if (held := self._held.find(terms.attempt)) is not None:
                await room.enter_async_context(self._memory.room_for(held.control.in_force(context.spec)))
            async with self._ownership.opening("an import"):
                try:
                    epoch = await self._decide(terms, step, digest, tokens)
                except FreestepError as error:
                    # Raised when the run is open again, as it was.
                    refusal = error
        if refusal is not None:
            raise refusal
        if epoch and self._shards.epoch != epoch:
            raise ShardUnavailable("a shard was lost while the run took the state")
        await self.require_durable()

    async def forget(self, attempt: str) -> None:
        """Has the owners give back what they still hold of an attempt. One that is not told does so after a while."""
        self._held.drop(attempt)
        if self._shards.is_sharded:
            with suppress(CoordinatorUnavailable):
                message = {"kind": "import-over", "attempt": attempt}
                await self._context.resources.channels.publish(message, self._context.coordinator.channel)

    async def require_same(self, terms: ImportTerms, digest: str) -> None:
        """Raises IdempotencyConflict where the upload has been made with another body than one of this digest."""
        view = await self._opening.read()
        if view is not None:
            _require_same(view, terms, digest)

    async def require_durable(self) -> None:
        """Writes a checkpoint, where the run keeps any."""
        if self._context.keeps_checkpoints:
            await self._checkpointing.write_now()

    async def _decide(self, terms: ImportTerms, step: int, digest: str, tokens: Sequence[str]) -> int:
        """Closes the run and has it opened with the state; the epoch that begins, 0 if it has the state already."""
        generation = await self._opening.gather(self._shards.count)
        view = await self._opening.read()
        if view is None:
            raise ShardUnavailable("the run is being opened")
        if not terms.is_met(view):
            _require_same(view, terms, digest)
            return 0
        if [view.field(index, "token") for index in range(view.count)] != list(tokens):
            raise ShardUnavailable("a shard has another owner than the one that holds its part of the state")
        epoch = 1 + max(await self._stored.last_epoch(), view.number("epoch"))
        place = CheckpointId(epoch, step, 0)
        decision = Decision(epoch, place, initialized=True, upload=terms.upload, attempt=terms.attempt, digest=digest)
        if not await self._loading.open(view.of_generation(generation), decision):
            raise ShardUnavailable("the run was opened otherwise in the meantime")
        return epoch


def _require_same(view: RunView, terms: ImportTerms, digest: str) -> None:
    upload, _, known = view.run.get("upload_digest", "").rpartition(" ")
    # Of an import by a process of version 0.1.0 no digest is known.
    if upload == terms.upload and known != digest:
        raise IdempotencyConflict("the idempotency key came before with another state")
