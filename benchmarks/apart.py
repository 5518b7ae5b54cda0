"""Apps in processes of their own, beside which something is measured: modules that serve one when they are run."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

__all__ = ["apart", "serve"]


@contextmanager
def apart(module: str, *arguments: str) -> Iterator[str]:
    """Runs a module, which serves an app, while the block lasts; yields the app's URL."""
    with subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def serve(app: ASGIApp, **options: Any) -> None:
    """Serves an app on a free port, and says where: what such a module does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, ws="none", log_level="warning", **options)).run(sockets=[listener])
