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

from freestep_service import problems
from freestep_service.embedded import embedded_store
from freestep_service.limits import JsonLimit
from freestep_service.metrics import Metrics
from freestep_service.optimizers.readiness import compile_loops
from freestep_service.peers import Peers
from freestep_service.registry import Registry
from freestep_service.routes import checkpoints, gradients, health, leases, parameters, runs
from freestep_service.settings import Settings
from freestep_service.storage import open_storage
from freestep_service.store import Store
from freestep_service.turns import HOST, arithmetic_threads

__all__ = ["create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI app; without settings it reads the environment."""
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(settings.thread_count())
        asyncio.get_running_loop().set_default_executor(arithmetic_threads("worker"))
        await asyncio.to_thread(compile_loops)
        device = choose_device(settings.device)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        async with AsyncExitStack() as stack:
            stack.enter_context(_in(settings.data_dir, alone=settings.redis_url is None))
            url = settings.redis_url or stack.enter_context(embedded_store(settings.data_dir))
            store = await Store.connect(url)
            stack.push_async_callback(store.close)
            storage = open_storage(settings.checkpoint_url or settings.data_dir)
            registry = Registry(settings, store, storage, device, metrics)
            await registry.start()
            stack.push_async_callback(registry.close)
            app.state.settings, app.state.store = settings, store
            app.state.registry, app.state.metrics, app.state.device = registry, metrics, device
            app.state.peers = await stack.enter_async_context(Peers())
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
    app.add_middleware(JsonLimit)
    problems.install(app, lambda slug: metrics.problems.labels(slug).inc())
    # The data path first: routes are tried one after another.
    for module in (gradients, parameters, leases, runs, checkpoints, health):
        app.include_router(module.router)
    return app


@contextmanager
def _in(data_dir: Path, *, alone: bool) -> Iterator[None]:
    """Services share a data directory if they share a Redis, which says who owns what; one with a store of its own has
    to be alone there, or they would write over each other's checkpoints."""
    with (data_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another service uses the data directory {data_dir}") from None
        yield


def choose_device(name: str) -> torch.device:
    """The device that a setting names; auto is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    # There is one host, also for who numbers it.
    return HOST if device.type == "cpu" else device
