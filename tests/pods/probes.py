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
        times = ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold")
        known(spec, "a probe", *ways, *times, "terminationGracePeriodSeconds")
        self._spec = spec
        self._address = address
        self._port_of = port_of
        self._ask = ask
        self._period = spec.get("periodSeconds", 10)
        self._timeout = spec.get("timeoutSeconds", 1)
        self._next = time.monotonic() + spec.get("initialDelaySeconds", 0)
        self._successes = self._failures = 0
        self.reason = ""

    @property
    def passed(self) -> bool:
        return self._successes >= self._spec.get("successThreshold", 1)

    @property
    def failed(self) -> bool:
        return self._failures >= self._spec.get("failureThreshold", 3)

    def look(self) -> bool:
        """Probes, if it is time to; whether it was."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._period
        if self._succeeds():
            self._successes, self._failures = self._successes + 1, 0
        else:
            self._successes, self._failures = 0, self._failures + 1
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
        known(get, "httpGet", "path", "port", "scheme", "httpHeaders")
        url = (
            f"{get.get('scheme', 'HTTP').lower()}://{self._address}:{self._port_of(get['port'])}{get.get('path', '/')}"
        )
        headers = {each["name"]: each["value"] for each in get.get("httpHeaders", [])}
        try:
            # A kubelet looks at no certificate.
            answer = httpx.get(url, headers=headers, timeout=self._timeout, verify=False)
        except httpx.TransportError as error:
            self.reason = f"{url}: {error}"
            return False
        self.reason = f"{url}: {answer.status_code} {answer.text[:500]}"
        return 200 <= answer.status_code < 400
