"""A pod and its kubelet: a thread that starts the containers, probes and restarts them, and ends them when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meanwhile import DEADLINE_S
from pods.container import Container
from pods.engine import Engine, EngineError
from pods.fields import known
from pods.references import Objects, environment
from pods.volumes import Claims, Volumes

__all__ = ["Node", "Pod"]

_LOOK_S = 0.1
_GRACE_S = 30.0
_SHOWN = 40
"""Lines of each log that a failure shows."""
_SCHEDULING = ("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName")
_FIELDS = ("containers", "volumes", "hostname", "subdomain", "restartPolicy", "securityContext")
_FIELDS += ("terminationGracePeriodSeconds", "serviceAccountName", "automountServiceAccountToken", "enableServiceLinks")
_FIELDS += ("nodeName", *_SCHEDULING)


@dataclass(frozen=True)
class Node:
    """What kubelets of this machine share.

    Attributes: engine; mark, the name of the network that pods are on, with which their containers' names begin;
    folder, of volumes and logs; claims; mounts, what an image's containers need mounted; resolver, the address of the
    name server, and the domains that it is asked for short names in.
    """

    engine: Engine
    mark: str
    folder: Path
    claims: Claims
    mounts: Callable[[str], Sequence[str]]
    resolver: str
    domains: tuple[str, ...]


class Pod:
    """A pod. It ends by itself when its containers do and are not restarted, or after `delete`.

    Attributes: manifest; owner, kind and name of what it belongs to; address; leaving, whether it is to end; gone, set
    once nothing is left of it; failure, what its thread has failed with; codes, the statuses of its containers'
    processes by container, once it is gone too.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        owner: tuple[str, str],
        revision: str,
        node: Node,
        address: str,
        objects: Objects,
        links: Mapping[str, str],
    ) -> None:
        known(manifest["spec"], f"the pod {manifest['metadata']['name']}", *_FIELDS)
        self.manifest = manifest
        self.owner = owner
        self.revision = revision
        self.address = address
        self.leaving = False
        self.gone = threading.Event()
        self.failure: BaseException | None = None
        self._node = node
        self._objects = objects
        self._links = dict(links) if manifest["spec"].get("enableServiceLinks", True) else {}
        self._grace_s = float(manifest["spec"].get("terminationGracePeriodSeconds", _GRACE_S))
        self._ending = threading.Event()
        self._folder = node.folder / "pods" / f"{self.name}-{address}"
        self._sandbox = f"{node.mark}-{self.name}"
        self._volumes = Volumes(self.manifest, self._folder, node.claims, objects)
        self._containers: list[Container] = []
        self._initialized = False
        self._logs = node.folder / "logs" / f"{self.name}-{address}"
        self._thread = threading.Thread(target=self._live, name=self.name, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def node_name(self) -> str:
        return str(self.manifest["spec"]["nodeName"])

    @property
    def labels(self) -> Mapping[str, str]:
        return self.manifest["metadata"].get("labels", {})

    @property
    def ready(self) -> bool:
        """Whether it takes requests: all containers are ready, and it is not to end."""
        return self._initialized and not self.leaving and all(each.ready for each in self._containers)

    @property
    def succeeded(self) -> bool:
        return self._ended and all(each.codes[-1] == 0 for each in self._containers)

    @property
    def failed(self) -> bool:
        return self._ended and not self.succeeded

    @property
    def _ended(self) -> bool:
        return self._initialized and all(each.ended for each in self._containers)

    @property
    def codes(self) -> dict[str, list[int]]:
        return {each.spec["name"]: each.codes for each in self._containers}

    @property
    def restarts(self) -> int:
        return sum(each.restarts for each in self._containers)

    def succeeds(self, *command: str) -> bool:
        """Whether a program in each of its containers ends with 0."""
        return all(each.succeeds(list(command), DEADLINE_S) for each in self._containers)

    def lines(self) -> list[str]:
        """The whole lines that its containers have printed to their standard outputs, one container after the other."""
        return [line for file in self._log_files() for line in _printed(file, "stdout")]

    def log(self) -> str:
        """The end of what its containers have printed, and why they were restarted, for people."""
        reasons = [f"restarted: {reason}" for each in self._containers for reason in each.reasons]
        texts = ["\n".join(file.read_text(errors="replace").splitlines()[-_SHOWN:]) for file in self._log_files()]
        return "\n".join([f"--- {self.name} at {self.address}, codes {self.codes}", *texts, *reasons])

    def delete(self, grace_s: float | None = None) -> None:
        """Has it end, as its deletion does; with 0 as a lost node does: by SIGKILL."""
        if grace_s is not None:
            self._grace_s = grace_s
        self.leaving = True
        self._ending.set()

    def wait_gone(self) -> None:
        """Returns once nothing is left of it. Raises TimeoutError."""
        if not self.gone.wait(DEADLINE_S):
            raise TimeoutError(f"{self.name} is still there")

    def _live(self) -> None:
        try:
            self._logs.mkdir(parents=True)
            self._start()
            while not self._ending.wait(_LOOK_S):
                for each in self._containers:
                    each.look()
            self._end()
        except BaseException as error:
            self.failure = error
        finally:
            with suppress(EngineError):
                self._node.engine("pod", "rm", "--force", "--time", "0", self._sandbox)
            self._volumes.remove()
            self.gone.set()

    def _start(self) -> None:
        spec = self.manifest["spec"]
        self._volumes.make()
        domains = [option for each in self._node.domains for option in ("--dns-search", each)]
        self._node.engine(
            *("pod", "create", "--name", self._sandbox, "--hostname", spec.get("hostname", self.name)),
            *("--network", self._node.mark, "--ip", self.address),
            *("--dns", self._node.resolver, *domains, "--dns-option", "ndots:5"),
        )
        policy = spec.get("restartPolicy", "Always")
        self._containers = [self._container(each, policy) for each in spec["containers"]]
        for container in self._containers:
            container.start()
        self._initialized = True

    def _container(self, spec: Mapping[str, Any], policy: str) -> Container:
        security = self.manifest["spec"].get("securityContext", {})
        variables = self._links | environment(spec, self.manifest, self._objects)
        mounts = [*self._node.mounts(spec["image"]), *self._volumes.mounts(spec)]
        engine, sandbox = self._node.engine, self._sandbox
        told = (security, self.address, variables, mounts, self._logs, self._grace_s, policy)
        return Container(spec, engine, sandbox, *told)

    def _end(self) -> None:
        threads = [threading.Thread(target=each.stop, args=[self._grace_s]) for each in self._containers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _log_files(self) -> list[Path]:
        return sorted(self._logs.iterdir()) if self._logs.exists() else []


def _printed(file: Path, stream: str) -> list[str]:
    """The whole lines of a container's log that went to a stream."""
    lines, begun = [], ""
    for line in file.read_text(errors="replace").splitlines():
        _, found, part, text = line.split(" ", 3)
        if found == stream:
            begun += text
            if part == "F":
                lines.append(begun)
                begun = ""
    return lines
