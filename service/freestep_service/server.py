"""Running the app under uvicorn."""

from __future__ import annotations

import gc
import logging
import os
import resource
import socket
import sys
from math import ceil
from typing import Any

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError
from uvicorn.config import LOGGING_CONFIG

from freestep.api.validation import reason
from freestep_service.app import Startup, create_app
from freestep_service.log_lines import set_up_logging
from freestep_service.settings import BadSetting, CannotStart, Settings, misspelt
from freestep_service.tls import uvicorn_options
from freestep_service.web.connection import Connection
from freestep_service.web.head import Bounds
from freestep_service.web.listener import Listener
from freestep_service.web.places import Place, Places

__all__ = ["Server", "main", "places_for", "serve"]

logger = logging.getLogger("freestep")

_MOST_DESCRIPTORS = 65_536
_OTHER_DESCRIPTORS = 256
"""Descriptors for Redis, checkpoints, and connections to other services."""


def main(arguments: list[str]) -> None:
    """`freestep serve`: settings from flags and the environment.

    Exits with 2 if a setting is wrong, and with 1 if the service cannot start for another reason.
    """
    try:
        settings = CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            sys.stderr.write(f"freestep serve: {name + ': ' if name else ''}{reason(fault)}\n")
        sys.exit(2)
    except SettingsError as error:
        sys.stderr.write(f"freestep serve: {error}\n")
        sys.exit(2)
    try:
        serve(settings)
    except CannotStart as error:
        sys.stderr.write(f"freestep serve: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM, then writes the last checkpoints.

    Raises CannotStart, also where another service has taken the storage since the start.

    Prints the URL as soon as requests are answered.
    """
    set_up_logging(settings.log_level, settings.log_format)
    for variable, meant in misspelt(os.environ).items():
        logger.warning("the environment variable %s is no setting and is not used: is %s meant?", variable, meant)
    tls = uvicorn_options(settings)
    places = places_for(settings)
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
        # Its own lines are for people.
        log_config=None if settings.log_format == "json" else LOGGING_CONFIG,
        # The app has those that it trusts: uvicorn would believe every process of this machine.
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=ceil(settings.idle_seconds),
        **tls,
    )
    # Before that, it logs tracebacks of the errors that are raised here.
    logging.getLogger("uvicorn.error").addFilter(lambda _: startup.is_complete)
    server = _OwnServer(config, settings, places, settings.url_of(host, port))
    startup.end, startup.is_ending = server.end, server.is_ending
    try:
        server.run(sockets=[listener])
    except SystemExit:
        if startup.error is None:
            raise
    if startup.error is not None:
        raise startup.error


class Server(uvicorn.Server):
    """uvicorn's server, which accepts at a listening socket as many connections as there are places for."""

    def __init__(self, config: uvicorn.Config, settings: Settings, places: Places) -> None:
        super().__init__(config)
        self._settings = settings
        self._places = places

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Without sockets to listen on, which it would accept at by itself.
        await super().startup(sockets=[])
        if self.should_exit:
            # The app has not started; the oldest uvicorn goes on to the end from here.
            return
        bounds = Bounds.of(self._settings)

        def make(place: Place) -> Connection:
            state = self.lifespan.state
            return Connection(self.config, self.server_state, state, bounds=bounds, place=place)

        for listening in sockets or []:
            listener: Any = Listener(listening, self._places, make, self.config.ssl, bounds.head_seconds)
            self.servers.append(listener)


class _OwnServer(Server):
    """The server of a process that does nothing else: prints its URL once it has started."""

    def __init__(self, config: uvicorn.Config, settings: Settings, places: Places, url: str) -> None:
        super().__init__(config, settings, places)
        self._url = url

    def end(self) -> None:
        """Shuts down as a signal would have it."""
        self.should_exit = True

    def is_ending(self) -> bool:
        """Whether it was told to, also while it starts."""
        return self.should_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            # What the start made lives as long as the process: the garbage collector need not look at it again.
            gc.freeze()
            sys.stdout.write(f"freestep listens on {self._url}\n")
            sys.stdout.flush()


def places_for(settings: Settings) -> Places:
    """As many places as the settings say, or as leave descriptors for all else. Raises BadSetting.

    Each connection is a descriptor, of which 1,024 is a common limit: the process takes as many as it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        limit = _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    # A request may be passed on, over a connection to another service.
    most = settings.max_connections or max(1, (limit - _OTHER_DESCRIPTORS) // 2)
    if most + _OTHER_DESCRIPTORS > limit and settings.max_connections:
        raise BadSetting(
            f"max_connections: the process may have {limit} descriptors, of which {_OTHER_DESCRIPTORS} are for other "
            f"than connections; raise the limit (ulimit -n), or allow {max(limit - _OTHER_DESCRIPTORS, 0)} at most"
        )
    return Places(most, min(most, settings.max_connections_per_address or max(1, most // 2)))


def _listener(settings: Settings) -> socket.socket:
    host, is_ipv6 = settings.host, ":" in settings.host
    # All addresses are those of IPv4 too, which the URL made of the machine's name may lead to.
    takes_both = is_ipv6 and settings.takes_all_addresses and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        return socket.create_server((host, settings.port), family=family, backlog=2048, dualstack_ipv6=takes_both)
    except OSError as error:
        place = f"{f'[{host}]' if is_ipv6 else host}:{settings.port}"
        raise CannotStart(f"{place} cannot be listened on, choose another host or port: {error.strerror}") from None
