"""TLS: the service's own certificate, and the CAs that it trusts when it calls other services."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import httpx

from freestep_service.settings import CannotStart, Settings

__all__ = ["trusted_by", "trusting", "uvicorn_options"]


class _NoPassword(Exception):
    """The key is encrypted; OpenSSL would prompt for its password at the terminal."""


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """uvicorn's options for TLS; none without a certificate.

    Raises CannotStart if the certificate or its key cannot be used.
    """
    if settings.ssl_certfile is None:
        return {}
    secret = settings.ssl_keyfile_password
    password = secret.get_secret_value() if secret else None
    _check(settings.ssl_certfile, settings.ssl_keyfile, password)
    clients: dict[str, Any] = {}
    if settings.ssl_client_ca is not None:
        trusting(settings.ssl_client_ca)
        # Who has none shows a token.
        clients = {"ssl_ca_certs": settings.ssl_client_ca, "ssl_cert_reqs": ssl.CERT_OPTIONAL}
    return {
        **clients,
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_keyfile_password": password,
        # As Python chooses them: by the default of older uvicorns TLS 1.2 had ciphers of CBC and SHA-1 alone.
        "ssl_ciphers": None,
    }


def _check(certificate: Path, key: Path | None, password: str | None) -> None:
    """Loads a certificate as uvicorn does. Raises CannotStart with the fault."""
    # OpenSSL does not name the file that it could not read.
    for file in (certificate, key):
        if file is not None:
            _read(file)

    def give_password() -> str:
        if password is None:
            raise _NoPassword
        return password

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, give_password)
    except _NoPassword:
        raise CannotStart(f"the key in {key or certificate} is encrypted: set ssl_keyfile_password") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CannotStart(f"the key in {key or certificate} is not that of the certificate {certificate}") from None
        where = f"{certificate} and {key}" if key else str(certificate)
        doubt = ", or the password is wrong" if password is not None else ""
        raise CannotStart(f"{where} do not hold a certificate and its private key, as PEM{doubt}") from None


def trusted_by(settings: Settings) -> ssl.SSLContext:
    """Trusts other services whose CAs are in `ca_certs`. Raises as `trusting` does."""
    return trusting(settings.ca_certs)


def trusting(ca_certs: Path | None) -> ssl.SSLContext:
    """Trusts the CAs in a file, or by default those of SSL_CERT_FILE or the system.

    Raises CannotStart if the file cannot be read.
    """
    if ca_certs is None:
        return httpx.create_ssl_context()
    _read(ca_certs)
    try:
        return ssl.create_default_context(cafile=ca_certs)
    except ssl.SSLError:
        raise CannotStart(f"there are no CA certificates in {ca_certs}, as PEM") from None


def _read(file: Path) -> None:
    try:
        file.read_bytes()
    except OSError as error:
        raise CannotStart(f"{file} cannot be read: {error.strerror}") from None
