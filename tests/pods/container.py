"""A container of a pod's: what its manifest says as options of podman's, its process, its probes and its restarts."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from pods.engine import Engine, EngineError
from pods.fields import Unsupported, known
from pods.probes import Probe
from pods.references import expanded, ports_of, quantity

__all__ = ["Container"]

_BACKOFF_S = 1.0
"""Before a container that has ended is started again; a kubelet waits for ten seconds and more."""
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_FIELDS = ("name", "image", "imagePullPolicy", "command", "args", "env", "ports", "resources")
_FIELDS += ("securityContext", "volumeMounts", *_PROBES)


class Container:
    """One container. Belongs to its pod's thread; `ready`, `restarts` and `codes` may be read by others.

    Attributes: ready, whether it takes requests; restarts, how often it was started again; codes, the statuses with
    which its processes have ended; reasons, why they were ended.

    Args:
        pod: The name of the sandbox it runs in, whose address is `address`.
        variables: Its environment.
        mounts: As SOURCE:TARGET:OPTIONS.
        log: The folder of its logs.
        grace_s: Between SIGTERM and SIGKILL.
        restart_policy: "Always", "OnFailure" or "Never".
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        engine: Engine,
        pod: str,
        pod_security: Mapping[str, Any],
        address: str,
        variables: Mapping[str, str],
        mounts: Sequence[str],
        log: Path,
        grace_s: float,
        restart_policy: str,
    ) -> None:
        known(spec, f"the container {spec['name']}", *_FIELDS)
        self.spec = spec
        self.ready = False
        self.restarts = 0
        self.codes: list[int] = []
        self.reasons: list[str] = []
        self._engine = engine
        self._pod = pod
        self._security = {**pod_security, **spec.get("securityContext", {})}
        self._address = address
        self._variables = dict(variables)
        self._mounts = mounts
        self._log = log
        self._grace_s = grace_s
        self._policy = restart_policy
        self._descriptor: int | None = None
        self._probes: dict[str, Probe] = {}
        self._again_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self._pod}-{self.spec['name']}"

    def start(self) -> None:
        """Starts it, or starts it again as a new container. Raises EngineError and Unsupported."""
        self._again_at = None
        with suppress(EngineError):
            self._engine("rm", "--force", "--volumes", self.name)
        self._engine(*self._command())
        self._engine("start", self.name)
        number = int(self._engine("inspect", "--format", "{{.State.Pid}}", self.name))
        with suppress(ProcessLookupError):
            self._descriptor = os.pidfd_open(number) if number else None
        port_of = partial(ports_of, [self.spec])
        self._probes = {
            kind: Probe(self.spec[kind], self._address, port_of, self.succeeds)
            for kind in _PROBES
            if self.spec.get(kind)
        }

    def look(self) -> None:
        """Sees whether it has ended, and probes it, as far as it is time to."""
        if self._again_at is not None:
            if time.monotonic() >= self._again_at:
                self.restarts += 1
                self.start()
            return
        if self.ended:
            self.ready = False
            return
        if not self._running():
            self._collect()
            if self._policy == "Always" or (self._policy == "OnFailure" and self.codes[-1] != 0):
                self._again_at = time.monotonic() + _BACKOFF_S
            return
        self._probe()

    @property
    def ended(self) -> bool:
        """Whether it has ended and is not started again."""
        return self._again_at is None and len(self.codes) > self.restarts

    def succeeds(self, command: list[str], timeout_s: float) -> bool:
        """Whether a program in it ends with 0 in time, after which it is killed."""
        try:
            self._engine("exec", self.name, "timeout", "-s", "KILL", f"{timeout_s:g}", *command, waits_s=timeout_s)
        except (EngineError, TimeoutExpired):
            return False
        return True

    def stop(self, grace_s: float) -> None:
        """SIGTERM, or the image's signal; then SIGKILL."""
        if not self.ended and self._again_at is None:
            signal = ("kill", "--signal", "KILL") if grace_s == 0 else ("stop", "--time", str(round(grace_s)))
            with suppress(EngineError):
                self._engine(*signal, self.name, waits_s=grace_s)
            self._collect()

    def _running(self) -> bool:
        if self._descriptor is None:
            return False
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return not poll.poll(0)

    def _collect(self) -> None:
        """Takes note of the status that it has ended with."""
        self.ready = False
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.codes.append(int(self._engine("wait", self.name)))

    def _probe(self) -> None:
        startup = self._probes.get("startupProbe")
        if startup is not None and not startup.passed:
            startup.look()
            if startup.failed:
                self._give_up("startupProbe", startup)
            return
        readiness = self._probes.get("readinessProbe")
        if readiness is None:
            self.ready = True
        elif readiness.look():
            self.ready = readiness.passed or (self.ready and not readiness.failed)
        liveness = self._probes.get("livenessProbe")
        if liveness is not None and liveness.look() and liveness.failed:
            self._give_up("livenessProbe", liveness)

    def _give_up(self, kind: str, probe: Probe) -> None:
        self.reasons.append(f"{kind}: {probe.reason}")
        self.stop(self._grace_s)
        if self._policy != "Never":
            self._again_at = time.monotonic() + _BACKOFF_S

    def _command(self) -> list[str]:
        spec = self.spec
        log = self._log / f"{self.name}.{self.restarts}.log"
        # A kubelet has its own probes, and does not look at an image's.
        command = ["create", "--name", self.name, "--pod", self._pod, "--pull", "never", "--no-healthcheck"]
        command += ["--log-driver", "k8s-file", "--log-opt", f"path={log}"]
        command += [*self._security_options(), *self._resource_options()]
        for name, value in self._variables.items():
            command += ["--env", f"{name}={value}"]
        for mount in self._mounts:
            command += ["--volume", mount]
        if "command" in spec:
            command += ["--entrypoint", json.dumps([expanded(each, self._variables) for each in spec["command"]])]
        return [*command, spec["image"], *(expanded(each, self._variables) for each in spec.get("args", []))]

    def _security_options(self) -> list[str]:
        given = self._security
        whole_pods = ("fsGroup", "fsGroupChangePolicy")
        user = ("runAsUser", "runAsGroup", "runAsNonRoot")
        rest = ("readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities", "seccompProfile")
        known(given, f"securityContext of {self.spec['name']}", *whole_pods, *user, *rest)
        options = []
        if "runAsUser" in given:
            options += ["--user", ":".join(str(given[each]) for each in user[:2] if each in given)]
        if given.get("runAsNonRoot") and self._user() in ("", "0", "root"):
            raise Unsupported(f"{self.spec['name']} is not to run as root, and does")
        if "fsGroup" in given:
            options += ["--group-add", str(given["fsGroup"])]
        if given.get("readOnlyRootFilesystem"):
            options += ["--read-only", "--read-only-tmpfs=false"]
        if given.get("allowPrivilegeEscalation") is False:
            options += ["--security-opt", "no-new-privileges"]
        known(given.get("capabilities", {}), "capabilities", "drop")
        for capability in given.get("capabilities", {}).get("drop", []):
            options += ["--cap-drop", capability]
        profile = given.get("seccompProfile", {"type": "Unconfined"})
        # Podman has RuntimeDefault unless it is told otherwise.
        if profile["type"] == "Unconfined":
            options += ["--security-opt", "seccomp=unconfined"]
        elif profile["type"] != "RuntimeDefault":
            raise Unsupported(f"the seccomp profile {profile['type']}")
        return options

    def _user(self) -> str:
        """Whom the container runs as, without the group."""
        if "runAsUser" in self._security:
            return str(self._security["runAsUser"])
        return self._engine("image", "inspect", "--format", "{{.Config.User}}", self.spec["image"]).partition(":")[0]

    def _resource_options(self) -> list[str]:
        options = []
        for name, amount in self.spec.get("resources", {}).get("limits", {}).items():
            if name == "memory":
                options += ["--memory", str(int(quantity(amount)))]
            elif name == "cpu":
                options += ["--cpus", str(quantity(amount))]
            else:
                raise Unsupported(f"{self.spec['name']} asks for {name}")
        return options
