"""Proxies that the environment names: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, and what NO_PROXY exempts from them.

As for curl, a variable counts in lower case and in upper case, and the host itself is no exception: list localhost and
127.0.0.1 in NO_PROXY. An entry of NO_PROXY is a name, which includes its subdomains, an address, a range of addresses
such as 10.0.0.0/8 or fd00::/8, each perhaps with a port or after a scheme; or `*`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from urllib.request import getproxies

import httpx

from freestep.errors import InvalidSetting
from freestep.service_url import fault_of

__all__ = ["PROXY", "EnvironmentTransport", "Proxies", "Proxy"]

PROXY = "freestep.proxy"
"""The response extension that names the proxy which an answer came through."""

_PORTS = {"http": 80, "https": 443}
_ENTRY = re.compile(r"(?:(?P<scheme>\w+)://)?(?:\[(?P<six>[^\]]+)\]|(?P<name>[^:]+))(?::(?P<port>\d+))?/?")


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the variable that names it. value: the variable's value."""

    variable: str
    value: str

    def __str__(self) -> str:
        # Without the password.
        return f"the proxy {self.value.rpartition('@')[2]!r} of {self.variable}"

    def parsed(self) -> httpx.Proxy:
        """The proxy as httpx takes it. Raises InvalidSetting, which names the variable."""
        url = self.value if "://" in self.value else f"http://{self.value}"
        try:
            proxy = httpx.Proxy(url)
            if not proxy.url.host:
                raise ValueError("it names no host")
        except httpx.InvalidURL:
            raise InvalidSetting(f"{self} cannot be used: {fault_of(url)}") from None
        except ValueError as error:
            raise InvalidSetting(f"{self} cannot be used: {error}") from error
        return proxy


class Proxies:
    """The environment's proxies, as they are when this is made."""

    def __init__(self) -> None:
        found = getproxies()
        self._proxies = {
            kind: Proxy(_variable(kind), found[kind]) for kind in ("http", "https", "all") if found.get(kind)
        }
        self._exempt = [entry for entry in re.split(r"[,\s]+", found.get("no", "")) if entry]

    def find(self, url: httpx.URL) -> Proxy | None:
        """The proxy for a URL; None if it is to be asked directly."""
        proxy = self._proxies.get(url.scheme) or self._proxies.get("all")
        if proxy is None or any(_exempts(entry, url) for entry in self._exempt):
            return None
        return proxy


class EnvironmentTransport(httpx.BaseTransport):
    """Sends each request to its server, or through the proxy that the environment names for its URL.

    Errors of requests through a proxy name it and its variable. In a forked child, a proxy's connections are new ones.

    direct: the transport to servers. through: makes the transport to a proxy, which is done when it is first needed.
    """

    def __init__(self, direct: httpx.BaseTransport, through: Callable[[httpx.Proxy], httpx.BaseTransport]) -> None:
        self.proxies = Proxies()
        self._direct = direct
        self._through = through
        self._made: dict[Proxy, httpx.BaseTransport] = {}
        self._process = os.getpid()

    def transport(self, proxy: Proxy) -> httpx.BaseTransport:
        """The transport to a proxy. Raises InvalidSetting if there can be none."""
        if self._process != os.getpid():
            # The parent goes on using the connections, and its threads may have held the locks of their pools.
            self._made, self._process = {}, os.getpid()
        if (made := self._made.get(proxy)) is None:
            try:
                made = self._through(proxy.parsed())
            except ImportError as error:
                raise InvalidSetting(
                    f"{proxy} cannot be used without the package socksio: pip install socksio, or list the service's "
                    "host in NO_PROXY"
                ) from error
            made = self._made.setdefault(proxy, made)
        return made

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; called by httpx."""
        proxy = self.proxies.find(request.url)
        if proxy is None:
            return self._direct.handle_request(request)
        try:
            response = self.transport(proxy).handle_request(request)
        except httpx.TransportError as error:
            raise type(error)(f"{proxy}: {error}" if str(error) else str(proxy)) from error
        response.extensions[PROXY] = str(proxy)
        return response

    def close(self) -> None:
        """Closes all connections."""
        self._direct.close()
        if self._process == os.getpid():
            for each in self._made.values():
                each.close()


def _variable(kind: str) -> str:
    """The variable that names a kind of proxy, as `getproxies` chooses it."""
    names = [name for name, value in os.environ.items() if value and name.lower() == f"{kind}_proxy"]
    return min(names, key=lambda name: not name.islower(), default="the system's settings")


def _exempts(entry: str, url: httpx.URL) -> bool:
    """Whether an entry of NO_PROXY exempts a URL."""
    if entry == "*":
        return True
    try:
        return ip_address(url.host) in ip_network(entry, strict=False)
    except ValueError:
        pass
    match = _ENTRY.fullmatch(entry)
    if match is None or match["scheme"] not in (None, "all", url.scheme):
        return False
    if match["port"] is not None and int(match["port"]) != (url.port or _PORTS.get(url.scheme)):
        return False
    name = (match["six"] or match["name"]).lower().removeprefix("*").strip(".")
    try:
        return ip_address(url.host) == ip_address(name)
    except ValueError:
        host = url.host.lower().rstrip(".")
        return host == name or host.endswith(f".{name}")
