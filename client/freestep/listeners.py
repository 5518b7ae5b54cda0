"""Who listens where a URL leads to: on Linux the kernel tells it of the sockets of this machine."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["is_users_own", "leads_here"]

logger = logging.getLogger("freestep")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""The TCP sockets of this network namespace, a line each: proc_pid_net(5)."""
_LISTEN = "0A"
_LOOPBACK: dict[int, _Address] = {4: ipaddress.IPv4Address("127.0.0.1"), 6: ipaddress.IPv6Address("::1")}
_ROOT = 0


def is_users_own(host: str, port: int) -> bool:
    """Whether what a request to this place reaches is a process of this user or of root, as far as can be told.

    It is not while nobody listens, since whoever comes next may be anybody. It cannot be told, and is taken for true,
    of other machines, and on systems without Linux's /proc.

    Args:
        host: The host of a URL, without brackets.
        port: Its port.
    """
    meant = {address for address in _addresses(host) if _is_of_this_machine(address)}
    if not meant:
        return True
    try:
        owners = {owner for address, owner in _listening(port) if _takes(address, meant)}
    except OSError:
        return True
    others = owners - {os.geteuid(), _ROOT}
    if others:
        logger.warning(
            "the token that a service left for this user is not sent: port %d of %s is of the user with ID %s",
            port,
            host,
            ", ".join(map(str, sorted(others))),
        )
    return bool(owners) and not others


def leads_here(host: str) -> bool:
    """Whether connections to a host stay on this machine, as far as can be told from its addresses.

    Args:
        host: The host of a URL, without brackets.
    """
    addresses = list(_addresses(host))
    return bool(addresses) and all(map(_is_of_this_machine, addresses))


def _addresses(host: str) -> Iterator[_Address]:
    """The addresses that a connection to a host may be made to."""
    # UnicodeError: it can be no name.
    with suppress(OSError, UnicodeError):
        for *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            address = _plain(ipaddress.ip_address(str(place[0]).partition("%")[0]))
            # A connection to the address of all is one to loopback.
            yield _LOOPBACK[address.version] if address.is_unspecified else address


def _is_of_this_machine(address: _Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False


def _listening(port: int) -> Iterator[tuple[_Address, int]]:
    """Addresses that sockets listen at on a port, and their users. Raises OSError if nobody tells."""
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            if table is _TABLES[0]:
                raise
            # There is no IPv6.
            continue
        for line in lines:
            _, local, _, state, _, _, _, owner, *_ = line.split()
            digits, _, found = local.partition(":")
            if state == _LISTEN and int(found, 16) == port:
                yield _plain(_read(digits)), int(owner)


def _read(digits: str) -> _Address:
    """An address, of words of 32 bits that hold it in the order of the network."""
    words = (int(digits[at : at + 8], 16) for at in range(0, len(digits), 8))
    return ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))


def _takes(listening: _Address, meant: set[_Address]) -> bool:
    """Whether a socket may get connections to one of the addresses: one of :: may be meant for IPv4 as well."""
    if not listening.is_unspecified:
        return listening in meant
    return listening.version == 6 or any(address.version == 4 for address in meant)


def _plain(address: _Address) -> _Address:
    """An address of IPv4 as such, where IPv6 has it as ::ffff:127.0.0.1."""
    return (address.version == 6 and address.ipv4_mapped) or address
