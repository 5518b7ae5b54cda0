"""The certificate of a client's environment: shown, read again when it changes, and not accepted."""

from __future__ import annotations

import datetime
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

import forked
from certificates import AUTHORITY, issued, showing
from freestep import Client, Forbidden, InvalidSetting, ServiceUnreachable, Unauthenticated
from freestep_service.web import guard
from harness import TOKEN, ThreadService
from scripted import Peer, Server

LARGE = 300_000
"""Parameters whose bodies are received in place."""


@pytest.mark.parametrize("kind", ["foreign", "expired", "to come", "self-signed"])
def test_a_certificate_that_is_not_good_is_refused(
    certified: ThreadService, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = {
        "foreign": lambda: issued(tmp_path, "other", trustme.CA()),
        "expired": lambda: issued(tmp_path, "other", not_before=now - 2 * day, not_after=now - day),
        "to come": lambda: issued(tmp_path, "other", not_before=now + day, not_after=now + 2 * day),
        "self-signed": lambda: Path(certified.settings.ssl_certfile or ""),
    }[kind]()
    monkeypatch.setenv("FREESTEP_CLIENT_CERT", str(made))
    if kind == "self-signed":
        monkeypatch.setenv("FREESTEP_CLIENT_KEY", str(certified.settings.ssl_keyfile))
    with Client(certified.url, retry_for=60) as client:
        with pytest.raises(ServiceUnreachable, match="does not accept the certificate of FREESTEP_CLIENT_CERT"):
            client.runs()
    # Nor does a token help.
    with Client(certified.url, token=TOKEN, retry_for=0) as client:
        with pytest.raises(ServiceUnreachable):
            client.runs()


def test_servers_that_say_so_are_heard(
    serve: Callable[..., Server], shown: Path, tls: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of other languages do, which proxies are written in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls["ssl_certfile"], tls["ssl_keyfile"])
    context.load_verify_locations(tls["ca_certs"])
    context.verify_mode = ssl.CERT_REQUIRED

    def script(peer: Peer) -> None:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(peer.connection, server_side=True)

    url = serve(script).url.replace("http:", "https:")
    with (
        Client(url, retry_for=60) as client,
        pytest.raises(ServiceUnreachable, match="accept this client's certificate"),
    ):
        client.runs()


def test_a_certificate_that_ends_under_way_is_replaced(
    certified: ThreadService, shown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(certified.url, retry_for=60) as client:
        client.runs()
        offsets = [400 * 24 * 3600.0 * 100]
        later = SimpleNamespace(time=lambda: time.time() + (offsets.pop() if offsets else 0.0))
        monkeypatch.setattr(guard, "time", later)
        # The connection ends, and the next one is good.
        client.runs()
        assert not offsets


@pytest.mark.parametrize("numel", [10, LARGE])
def test_a_client_shows_the_certificate_of_its_environment(certified: ThreadService, shown: Path, numel: int) -> None:
    with Client(certified.url, retry_for=0) as client:
        run = client.run(f"mine-{numel}")
        run.create({"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [numel]}]})
        run.initialize({"w": torch.zeros(numel)})
        with run.lease("fleet-1-a") as lease:
            assert run.push({"w": torch.ones(numel)}, lease.claim(0)).step == 1
        assert run.pull("y")[0]["w"].shape == (numel,)
        with pytest.raises(Forbidden):
            run.delete()


def test_a_client_asks_the_owners_of_shards_with_it(
    certified_nodes: list[ThreadService], shown: Path, tmp_path: Path
) -> None:
    with Client(certified_nodes[0].url, retry_for=60) as client:
        run = client.run("direct")
        run.create({"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [64]}], "shards": 2})
        run.initialize({"w": torch.zeros(64)})
        with run.lease() as lease:
            assert run.push({"w": torch.ones(64)}, lease.claim(0)).step == 1
        run.delete()


@pytest.mark.slow
def test_commands_show_it_too(certified: ThreadService, shown: Path) -> None:
    environment = {"FREESTEP_URL": certified.url, "FREESTEP_TOKEN": ""}
    assert forked.freestep("runs", "list", "--json", **environment).returncode == 0
    done = forked.freestep("doctor", **environment)
    assert f"none is needed with the certificate {shown}" in done.stdout
    done = forked.freestep("runs", "list", **environment, FREESTEP_CLIENT_CERT="/none.pem")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "/none.pem" in done.stderr


def test_a_certificate_is_read_again_when_it_changes(
    certified: ThreadService, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = issued(tmp_path, "foreign", trustme.CA())
    with Client(certified.url, retry_for=0) as client:
        client.runs()
        transport = client._transport._http._transport._direct

        def connect_anew() -> None:
            for each in transport._idle.copy():
                transport._idle.remove(each)
                each.close()
            client.runs()

        # What is no certificate, or is being replaced, leaves the last one as it is.
        good = shown.read_bytes()
        for content in (b"", b"none", good[: len(good) // 2]):
            shown.write_bytes(content)
            connect_anew()
        shown.unlink()
        connect_anew()
        foreign.rename(shown)
        with pytest.raises(ServiceUnreachable):
            connect_anew()
        shown.write_bytes(good)
        connect_anew()


@pytest.mark.parametrize(
    ("certificate", "key", "error", "said"),
    [
        (None, "key", InvalidSetting, "set FREESTEP_CLIENT_CERT too"),
        ("none", None, OSError, "none.pem"),
        ("cert", "none", OSError, "none.pem"),
        ("empty", None, InvalidSetting, "do not hold a certificate and its key"),
        ("cert", None, InvalidSetting, "do not hold a certificate and its key"),
        ("cert", "other", InvalidSetting, "KEY_VALUES_MISMATCH"),
        ("cert", "locked", InvalidSetting, "locked.pem is encrypted"),
        ("cert", "key", None, ""),
    ],
)
def test_a_certificate_that_cannot_be_used_is_told(
    certified: ThreadService,
    shown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certificate: str | None,
    key: str | None,
    error: type[Exception] | None,
    said: str,
) -> None:
    one, other = (AUTHORITY.issue_cert("a.test", common_name=name) for name in ("one", "other"))
    files = {name: tmp_path / f"{name}.pem" for name in ("none", "empty", "cert", "key", "other", "locked")}
    files["empty"].touch()
    files["cert"].write_bytes(b"".join(part.bytes() for part in one.cert_chain_pems))
    one.private_key_pem.write_to_path(files["key"])
    other.private_key_pem.write_to_path(files["other"])
    locked = load_pem_private_key(one.private_key_pem.bytes(), None)
    files["locked"].write_bytes(
        locked.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    for variable, name in (("FREESTEP_CLIENT_CERT", certificate), ("FREESTEP_CLIENT_KEY", key)):
        monkeypatch.setenv(variable, str(files[name]) if name else "")
    if error is not None:
        with pytest.raises(error, match=said):
            Client(certified.url)
        return
    with Client(certified.url, retry_for=0) as client:
        client.runs()


def test_a_context_of_the_users_own_is_taken_as_it_is(certified: ThreadService, shown: Path) -> None:
    with (
        Client(certified.url, verify=showing(certified, None), retry_for=0) as client,
        pytest.raises(Unauthenticated),
    ):
        client.runs()
    with Client(certified.url, verify=showing(certified, shown), retry_for=0) as client:
        client.runs()
