"""The application: settings in, an ASGI app out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from fastapi import FastAPI
from filelock import FileLock, Timeout

from freestep_service import problems
from freestep_service.embedded import embedded_store
from freestep_service.limits import JsonLimit
from freestep_service.metrics import Metrics
from freestep_service.registry import Registry
from freestep_service.routes import checkpoints, gradients, health, leases, parameters, runs
from freestep_service.settings import Settings
from freestep_service.store import Store

__all__ = ["create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI app; without settings it reads the environment."""
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(settings.thread_count())
        device = choose_device(settings.device)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        async with AsyncExitStack() as stack:
            stack.enter_context(_alone_in(settings.data_dir))
            url = settings.redis_url or stack.enter_context(embedded_store(settings.data_dir))
            store = await Store.connect(url)
            stack.push_async_callback(store.close)
            registry = Registry(settings, store, device, metrics)
            await registry.start()
            stack.push_async_callback(registry.close)
            app.state.settings, app.state.store = settings, store
            app.state.registry, app.state.metrics, app.state.device = registry, metrics, device
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
    for module in (runs, parameters, leases, gradients, checkpoints, health):
        app.include_router(module.router)
    return app


@contextmanager
def _alone_in(data_dir: Path) -> Iterator[None]:
    """Two services in one data directory would write over each other's checkpoints."""
    try:
        with FileLock(data_dir / "lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"another service uses the data directory {data_dir}") from None


def choose_device(name: str) -> torch.device:
    """The device that a setting names; auto is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
