"""A network of hosts on one machine: network namespaces, and cables between them that are long, lossy and narrow.

Every host has a veth pair to one switch. What it sends is delayed, sometimes lost, and limited in its rate, so each
way between two hosts has the delay once, and a round trip twice. The switch is a bridge, and netem impairs the cables;
where the kernel has no netem, the switch is a process (switch.py) that does the same to every frame.

The namespaces have no names: they end with the last process or descriptor that holds them, and two networks cannot
meet. The cables' ends lie in namespaces too, so the machine's own network, its firewall included, has no part in it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DELAY_MS = 50
"""One way; a round trip takes 100 ms."""
LOSS = 0.01
"""Of the frames, each way."""
RATE_MBIT = 100
"""Of what a host sends."""

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """This machine lacks or forbids something that the network needs."""


class Network:
    """Hosts with these names, with the addresses 10.0.0.1 and so on, and one more to watch them from.

    loss: the share of frames that is lost. delay_ms: milliseconds that a way takes. netem: whether the kernel impairs
    the cables; else the process does. Raises Unavailable.
    """

    def __init__(self, names: list[str], loss: float = LOSS, delay_ms: int = DELAY_MS) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise Unavailable("network namespaces need root on Linux")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise Unavailable(f"{tool} (iproute2) is not installed")
        self.addresses = {name: f"10.0.0.{number}" for number, name in enumerate([*names, "watcher"], 1)}
        self._loss, self.delay_ms = loss, delay_ms
        self._namespaces: dict[str, int] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        try:
            for name in ["switch", *self.addresses]:
                self._namespaces[name] = _new_namespace()
            self._lay_cables()
            self.netem = self._impair(names)
            self._connect(names)
        except BaseException:
            self.close()
            raise

    def _lay_cables(self) -> None:
        for name, address in self.addresses.items():
            # Ports have no addresses, so that no frame is answered but by the hosts.
            self._do("switch", f"ip link add name {name} type veth peer name eth0 netns {self.namespace(name)}")
            self._do("switch", f"ip link set dev {name} addrgenmode none up")
            self._do(name, "ip link set dev lo up")
            self._do(name, f"ip address add {address}/24 dev eth0")
            self._do(name, "ip link set dev eth0 addrgenmode none up")

    def _impair(self, names: list[str]) -> bool:
        netem = f"netem delay {self.delay_ms}ms loss {100 * self._loss:g}% rate {RATE_MBIT}mbit limit 10000"
        try:
            for name in names:
                self._do(name, f"tc qdisc add dev eth0 root {netem}")
        except Unavailable:
            return False
        return True

    def _connect(self, names: list[str]) -> None:
        if self.netem:
            self._do("switch", "ip link add name bridge type bridge")
            self._do("switch", "ip link set dev bridge addrgenmode none up")
            for name in self.addresses:
                self._do("switch", f"ip link set dev {name} master bridge")
            return
        program = str(Path(__file__).with_name("switch.py"))
        impaired = map(str, (self.delay_ms / 1000, self._loss, RATE_MBIT * 1e6))
        command = [sys.executable, program, *impaired, "watcher", *names]
        self._switch = self.start("switch", command, stdout=subprocess.PIPE)
        assert self._switch.stdout is not None
        if self._switch.stdout.readline() != b"up\n":
            raise Unavailable("the kernel has no netem, and raw sockets do not work either")

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Puts this thread in a host's network namespace for the block."""
        with open("/proc/thread-self/ns/net") as back:
            _enter(self._namespaces[name])
            try:
                yield
            finally:
                _enter(back.fileno())

    def namespace(self, name: str) -> str:
        """The path of a host's namespace."""
        return f"/proc/{os.getpid()}/fd/{self._namespaces[name]}"

    def start(self, name: str, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        """Starts a process on a host."""
        with self.inside(name):
            return subprocess.Popen(command, **options)  # type: ignore[call-overload, no-any-return]

    def bytes_of(self, name: str) -> int:
        """The bytes of all frames that a host has sent and received on its cable."""
        with self.inside(name), open("/proc/thread-self/net/dev") as counters:
            (line,) = [line for line in counters if line.strip().startswith("eth0:")]
        fields = line.split(":")[1].split()
        return int(fields[0]) + int(fields[8])

    def cut(self, name: str) -> None:
        """Unplugs a host at the switch: no frame goes to it or comes from it, and no connection is closed."""
        self._do("switch", f"ip link set dev {name} down")

    def heal(self, name: str) -> None:
        """Plugs a host in again, if it is not."""
        self._do("switch", f"ip link set dev {name} up")

    def close(self) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
        for descriptor in self._namespaces.values():
            os.close(descriptor)

    def _do(self, name: str, command: str) -> None:
        with self.inside(name):
            done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"`{command}` failed: {done.stderr.strip()}")


def _new_namespace() -> int:
    """A descriptor of a new network namespace; the calling thread stays where it is."""
    with open("/proc/thread-self/ns/net") as back:
        if _LIBC.unshare(_CLONE_NEWNET):
            raise Unavailable(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _enter(back.fileno())


def _enter(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
