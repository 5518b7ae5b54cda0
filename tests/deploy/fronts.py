"""nginx and Caddy in front of services, each with the configuration of deploy/, its name, ports and paths replaced."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from meanwhile import DEADLINE_S, wait_until

__all__ = ["FRONTS", "NAME", "ROOT", "Front", "front"]

ROOT = Path(__file__).parents[2]
FRONTS = ("caddy", "nginx")
NAME = "train.example.org"
"""The name that the configurations have, and users replace."""

_NGINX = """
daemon off;
worker_processes 2;
error_log stderr;
pid {folder}/nginx.pid;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/temporary/client;
    proxy_temp_path {folder}/temporary/proxy;
    fastcgi_temp_path {folder}/temporary/fastcgi;
    uwsgi_temp_path {folder}/temporary/uwsgi;
    scgi_temp_path {folder}/temporary/scgi;
    include {included};
}}
"""
"""What a distribution's nginx.conf has around the files of conf.d."""
_CADDY = "{\n\tadmin off\n\tauto_https disable_redirects\n}\n\n"
"""Nothing but the site listens."""


class Front:
    """A proxy that speaks TLS, at https://localhost:PORT."""

    def __init__(self, kind: str, folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.kind = kind
        self.port = port
        self.url = f"https://localhost:{port}"
        self.folder = folder
        self.process = process

    def temporary_files(self) -> list[Path]:
        """What nginx has put into files instead of passing it on; Caddy has no such place."""
        return [path for path in (self.folder / "temporary").rglob("*") if path.is_file()]


@contextmanager
def front(
    kind: str,
    folder: Path,
    tls: tuple[Path, Path],
    port: int,
    *,
    upstream: int | None = None,
    configuration: str | None = None,
    changes: Sequence[tuple[str, str]] = (),
) -> Iterator[Front]:
    """Runs a proxy. Skips the test where its program is not installed.

    kind: caddy or nginx. tls: certificate and key. port: where it listens. upstream: the service's port. configuration:
    the text of the file, by default that of deploy/. changes: (pattern, replacement) of further lines, made before.
    """
    program = shutil.which(kind)
    if program is None:
        pytest.skip(f"{kind} is not installed")
    folder.mkdir(exist_ok=True)
    command = (_nginx if kind == "nginx" else _caddy)(folder, tls, port, upstream, configuration, changes)
    environment = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *command], stderr=log, stdout=log, env=environment)
    try:
        _wait_for(port, process, folder / "log")
        yield Front(kind, folder, port, process)
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def _nginx(
    folder: Path,
    tls: tuple[Path, Path],
    port: int,
    upstream: int | None,
    configuration: str | None,
    changes: Sequence[tuple[str, str]],
) -> list[str]:
    text = configuration or (ROOT / "deploy" / "nginx" / "freestep.conf").read_text()
    rules = [
        *changes,
        (r"listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        (r" *listen \[::\]:443 ssl;\n", ""),
        (r"ssl_certificate \S+;", f"ssl_certificate {tls[0]};"),
        (r"ssl_certificate_key \S+;", f"ssl_certificate_key {tls[1]};"),
        (r"server_name \S+;", "server_name localhost;"),
    ]
    if upstream is not None:
        rules.append((r"127\.0\.0\.1:8000", f"127.0.0.1:{upstream}"))
    included, main = folder / "freestep.conf", folder / "nginx.conf"
    (folder / "temporary").mkdir()
    included.write_text(_replaced(text, rules))
    # Else the processes that pass bodies on cannot write to their temporary folders.
    user = "user root;" if os.getuid() == 0 else ""
    main.write_text(_NGINX.format(folder=folder, included=included, user=user))
    return ["-p", str(folder), "-e", "stderr", "-c", str(main)]


def _caddy(
    folder: Path,
    tls: tuple[Path, Path],
    port: int,
    upstream: int | None,
    configuration: str | None,
    changes: Sequence[tuple[str, str]],
) -> list[str]:
    text = configuration or (ROOT / "deploy" / "caddy" / "Caddyfile").read_text()
    rules = [
        *changes,
        (r"(?m)^https:// \{$", f"https://:{port} {{"),
        (rf"(?m)^{NAME} \{{$", f"https://localhost:{port} {{\n\ttls {tls[0]} {tls[1]}"),
    ]
    if upstream is not None:
        rules.append((r"127\.0\.0\.1:8000", f"127.0.0.1:{upstream}"))
    file = folder / "Caddyfile"
    file.write_text(_CADDY + _replaced(text, rules))
    return ["run", "--config", str(file), "--adapter", "caddyfile"]


def _replaced(text: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"the configuration has nothing like {pattern}"
    return text


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def speaks_tls() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as plain:
                with context.wrap_socket(plain, server_hostname="localhost"):
                    return True
        except OSError:
            return False

    wait_until(speaks_tls)
