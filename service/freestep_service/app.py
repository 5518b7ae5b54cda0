"""The application: settings in, an ASGI app out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from freestep.api.token_places import is_loopback
from freestep.errors import CoordinatorUnavailable, StorageUnavailable
from freestep_service.access.audit import AuditLog
from freestep_service.access.kept_tokens import LeftTokens, register_kept
from freestep_service.access.sign_in_links import SignInLinks
from freestep_service.access.tokens import Tokens
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.secret import SharedSecret
from freestep_service.coordination.tokens import SharedTokens
from freestep_service.domain.layout import LayoutInUse, NewerLayout
from freestep_service.domain.records import UrlInUse
from freestep_service.optimizers.readiness import compile_loops
from freestep_service.places import claims_on, connect, place_of, redis_is_away, redis_url_of, storage_of
from freestep_service.runs.registry import Registry
from freestep_service.runs.resources import Disk, Resources
from freestep_service.runs.storage_claims import StorageClaims
from freestep_service.runs.telemetry import Metrics
from freestep_service.settings import BadSetting, CannotStart, Settings, shown
from freestep_service.state.compute import HOST, DeviceLocks, arithmetic_threads
from freestep_service.state.memory_budget import MemoryBudget, machine_memory
from freestep_service.storage.checksummed import NewerFormat
from freestep_service.storage.claims import StorageInUse
from freestep_service.storage.token_files import TokenFiles
from freestep_service.tls import trusted_by, trusting
from freestep_service.web import problems
from freestep_service.web.context import ServiceContext
from freestep_service.web.direct_routes import direct_routes
from freestep_service.web.error_boundary import ErrorBoundary
from freestep_service.web.guard import document_tokens
from freestep_service.web.hosts import OwnHosts
from freestep_service.web.issuer_documents import IssuerDocuments, issuer_client
from freestep_service.web.json_bodies import JsonBodies
from freestep_service.web.memories import Memories
from freestep_service.web.openapi import DESCRIPTION, TAGS, document_problems, send_rendered
from freestep_service.web.relay import Relay, relay_client
from freestep_service.web.routes import (
    checkpoints,
    control,
    dashboard,
    data,
    events,
    gradients,
    health,
    history,
    leases,
    parameters,
    runs,
    state,
)
from freestep_service.web.routes import metrics as reports
from freestep_service.web.routes import tokens as token_routes

if TYPE_CHECKING:
    from freestep_service.access.issuer import Issuer

__all__ = ["Startup", "create_app"]

logger = logging.getLogger("freestep")


@dataclass
class Startup:
    """How the start of a service went, and what has ended it since; it stands in `app.state.startup`.

    end: ends the service, and is_ending says whether it is to end; whoever runs the app sets them.
    """

    is_complete: bool = False
    error: Exception | None = None
    end: Callable[[], None] = lambda: None
    is_ending: Callable[[], bool] = lambda: False

    def give_way(self, error: StorageInUse | NewerLayout) -> None:
        """Another service has taken this one's storage, or a newer version its Redis."""
        self.error = CannotStart(str(error))
        self.end()


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI app; without settings it reads the environment."""
    settings = settings or Settings()
    metrics, startup = Metrics(), Startup()

    def count_problem(slug: str) -> None:
        metrics.problems.labels(slug).inc()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                app.state.context = await _start(settings, metrics, startup, stack)
            except Exception as error:
                startup.error = error
                raise
            startup.is_complete = True
            yield

    # The pages of the API's documentation, with their scripts from here and not from a network.
    app = FastAPIOffline(
        title="freestep",
        version=version("freestep"),
        summary="Schedule-Free optimization as a service.",
        lifespan=lifespan,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        # Who follows a redirect resolves dots in it: to another resource.
        redirect_slashes=False,
    )
    app.state.startup = startup
    app.add_middleware(OwnHosts, settings=settings, observe=count_problem)
    app.add_middleware(ErrorBoundary, observe=count_problem)
    if proxies := settings.proxy_addresses():
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=proxies)
    if settings.traces:
        _trace(app, settings)
    problems.install(app, count_problem)
    pages = len(app.router.routes)
    # Hot endpoints first, and the documentation last: routes are matched one after another.
    for router in (
        gradients.router,
        leases.renewals,
        parameters.router,
        leases.router,
        runs.router,
        control.router,
        state.router,
        checkpoints.router,
        reports.router,
        events.router,
        history.router,
        data.router,
        token_routes.router,
        health.router,
        dashboard.router,
    ):
        # As they are: include_router would have each app analyse them anew at its first request.
        app.router.routes.extend(router.routes)
    app.router.routes[:] = app.router.routes[pages:] + app.router.routes[:pages]
    hot = (gradients.router, leases.renewals, parameters.router)
    app.router.routes[:0] = [route for router in hot for route in direct_routes(router.routes)]
    document_tokens(app)
    document_problems(app)
    send_rendered(app)
    return app


async def _start(settings: Settings, metrics: Metrics, startup: Startup, stack: AsyncExitStack) -> ServiceContext:
    """Makes what requests need; `stack` closes it. Raises CannotStart for causes outside of the service."""
    device = choose_device(settings.device)
    torch.set_num_threads(settings.thread_count())
    asyncio.get_running_loop().set_default_executor(arithmetic_threads("worker"))
    await asyncio.to_thread(compile_loops)
    storage = storage_of(settings)
    url, directory = redis_url_of(settings, stack)
    store = await connect(url, settings, startup.is_ending)
    stack.push_async_callback(store.close)
    store.on_answer, store.on_failure = metrics.redis_answered, metrics.redis_failures.inc
    channels, disk = Channels(store), Disk()
    node = Node(settings.own_url(), int(1000 * settings.owner_ttl_seconds))
    tokens = Tokens(SharedTokens(store), TokenFiles(storage), disk, channels, issuer=await _issuer(settings, stack))
    try:
        claims = claims_on(settings, store, storage, node, directory, startup.give_way)
        storage.guard = partial(_require, claims, node)
        await stack.enter_async_context(claims)
        secret = await stack.enter_async_context(SharedSecret(store))
        http = await stack.enter_async_context(relay_client(trusted_by(settings)))
        resources = Resources(
            settings,
            store,
            storage,
            channels,
            node,
            device,
            DeviceLocks(settings.inline_elements),
            metrics,
            MemoryBudget(settings.memory_bytes or machine_memory() // 8 * 7),
            MemoryBudget(machine_memory() // 8 if settings.slow_peer_bytes is None else settings.slow_peer_bytes),
            disk,
        )
        registry = Registry(resources, startup.give_way)
        if not settings.insecure:
            # Before a run is opened: one that a newer version has written ends the start.
            await tokens.read()
        await registry.start()
        stack.push_async_callback(registry.close)
        if settings.insecure:
            logger.warning("insecure: there are no tokens, and everybody who reaches this service may do everything")
        else:
            await _start_tokens(tokens, settings, stack)
    except (UrlInUse, StorageInUse, LayoutInUse, NewerLayout, NewerFormat) as error:
        raise CannotStart(str(error)) from error
    except CoordinatorUnavailable as error:
        raise redis_is_away(url, error) from error
    except (OSError, StorageUnavailable) as error:
        place = shown(settings.checkpoint_url or settings.data_dir)
        raise CannotStart(
            f"the checkpoints in {place} cannot be read, name another place with checkpoint_url: {error}"
        ) from error
    logger.info(
        "freestep %s is %s: device %s, data in %s, checkpoints in %s, Redis at %s",
        *(version("freestep"), node.url, device, settings.data_dir, storage, place_of(url)),
    )
    relay = Relay(http, secret, settings.stall_seconds)
    audit = AuditLog(settings.data_dir)
    stack.callback(audit.close)
    json_bodies = JsonBodies(settings.queue_seconds)
    stack.callback(json_bodies.close)
    memories = await stack.enter_async_context(Memories(resources))
    resources.memory.recall = memories.give_back
    return ServiceContext(
        settings, store, claims, relay, registry, tokens, SignInLinks(), audit, metrics, json_bodies, device, memories
    )


def _require(claims: StorageClaims, node: Node) -> None:
    """Raises StorageUnavailable where this service is to write nothing: its storage or its Redis is others'."""
    claims.require()
    if node.newer is not None:
        raise StorageUnavailable(str(node.newer))


