"""A run's initial weights: uploaded to each shard, agreed on by all, and then the state of step 0.

The first upload that reaches all shards wins. Redis gives uploads their turns (lua/initial_weights.lua), so that no two
hold memory while each waits for the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from torch import Tensor

from freestep.errors import AlreadyInitialized, CoordinatorUnavailable, MalformedTensors, Overloaded, ShardUnavailable
from freestep_service.runs.context import RunContext
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.compute import uninterrupted
from freestep_service.state.staging import Body, Staged

__all__ = ["InitialWeights"]

_POLL_S = 1.0
"""Seconds for which the outcome of an upload is listened for before Redis is asked for it."""


class InitialWeights:
    """The uploads of initial weights to one shard."""

    def __init__(self, context: RunContext, recovery: Recovery, core: ShardCore) -> None:
        self._coordinator = context.coordinator.opening
        self._settings = context.settings
        self._recovery = recovery
        self._core = core
        self._outcomes: dict[str, asyncio.Future[bool]] = {}
        """By upload: whether it has won, once that is known."""
        self._beginning = asyncio.Lock()

    async def receive(self, body: Body, upload: str) -> None:
        """Takes this shard's part of the initial weights; one that comes again, as its answer was lost, is passed over.

        Raises AlreadyInitialized where another upload was first, Overloaded where others had their turns for too long,
        and ShardUnavailable when the upload does not reach all shards.
        """
        async with self._turn(upload) as (outcome, has_won):
            if self._core.initialized:
                if not has_won:
                    raise AlreadyInitialized
                await self._agree(upload, outcome, await body.receive_digest())
                return
            staged = await self._stage(body, upload)
            try:
                await self._agree(upload, outcome, staged.digest)
                # The writer's thread reads the staged memory, whether or not the request is still there.
                await uninterrupted(asyncio.ensure_future(self._begin(staged)))
            finally:
                staged.hold.release()

    async def _begin(self, staged: Staged) -> None:
        """Makes the weights the state of step 0, unless another request of the same upload has."""
        assert isinstance(staged.tensors, Tensor), "only gradients are encoded"
        writer = self._core.writer
        async with self._beginning:
            if not self._core.initialized:
                await writer.run(self._core.shard.initialize, staged.tensors, writer.epoch)
                self._core.initialized = True
                writer.resume(writer.epoch, 0, 0)

    def won(self, upload: str) -> None:
        """An upload has won."""
        for name, outcome in self._outcomes.items():
            if not outcome.done():
                outcome.set_result(name == upload)

    def close(self) -> None:
        """Ends the waits for an outcome."""
        for outcome in self._outcomes.values():
            if not outcome.done():
                outcome.set_exception(ShardUnavailable())
                # Its waiter may have left.
                outcome.exception()

    @asynccontextmanager
    async def _turn(self, upload: str) -> AsyncIterator[tuple[asyncio.Future[bool], bool]]:
        """Waits for an upload's turn, which ends with the block; yields its outcome to come, and whether it has won."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.queue_seconds
        outcome = self._outcomes.setdefault(upload, loop.create_future())
        try:
            while (status := await self._report(upload, "coming")) == "waiting":
                if loop.time() >= deadline:
                    raise Overloaded("other uploads had their turns for too long")
                await asyncio.wait([outcome], timeout=_POLL_S)
                if outcome.done() and not outcome.result():
                    raise AlreadyInitialized
            yield outcome, status == "initialized"
        finally:
            self._outcomes.pop(upload, None)

    async def _stage(self, body: Body, upload: str) -> Staged:
        """Receives the part, and keeps the upload's turn meanwhile."""
        receiving = asyncio.ensure_future(self._receive(body))
        try:
            while not (await asyncio.wait([receiving], timeout=_POLL_S))[0]:
                with suppress(CoordinatorUnavailable, ShardUnavailable):
                    await self._report(upload, "coming")
            staged = receiving.result()
            if staged.norm is None:
                raise MalformedTensors("the parameters hold NaN or infinity")
            return staged
        except BaseException:
            if not receiving.done():
                receiving.cancel()
                await asyncio.wait([receiving])
            if not receiving.cancelled() and receiving.exception() is None:
                receiving.result().hold.release()
            with suppress(CoordinatorUnavailable, ShardUnavailable, AlreadyInitialized):
                await self._report(upload, "withdrawn")
            raise

    async def _receive(self, body: Body) -> Staged:
        staging = self._core.staging
        vector = await staging.pool.acquire(self._settings.queue_seconds)
        return await staging.receive(body, vector)

    async def _agree(self, upload: str, outcome: asyncio.Future[bool], digest: str) -> None:
        """Returns once all shards have their parts of the upload. Raises AlreadyInitialized when it has lost.

        digest: of this shard's part.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.commit_seconds
        progress = "staged"
        while True:
            try:
                status = await self._report(upload, progress, digest)
            except CoordinatorUnavailable:
                # Whether this part counts must not stay unknown.
                await asyncio.sleep(_POLL_S)
                continue
            if status == "initialized":
                self.won(upload)
                return
            if status != "staged":
                raise ShardUnavailable("the upload has not reached all shards")
            await asyncio.wait([outcome], timeout=_POLL_S)
            if outcome.done() and not outcome.result():
                raise AlreadyInitialized
            if asyncio.get_running_loop().time() >= deadline:
                progress = "withdrawn"

    async def _report(self, upload: str, progress: str, digest: str = "") -> str:
        """Reports to Redis how far this shard's part of an upload is; what comes of it: see lua/initial_weights.lua."""
        patience_ms, manifest = int(1000 * self._settings.stall_seconds), self._core.manifest
        elements = f"{manifest.begin}-{manifest.end}"
        status = await self._recovery.call(
            lambda: self._coordinator.initial_weights(
                self._core.owner(), upload, progress, patience_ms, elements, digest
            )
        )
        if status == "already-initialized":
            raise AlreadyInitialized
        return status
