"""A service behind each of the proxies, as the recipe for spot instances sets them up."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from deploy.fronts import FRONTS, Front, front
from freestep import Client
from harness import ThreadService
from plain_calls import Api
from ports import free_port


@dataclass(frozen=True)
class Site:
    """A service, and the proxy that it is reached through."""

    service: ThreadService
    front: Front
    trusted: ssl.SSLContext

    @property
    def url(self) -> str:
        return self.front.url

    def api(self) -> Api:
        """Plain calls through the proxy."""
        return Api(self.url, trusted=self.trusted)

    def client(self, **options: Any) -> Client:
        """A client through the proxy; the environment says whom it trusts."""
        return Client(self.url, **{"verify": self.trusted, **options})

    def refused(self) -> list[dict[str, Any]]:
        """The refusals of strangers that the audit log has so far."""
        file = self.service.settings.data_dir / "refusals.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_certs(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the proxies' CA."""
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(file)
    return file


@pytest.fixture(scope="session")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    folder, issued = tmp_path_factory.mktemp("certificate"), authority.issue_cert("localhost")
    files = folder / "fullchain.pem", folder / "privkey.pem"
    files[0].write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(files[1])
    return files


@pytest.fixture(scope="session", params=FRONTS)
def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    certificate: tuple[Path, Path],
    ca_certs: Path,
    shared: list[ThreadService],
) -> Iterator[Site]:
    """A service behind a proxy, which tests share."""
    port, folder = free_port(), tmp_path_factory.mktemp(request.param)
    settings = {"advertise_url": f"https://localhost:{port}", "trusted_proxies": "127.0.0.1"}
    service = ThreadService(folder / "data", **settings)
    upstream = service.settings.port
    try:
        with front(request.param, folder / "front", certificate, port, upstream=upstream) as made:
            shared.append(service)
            yield Site(service, made, ssl.create_default_context(cafile=ca_certs))
    finally:
        service.stop()
