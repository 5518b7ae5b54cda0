"""Probes of containers, as a kubelet makes them: from the node to the pod's address, or by a program inside."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import httpx

from pods.fields import known

__all__ = ["Probe"]


class Probe:
    """One probe; what it has found is `passed`, `failed`, or neither yet.

    ask: whether the container runs a program, its arguments given, with success.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        address: str,
        port_of: Callable[[str | int], int],
        ask: Callable[[list[str], float], bool],
    ) -> None:
        ways = ("httpGet", "tcpSocket", "exec")
        known(spec, "a probe", *ways, "periodSeconds", "timeoutSeconds", "failureThreshold")
        self._spec = spec
        self._address = address
        self._port_of = port_of
        self._ask = ask
        self._period = spec.get("periodSeconds", 10)
        self._timeout = spec.get("timeoutSeconds", 1)
        self._next = time.monotonic()
        self._failures = 0
        self.passed = False
        self.reason = ""

    @property
    def failed(self) -> bool:
        return self._failures >= self._spec.get("failureThreshold", 3)

    def look(self) -> bool:
        """Probes, if it is time to; whether it was."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._period
        self.passed = self._succeeds()
        self._failures = 0 if self.passed else self._failures + 1
        return True

    def _succeeds(self) -> bool:
        if "exec" in self._spec:
            return self._ask(self._spec["exec"]["command"], self._timeout)
        if "tcpSocket" in self._spec:
            port = self._port_of(self._spec["tcpSocket"]["port"])
            try:
                with closing(socket.create_connection((self._address, port), self._timeout)):
                    return True
            except OSError as error:
                self.reason = str(error)
                return False
        get = self._spec["httpGet"]
        known(get, "httpGet", "path", "port", "scheme")
        url = f"{get['scheme'].lower()}://{self._address}:{self._port_of(get['port'])}{get['path']}"
        try:
            # A kubelet looks at no certificate.
            answer = httpx.get(url, timeout=self._timeout, verify=False)
        except httpx.TransportError as error:
            self.reason = f"{url}: {error}"
            return False
        self.reason = f"{url}: {answer.status_code} {answer.text[:500]}"
        return 200 <= answer.status_code < 400
