"""How many connections a service has, over all and from each address.

A place is taken from the moment a connection is accepted. If all are taken, one that is not in use makes room, of the
address that has the most: the oldest that has asked for nothing so far, else the one that has been idle for longest.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Place", "Places", "plain_host"]

_SITE_BITS = 64
"""Of an IPv6 address, those that a single host cannot choose."""


@dataclass
class _Address:
    taken: int = 0
    new: dict[Place, None] = field(default_factory=dict)
    """Places whose connections have made no request, oldest first."""
    idle: dict[Place, None] = field(default_factory=dict)
    """Places whose connections are idle again, the longest so first."""

    def make_room(self) -> bool:
        """Ends a connection that is not in use; False if all are."""
        place = next(iter(self.new or self.idle), None)
        if place is None:
            return False
        place.leave()
        place.end()
        return True


class Places:
    """At most `most` connections, and `most_per_address` from one address."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self.taken = 0
        self._addresses: dict[str, _Address] = {}

    def take(self, host: str) -> Place | None:
        """A place for a connection from a host; None if all are taken and in use."""
        name = _site(host)
        address = self._addresses.get(name)
        if address is not None and address.taken >= self.most_per_address and not address.make_room():
            return None
        if self.taken >= self.most:
            spare = [each for each in self._addresses.values() if each.new or each.idle]
            if not spare or not max(spare, key=lambda each: each.taken).make_room():
                return None
        address = self._addresses.setdefault(name, _Address())
        address.taken += 1
        self.taken += 1
        place = Place(self, name, address)
        address.new[place] = None
        return place

    def _leave(self, name: str, address: _Address) -> None:
        self.taken -= 1
        address.taken -= 1
        if not address.taken:
            del self._addresses[name]


class Place:
    """The place of one connection, given back once; `end` ends the connection."""

    def __init__(self, places: Places, name: str, address: _Address) -> None:
        self._places = places
        self._name = name
        self._address = address
        self._is_taken = True
        self.end: Callable[[], object] = lambda: None

    def idle(self) -> None:
        """No request of the connection is being answered any more."""
        if self._is_taken:
            self._address.idle[self] = None

    def busy(self) -> None:
        """A request is being answered."""
        self._address.new.pop(self, None)
        self._address.idle.pop(self, None)

    def leave(self) -> None:
        """The connection has ended, or is about to; may be called again."""
        if self._is_taken:
            self._is_taken = False
            self.busy()
            self._places._leave(self._name, self._address)


def plain_host(host: str) -> str:
    """A peer's address, of IPv4 as such: a socket that takes both has it as ::ffff:192.0.2.1."""
    if ":" not in host:
        return host
    return str(ipaddress.IPv6Address(host.partition("%")[0]).ipv4_mapped or host)


def _site(host: str) -> str:
    """What stands for a host: all of its address, or of IPv6 the part that says where it is."""
    host = plain_host(host)
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    return str(ipaddress.IPv6Network((int(address), _SITE_BITS), strict=False))
