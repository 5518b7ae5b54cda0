"""TLS: the certificate that the service shows, and whom it trusts where it asks other services."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import httpx

from freestep_service.settings import CannotStart, Settings

__all__ = ["trusted_by", "uvicorn_options"]


class _NoPassword(Exception):
    """The key asks for one; OpenSSL would ask at the terminal."""


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is to be told of TLS: nothing without a certificate.

    Raises CannotStart where the certificate or its key cannot be used.
    """
    if settings.ssl_certfile is None:
        return {}
    secret = settings.ssl_keyfile_password
    password = secret.get_secret_value() if secret else None
    _try(settings.ssl_certfile, settings.ssl_keyfile, password)
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_keyfile_password": password,
    }


def _try(certificate: Path, key: Path | None, password: str | None) -> None:
    """Loads a certificate as uvicorn will, to say what is wrong with it."""
    # OpenSSL does not say which file it could not read.
    for file in (certificate, key):
        if file is not None:
            _read(file)

    def given() -> str:
        if password is None:
            raise _NoPassword
        return password

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, given)
    except _NoPassword:
        raise CannotStart(f"the key in {key or certificate} is encrypted: set ssl_keyfile_password") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CannotStart(f"the key in {key or certificate} is not that of the certificate {certificate}") from None
        where = f"{certificate} and {key}" if key else str(certificate)
        doubt = ", or the password is wrong" if password is not None else ""
        raise CannotStart(f"{where} do not hold a certificate and its private key, as PEM{doubt}") from None


def trusted_by(settings: Settings) -> ssl.SSLContext:
    """Whose certificates are good: what `ca_certs` names, else what the system or SSL_CERT_FILE does.

    Raises CannotStart where that cannot be read.
    """
    if settings.ca_certs is None:
        return httpx.create_ssl_context()
    _read(settings.ca_certs)
    try:
        return ssl.create_default_context(cafile=settings.ca_certs)
    except ssl.SSLError:
        raise CannotStart(f"there are no CA certificates in {settings.ca_certs}, as PEM") from None


def _read(file: Path) -> None:
    try:
        file.read_bytes()
    except OSError as error:
        raise CannotStart(f"{file} cannot be read: {error.strerror}") from None
