"""Running the app under uvicorn."""

from __future__ import annotations

import logging
import resource
import socket
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from freestep_service.app import Startup, create_app
from freestep_service.settings import CannotStart, Settings
from freestep_service.tls import uvicorn_options
from freestep_service.web.connection import Connection

__all__ = ["main", "serve"]

_MOST_DESCRIPTORS = 65_536


def main(arguments: list[str]) -> None:
    """`freestep serve`: settings from flags and the environment.

    Exits with 2 if a setting is wrong, and with 1 if the service cannot start for another reason.
    """
    try:
        settings = CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            sys.stderr.write(f"freestep serve: {name + ': ' if name else ''}{fault['msg']}\n")
        sys.exit(2)
    try:
        serve(settings)
    except CannotStart as error:
        sys.stderr.write(f"freestep serve: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM, then writes the last checkpoints. Raises CannotStart.

    Prints the URL as soon as requests are answered.
    """
    # It logs every request that is relayed.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tls = uvicorn_options(settings)
    _raise_descriptor_limit()
    listener = _listener(settings)
    host, port = listener.getsockname()[:2]
    app = create_app(settings.model_copy(update={"port": port}))
    startup: Startup = app.state.startup
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="auto",
        ws="none",
        lifespan="on",
        log_level=settings.log_level,
        access_log=settings.access_log,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=60,
        **tls,
    )
    # Before that, it logs tracebacks of the errors that are raised here.
    logging.getLogger("uvicorn.error").addFilter(lambda _: startup.is_complete)
    try:
        _Server(config, settings.url_of(host, port)).run(sockets=[listener])
    except SystemExit:
        if startup.error is None:
            raise
    if startup.error is not None:
        raise startup.error


class _Server(uvicorn.Server):
    """Prints its URL once it has started."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(f"freestep listens on {self._url}\n")
            sys.stdout.flush()


def _raise_descriptor_limit() -> None:
    """Lets the process have as many descriptors as it may: each connection is one, and 1,024 is a common limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listener(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        place = f"{settings.host}:{settings.port}"
        raise CannotStart(f"{place} cannot be listened on, choose another host or port: {error.strerror}") from None
