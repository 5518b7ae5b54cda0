"""Podman's commands, with settings that work without systemd and on any kind of cgroups."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["Engine", "EngineError", "Unavailable"]

_PATIENCE_S = 90.0
"""For a command beyond what it waits for by itself."""


class Unavailable(Exception):
    """This machine lacks or forbids something that containers need."""


class EngineError(Exception):
    """A command of podman's has failed."""


class Engine:
    """Raises Unavailable where podman cannot be used."""

    def __init__(self, folder: Path) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise Unavailable("containers need root on Linux")
        if shutil.which("podman") is None:
            raise Unavailable("podman is not installed")
        file = folder / "containers.conf"
        file.write_text(_settings())
        self._environment = {**os.environ, "CONTAINERS_CONF": str(file)}

    def __call__(self, *arguments: str, stdin: bytes = b"", waits_s: float = 0.0) -> str:
        """What a command prints. Raises EngineError.

        waits_s: how long it waits by itself, as `stop` for a process to end.
        """
        command = ["podman", *arguments]
        done = subprocess.run(
            command, input=stdin, env=self._environment, capture_output=True, timeout=waits_s + _PATIENCE_S
        )
        if done.returncode:
            raise EngineError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode().strip()


def _settings() -> str:
    # Podman's defaults are above what some machines allow, and so is what these then show as theirs.
    kinds = {"nofile": (resource.RLIMIT_NOFILE, 1 << 16), "nproc": (resource.RLIMIT_NPROC, 1 << 12)}
    hard = {name: resource.getrlimit(kind)[1] for name, (kind, _) in kinds.items()}
    limits = {name: most if hard[name] < 0 else min(hard[name], most) for name, (_, most) in kinds.items()}
    ulimits = [f'"{name}={limit}:{limit}"' for name, limit in limits.items()]
    lines = ["[containers]"]
    lines += [f"default_ulimits = [{', '.join(ulimits)}]", "[engine]", 'events_logger = "file"']
    if not Path("/run/systemd/system").exists():
        lines.append('cgroup_manager = "cgroupfs"')
    # Of the two that Debian has, runc alone takes controllers of both versions of cgroups beside each other.
    if shutil.which("runc"):
        lines.append('runtime = "runc"')
    return "\n".join([*lines, ""])
