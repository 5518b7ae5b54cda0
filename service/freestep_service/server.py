"""Running the app under uvicorn."""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp
from rich.console import Console

from freestep_service.app import create_app
from freestep_service.connection import Connection
from freestep_service.settings import Settings

__all__ = ["main", "serve"]


def main(arguments: list[str]) -> None:
    """`freestep serve`: settings from flags and the environment; exits with 2 where they are wrong."""
    try:
        settings = CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            sys.stderr.write(f"freestep serve: {name + ': ' if name else ''}{fault['msg']}\n")
        sys.exit(2)
    try:
        serve(settings)
    except OSError as error:
        sys.stderr.write(f"freestep serve: {settings.host}:{settings.port}: {error.strerror}\n")
        sys.exit(2)


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM, then writes the last checkpoints. Raises OSError if it cannot listen."""
    # It says every request that is relayed.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        create_app(settings.model_copy(update={"port": port})),
        http=Connection,
        loop="auto",
        ws="none",
        lifespan="on",
        log_level=settings.log_level,
        access_log=settings.access_log,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=60,
    )
    Console().print(f"freestep listens on http://{f'[{host}]' if ':' in host else host}:{port}", soft_wrap=True)
    uvicorn.Server(config).run(sockets=[listener])