def _trace(app: FastAPI, settings: Settings) -> None:
    """Traces pushes. Raises BadSetting."""
    try:
        from freestep_service.web.tracing import Traces
    except ImportError as error:
        raise BadSetting(f"traces: a package is missing, pip install 'freestep[otel]': {error}") from error
    app.add_middleware(Traces, version=version("freestep"), url=settings.own_url())


async def _start_tokens(tokens: Tokens, settings: Settings, stack: AsyncExitStack) -> None:
    """Shares the tokens, and leaves the admin token for clients of the same user; `stack` takes it away."""
    if settings.ssl_certfile is None and not is_loopback(settings.host):
        logger.warning("tokens and weights travel unencrypted: set ssl_certfile, or have a proxy with TLS in front")
    await tokens.start()
    stack.push_async_callback(tokens.close)
    admin = await register_kept(tokens, settings)
    stack.callback(LeftTokens(admin, (settings.url_of(settings.host, settings.port), settings.own_url())).remove)


async def _issuer(settings: Settings, stack: AsyncExitStack) -> Issuer | None:
    """The issuer whose tokens count too, whose keys are read until `stack` closes it; None without one."""
    if settings.oidc_issuer is None or settings.insecure:
        return None
    try:
        from freestep_service.access.issuer import Issuer
    except ImportError as error:
        raise BadSetting(f"oidc_issuer: a package is missing, pip install 'freestep[oidc]': {error}") from error
    http = await stack.enter_async_context(issuer_client(trusting(settings.oidc_ca_certs)))
    issuer = Issuer(settings, IssuerDocuments(http, settings).keys)
    issuer.keys.start()
    stack.push_async_callback(issuer.keys.close)
    return issuer


def choose_device(name: str) -> torch.device:
    """The device that a setting names; auto is cuda if there is a GPU. Raises BadSetting."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadSetting(f"device: {name!r} is none: cpu, cuda, cuda:N or auto")
    if device.type == "cpu":
        # The same device whatever its number.
        return HOST
    try:
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise BadSetting(f"device: {name} cannot be used, choose another or cpu: {cause}") from error
    return device
