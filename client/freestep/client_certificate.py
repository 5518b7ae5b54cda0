"""The certificate that a client shows to services that ask for one: of files, which are read again when they change."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import Any

import httpx

from freestep.errors import InvalidSetting

__all__ = ["is_open_without", "shows_certificate", "with_certificate"]

logger = logging.getLogger("freestep")

_PROBE_S = 3.0
"""Seconds for which a probe waits for a server."""


class _NoPassword(Exception):
    """The key is encrypted; OpenSSL would prompt for its password at the terminal."""


def with_certificate(context: ssl.SSLContext) -> ssl.SSLContext:
    """Has a context show the certificate of FREESTEP_CLIENT_CERT, with the key of FREESTEP_CLIENT_KEY, if they are set.

    New connections show the files' newest certificate: short-lived ones are replaced under way.

    Args:
        context: A context of its caller's own.

    Raises:
        InvalidSetting: The files do not hold a certificate and its key.
        OSError: A file cannot be read.
    """
    certificate, key = os.environ.get("FREESTEP_CLIENT_CERT"), os.environ.get("FREESTEP_CLIENT_KEY")
    if not certificate:
        if key:
            raise InvalidSetting("FREESTEP_CLIENT_KEY needs its certificate: set FREESTEP_CLIENT_CERT too")
        return context
    # The classes' instances are alike; none of the functions that make contexts takes a class.
    context.__class__ = _Showing
    assert isinstance(context, _Showing)
    context.show(Path(certificate), Path(key) if key else None)
    return context


def shows_certificate(context: ssl.SSLContext) -> bool:
    """Whether a context shows the environment's certificate."""
    return isinstance(context, _Showing)


def is_open_without(url: httpx.URL, error: Exception, context: ssl.SSLContext) -> bool:
    """Whether a server at which a request failed answers one without a certificate: it does not accept the one shown.

    A server under asyncio ends the connection without a word then. Asks it, unless the error tells that there is none.

    Args:
        url: The server's URL.
        error: What the request failed with.
        context: A context that shows no certificate.
    """
    if not isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return False
    try:
        httpx.get(f"{str(url).rstrip('/')}/healthz", verify=context, trust_env=False, timeout=_PROBE_S)
    except httpx.HTTPError:
        return False
    return True


class _Showing(ssl.SSLContext):
    """Shows a client certificate in the handshakes of its connections."""

    _files: tuple[Path, ...] = ()
    _read_as: tuple[tuple[int, int, int], ...] = ()

    def show(self, certificate: Path, key: Path | None) -> None:
        """Reads the files. Raises InvalidSetting and OSError."""
        self._files = (certificate,) if key is None else (certificate, key)
        for file in self._files:
            # OpenSSL does not name the file that it could not read.
            file.read_bytes()
        try:
            self._load()
        except _NoPassword:
            message = f"the key in {self._files[-1]} is encrypted: let FREESTEP_CLIENT_KEY name one without a password"
            raise InvalidSetting(message) from None
        except ssl.SSLError as error:
            message = f"{self._files[0]} and {self._files[-1]} do not hold a certificate and its key, as PEM"
            raise InvalidSetting(f"FREESTEP_CLIENT_CERT: {message}: {error.reason}") from None

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        self._renew()
        return super().wrap_socket(*arguments, **options)

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        self._renew()
        return super().wrap_bio(*arguments, **options)

    def _renew(self) -> None:
        """Reads the files again if they have changed; while they are being replaced, the last certificate is kept."""
        try:
            if self._stamps() != self._read_as:
                self._load()
        except (OSError, _NoPassword) as error:
            logger.debug("no certificate can be read in %s: %s", self._files[0], error)

    def _load(self) -> None:
        stamps, files = self._stamps(), (self._files[0], self._files[-1])
        # A context takes a certificate before it finds that the key is of another one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(*files, _give_no_password)
        self.load_cert_chain(*files, _give_no_password)
        self._read_as = stamps

    def _stamps(self) -> tuple[tuple[int, int, int], ...]:
        found = [os.stat(file) for file in self._files]
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)


def _give_no_password() -> str:
    raise _NoPassword
