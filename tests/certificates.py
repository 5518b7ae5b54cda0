"""Certificates of clients, and calls over connections that show one."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import trustme

from harness import ThreadService
from plain_calls import Api

AUTHORITY = trustme.CA()
"""The CA of clients, which has signed no service's certificate."""


def issued(folder: Path, name: str = "fleet-1", authority: trustme.CA = AUTHORITY, **more: Any) -> Path:
    """A client's certificate with its key, in a file."""
    made = authority.issue_cert(f"{name}.test", common_name=name, **more)
    file = folder / f"{name}.pem"
    made.private_key_and_cert_chain_pem.write_to_path(file)
    return file


def showing(service: ThreadService, file: Path | None) -> ssl.SSLContext:
    """A context of connections that show a certificate, or none."""
    context = ssl.create_default_context(cafile=service.settings.ca_certs)
    if file is not None:
        context.load_cert_chain(file)
    return context


def calls(service: ThreadService, file: Path | None, run: str, kind: type[Api] = Api) -> Any:
    """Plain calls without a token, over such connections."""
    made = kind(service.url, run, showing(service, file))
    del made.http.headers["Authorization"]
    return made
