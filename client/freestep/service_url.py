"""The service's URL: what it lacks, whether the server at it speaks the other one of http and https, names in paths."""

from __future__ import annotations

import re
import socket
import ssl
from urllib.parse import quote

import httpx

from freestep.errors import InvalidSetting, MalformedRequest

__all__ = ["LOCAL", "check_url", "fault_of", "in_path", "other_scheme", "unsendable", "without_password"]

LOCAL = "local"
"""The URL of an optimizer whose run is in its process."""

_PROBE_S = 3.0
"""Seconds for which a probe waits for a server."""
_HTTPS_PORTS = (443, 8443)
_LAST_PORT = 65535


def without_password(url: str) -> str:
    """A URL as it may stand in errors and logs: without what is before its last @."""
    secret, _, rest = url.rpartition("@")
    scheme = re.match("[a-z0-9]+://", secret, re.IGNORECASE)
    return (scheme[0] if scheme else "") + rest


def fault_of(url: str) -> str:
    """What is wrong with a URL that httpx takes for none: its own error may show a part of a password."""
    try:
        httpx.URL(without_password(url))
    except httpx.InvalidURL as error:
        return str(error)
    return "in the name and the password before its last @, all but letters and digits must be %-encoded"


def check_url(url: str) -> str:
    """A service's URL, without a slash at its end.

    Raises:
        InvalidSetting: It is not an http or https URL; the message names the one that was perhaps meant.
    """
    shown = without_password(url)
    if url == LOCAL:
        raise InvalidSetting(f"a run at {LOCAL!r} is in its optimizer's process: a client needs the URL of a service")
    if "://" not in url:
        meant = _with_scheme(shown)
        raise InvalidSetting(f"{shown!r} is not a URL, since it does not begin with http:// or https://{meant}")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise InvalidSetting(f"{shown!r} is not a URL: {fault_of(url)}") from None
    if parsed.scheme not in ("http", "https"):
        raise InvalidSetting(f"{shown!r} is not the URL of a service: it must begin with http:// or https://")
    if not parsed.host:
        raise InvalidSetting(f"{shown!r} is not the URL of a service: it names no host")
    if parsed.port is not None and not 0 < parsed.port <= _LAST_PORT:
        raise InvalidSetting(f"{shown!r} is not the URL of a service: its port must be from 1 to {_LAST_PORT}")
    if parsed.query or parsed.fragment:
        raise InvalidSetting(f"{shown!r} is not the URL of a service: it must end before its '?' or '#'")
    return url.rstrip("/")


def _with_scheme(url: str) -> str:
    """A hint at the URL that was meant, "" if none can be guessed."""
    rest = re.sub(r"^(https?)?:?/*", "", url, flags=re.IGNORECASE)
    try:
        parsed = httpx.URL(f"http://{rest}")
    except httpx.InvalidURL:
        return ""
    if not parsed.host:
        return ""
    scheme = "https" if parsed.port in _HTTPS_PORTS or url.lower().startswith("https") else "http"
    return f": perhaps {scheme}://{rest} is meant"


def other_scheme(url: httpx.URL, error: Exception) -> str | None:
    """The URL with the other scheme, if a request to `url` failed because the server speaks that one; else None.

    Asks the server, unless the error tells that there is none.
    """
    if isinstance(error, httpx.TimeoutException) or not url.host:
        return None
    if url.scheme == "http" and not isinstance(error, httpx.ConnectError):
        speaks, scheme = _speaks_tls(url.host, url.port or 80), "https"
    elif url.scheme == "https" and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        speaks, scheme = _speaks_http(url), "http"
    else:
        return None
    return str(url.copy_with(scheme=scheme, port=url.port or {"https": 80, "http": 443}[scheme])) if speaks else None


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), _PROBE_S) as connected:
            with context.wrap_socket(connected, server_hostname=host):
                return True
    except ssl.SSLError as error:
        # A refusal in the language of TLS, such as one of a client without a certificate.
        return "ALERT" in (error.reason or "")
    except (OSError, UnicodeError):
        return False


def _speaks_http(url: httpx.URL) -> bool:
    try:
        httpx.get(url.copy_with(scheme="http", port=url.port or 443), trust_env=False, timeout=_PROBE_S)
    except httpx.HTTPError:
        return False
    return True


def in_path(name: str) -> str:
    """A name as a segment of a path, in which `.` and `..` stand for themselves. Raises MalformedRequest."""
    try:
        segment = quote(name, safe="")
    except UnicodeEncodeError as error:
        raise unsendable(error) from None
    return segment.replace(".", "%2E") if segment in (".", "..") else segment


def unsendable(error: UnicodeEncodeError) -> MalformedRequest:
    """Says of text that a request cannot have, such as a byte of the command line that is not UTF-8, what it is."""
    # Not all of the text: it may be a whole document.
    return MalformedRequest(f"{error.object[error.start : error.end]!r} cannot be sent: {error.reason}")
