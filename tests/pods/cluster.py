"""A cluster of containers on this machine: what a control plane does with the manifests that it is given.

It keeps StatefulSets, Deployments and Jobs at what they ask for, rolls templates out, places pods on named nodes,
drains these within the bounds of PodDisruptionBudgets, and answers names of Services. docs/development.md says what it
is not.
"""

from __future__ import annotations

import copy
import inspect
import ipaddress
import itertools
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from chart.rendered import NAMESPACE
from meanwhile import DEADLINE_S, wait_until
from pods.engine import Engine, EngineError, Unavailable
from pods.fields import Unsupported, known
from pods.images import Images
from pods.names import NameServer
from pods.pod import Node, Pod
from pods.references import ports_of, selected
from pods.volumes import Claims
from pods.workloads import Next, next_of, revision_of

__all__ = ["Cluster"]

_PREFIX = "freestep-tests"
_DOMAIN = "cluster.local"
_LOOK_S = 0.1
_FIRST_ADDRESS = 10
_SHOWN = 12
"""Pods whose logs a failure shows."""
_WORKLOADS = ("StatefulSet", "Deployment", "Job")
_READ = ("Service", "Secret", "PersistentVolumeClaim", "PodDisruptionBudget", *_WORKLOADS)
_KEPT = ("ServiceAccount", "NetworkPolicy")
"""Kinds that nothing here acts upon."""


class Cluster:
    """`close` ends and removes all of it. Raises Unavailable where this machine cannot run containers.

    nodes: their names.
    """

    def __init__(self, folder: Path, nodes: Sequence[str] = ("node-a", "node-b")) -> None:
        self.objects: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.pods: list[Pod] = []
        """Those of which something is left."""
        self._past: list[Pod] = []
        self.claims = Claims(folder / "claims")
        self._mark = f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
        self._engine = Engine(folder)
        self.images = Images(self._engine, self._mark, folder)
        self._schedulable = dict.fromkeys(nodes, True)
        self._lock = threading.RLock()
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._names: NameServer | None = None
        try:
            self._remove_leftovers()
            self._engine("network", "create", "--disable-dns", self._mark)
            subnet = json.loads(self._engine("network", "inspect", self._mark))[0]["subnets"][0]
            self._addresses = _addresses(subnet["subnet"])
            self._names = NameServer(subnet["gateway"], self._addresses_of)
            domains = (f"{NAMESPACE}.svc.{_DOMAIN}", f"svc.{_DOMAIN}", _DOMAIN)
            mounts, resolver = self.images.mounts, subnet["gateway"]
            self._node = Node(self._engine, self._mark, folder, self.claims, mounts, resolver, domains)
            self._try_out()
        except (EngineError, OSError, Unavailable) as error:
            self._remove()
            raise Unavailable(f"containers cannot be run here: {error}") from error
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()

    def apply(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Has the cluster become what manifests say; what they no longer name is deleted, claims excepted.

        Raises Unsupported for what would be passed over.
        """
        given = {(each["kind"], each["metadata"]["name"]): copy.deepcopy(dict(each)) for each in documents}
        for kind, name in given:
            if kind not in (*_READ, *_KEPT):
                raise Unsupported(f"{kind} {name}: nothing here knows this kind")
        with self._lock:
            self.objects = dict(given)

    def wait_until(self, condition: Callable[[], bool], deadline_s: float = 2 * DEADLINE_S) -> None:
        """As `meanwhile.wait_until`; raises what a part of the cluster has failed with."""

        def is_so() -> bool:
            self.check()
            return condition()

        try:
            wait_until(is_so, deadline_s=deadline_s)
        except TimeoutError as error:
            state = "\n".join(each.log() for each in self.every()[-_SHOWN:])
            raise TimeoutError(
                f"not so after {deadline_s:g} s: {inspect.getsource(condition).strip()}\n{state}"
            ) from error

    def check(self) -> None:
        """Raises what a part of the cluster has failed with."""
        if self._failure is not None:
            raise self._failure
        for pod in self.every():
            if pod.failure is not None:
                raise pod.failure

    def wait_ready(self) -> None:
        """Returns when every workload has the pods that it asks for, of its newest template, and all are ready."""
        self.wait_until(self._is_ready)

    def of(self, kind: str, name: str) -> list[Pod]:
        """A workload's pods that stay, by their names."""
        pods = [pod for pod in self.pods if pod.owner == (kind, name) and not pod.leaving]
        return sorted(pods, key=lambda pod: pod.name)

    def every(self) -> list[Pod]:
        """All pods that there have been, and are."""
        with self._lock:
            return [*self._past, *self.pods]

    def pod(self, name: str) -> Pod:
        """The pod of a name that stays. Raises KeyError."""
        for pod in self.pods:
            if pod.name == name and not pod.leaving:
                return pod
        raise KeyError(name)

    def evict(self, pod: Pod) -> bool:
        """Ends a pod in order, if its PodDisruptionBudgets allow that; whether they do."""
        with self._lock:
            budgets = [each for (kind, _), each in self.objects.items() if kind == "PodDisruptionBudget"]
            for budget in budgets:
                if selected(pod.labels, budget["spec"]["selector"]) and not self._allows(budget, pod):
                    return False
            pod.delete()
            return True

    def drain(self, node: str) -> list[Pod]:
        """Evicts all pods of a node, which takes none until `uncordon`; returns them, of which nothing is left."""
        self._schedulable[node] = False
        evicted = []
        for pod in [each for each in self.pods if each.node_name == node]:
            self.wait_until(lambda pod=pod: pod.leaving or self.evict(pod))  # type: ignore[misc]
            evicted.append(pod)
        for pod in evicted:
            pod.wait_gone()
        return evicted

    def run(self, manifest: Mapping[str, Any]) -> Pod:
        """Runs a pod of no workload until it has ended; returns it, of which the log is left."""
        with self._lock:
            pod = self._start(copy.deepcopy(dict(manifest)), ("Pod", manifest["metadata"]["name"]), "")
        self.wait_until(lambda: pod.succeeded or pod.failed)
        pod.delete()
        pod.wait_gone()
        return pod

    def uncordon(self, node: str) -> None:
        self._schedulable[node] = True

    def close(self) -> None:
        self._closing.set()
        self._thread.join(DEADLINE_S)
        for pod in self.pods:
            pod.delete(grace_s=0)
        for pod in self.pods:
            pod.gone.wait(DEADLINE_S)
        self._remove()

    def _remove(self) -> None:
        if self._names is not None:
            self._names.close()
        with suppress(EngineError):
            for name in self._engine("pod", "ps", "--filter", f"name={self._mark}", "--format", "{{.Name}}").split():
                self._engine("pod", "rm", "--force", "--time", "0", name)
        for remove in (lambda: self._engine("network", "rm", "--force", self._mark), self.images.close):
            with suppress(EngineError):
                remove()

    def _remove_leftovers(self) -> None:
        """Removes what clusters have left that were killed with their process."""
        kinds = (
            (("pod", "ps", "--format", "{{.Name}}"), ("pod", "rm", "--force", "--time", "0")),
            (("network", "ls", "--format", "{{.Name}}"), ("network", "rm", "--force")),
            (("image", "ls", "--format", "{{.Repository}}:{{.Tag}}"), ("image", "rm", "--force")),
        )
        for shown, removed in kinds:
            for name in self._engine(*shown).split():
                found = re.match(rf"(?:localhost/)?{_PREFIX}-(\d+)-", name)
                if found and not Path("/proc", found[1]).exists():
                    with suppress(EngineError):
                        self._engine(*removed, name)

    def _try_out(self) -> None:
        """Raises EngineError where a container cannot run."""
        image = self.images.valkey()
        mounts = [option for each in image.mounts for option in ("--volume", each)]
        self._engine("run", "--rm", "--network", self._mark, *mounts, image.name, "valkey-server", "--version")

    def _control(self) -> None:
        try:
            while not self._closing.wait(_LOOK_S):
                with self._lock:
                    self._reconcile()
        except BaseException as error:
            self._failure = error

    def _reconcile(self) -> None:
        self._past += [pod for pod in self.pods if pod.gone.is_set()]
        self.pods = [pod for pod in self.pods if not pod.gone.is_set()]
        for kind, name in {pod.owner for pod in self.pods}:
            if kind in _WORKLOADS and (kind, name) not in self.objects:
                self._do(Next(end=[pod for pod in self.pods if pod.owner == (kind, name) and not pod.leaving]), {})
        for (kind, _), workload in self.objects.items():
            if kind in _WORKLOADS:
                self._do(next_of(workload, self._own(workload)), workload)

    def _own(self, workload: Mapping[str, Any]) -> list[Pod]:
        """A workload's pods; of a Job also those that have ended."""
        owner = workload["kind"], workload["metadata"]["name"]
        return [pod for pod in [*(self._past if owner[0] == "Job" else ()), *self.pods] if pod.owner == owner]

    def _do(self, todo: Next, workload: Mapping[str, Any]) -> None:
        for pod in todo.end:
            pod.delete()
        for ordinal in todo.make:
            self._make(workload, ordinal)

    def _make(self, workload: Mapping[str, Any], ordinal: int | None) -> None:
        kind, name, revision = workload["kind"], workload["metadata"]["name"], revision_of(workload)
        template = copy.deepcopy(workload["spec"]["template"])
        spec, metadata = template["spec"], template.setdefault("metadata", {})
        labels = metadata.setdefault("labels", {})
        metadata["namespace"] = NAMESPACE
        metadata["uid"] = secrets.token_hex(8)
        end = secrets.token_hex(3)[:5]
        if kind == "StatefulSet":
            metadata["name"] = spec["hostname"] = f"{name}-{ordinal}"
            spec["subdomain"] = workload["spec"].get("serviceName", "")
            labels |= {"statefulset.kubernetes.io/pod-name": metadata["name"]}
            labels |= {"apps.kubernetes.io/pod-index": str(ordinal)}
            for claim in workload["spec"].get("volumeClaimTemplates", []):
                own = {"claimName": f"{claim['metadata']['name']}-{metadata['name']}"}
                spec.setdefault("volumes", []).append({"name": claim["metadata"]["name"], "persistentVolumeClaim": own})
        elif kind == "Deployment":
            metadata["name"] = f"{name}-{revision}-{end}"
        elif ordinal is None:
            metadata["name"] = f"{name}-{end}"
        else:
            metadata["name"], spec["hostname"] = f"{name}-{ordinal}-{end}", f"{name}-{ordinal}"
            labels |= {"batch.kubernetes.io/job-completion-index": str(ordinal)}
            for container in spec["containers"]:
                index = {"name": "JOB_COMPLETION_INDEX", "value": str(ordinal)}
                container.setdefault("env", []).append(index)
        self._start(template, (kind, name), revision)

    def _start(self, manifest: dict[str, Any], owner: tuple[str, str], revision: str) -> Pod:
        manifest["spec"]["nodeName"] = self._node_for(owner)
        address = next(self._addresses)
        pod = Pod(manifest, owner, revision, self._node, address, self.objects, self._links())
        self.pods.append(pod)
        return pod

    def _node_for(self, owner: tuple[str, str]) -> str:
        """The node that takes pods and has fewest of this owner's."""
        own = [pod.node_name for pod in self.pods if pod.owner == owner and not pod.leaving]
        return min((node for node, takes in self._schedulable.items() if takes), key=own.count)

    def _links(self) -> dict[str, str]:
        """The variables that a container gets for each Service that has an address of its own, as links of Docker's."""
        found = {}
        for (kind, name), service in self.objects.items():
            if kind == "Service" and service["spec"].get("clusterIP") != "None":
                word = name.upper().replace("-", "_")
                port = service["spec"]["ports"][0]["port"]
                found |= {f"{word}_SERVICE_HOST": name, f"{word}_SERVICE_PORT": str(port)}
                found[f"{word}_PORT"] = f"tcp://{name}:{port}"
        return found

    def _allows(self, budget: Mapping[str, Any], pod: Pod) -> bool:
        spec = budget["spec"]
        known(spec, "PodDisruptionBudget", "selector", "maxUnavailable", "unhealthyPodEvictionPolicy")
        if spec["unhealthyPodEvictionPolicy"] != "IfHealthyBudget":
            raise Unsupported("evictions of pods that are not ready")
        (workload,) = {each.owner for each in self.pods if selected(each.labels, spec["selector"])}
        expected = self.objects[workload]["spec"].get("replicas", 1)
        healthy = sum(each.ready for each in self.pods if selected(each.labels, spec["selector"]) and each is not pod)
        return bool(healthy >= expected - spec["maxUnavailable"])

    def _is_ready(self) -> bool:
        with self._lock:
            for (kind, _), workload in self.objects.items():
                if kind not in _WORKLOADS:
                    continue
                pods, revision = self._own(workload), revision_of(workload)
                if kind == "Job":
                    wanted = workload["spec"].get("completions", 1)
                    if sum(pod.succeeded for pod in pods) < wanted:
                        return False
                    continue
                current = [pod for pod in pods if pod.ready and pod.revision == revision]
                if not len(pods) == len(current) == workload["spec"].get("replicas", 1):
                    return False
            return True

    def _addresses_of(self, name: str) -> list[str] | None:
        """The addresses that a name leads to, as CoreDNS answers; None if it is no name of a Service's."""
        own = f".{NAMESPACE}.svc.{_DOMAIN}"
        if not name.endswith(own):
            return None
        *pod_name, service_name = name.removesuffix(own).split(".")
        with self._lock:
            service = self.objects.get(("Service", service_name))
            if service is None or len(pod_name) > 1:
                return None
            spec = service["spec"]
            early = spec.get("publishNotReadyAddresses", False)
            behind = [pod for pod in self.pods if selected(pod.labels, spec["selector"]) and (pod.ready or early)]
            if pod_name:
                behind = [
                    pod
                    for pod in behind
                    if pod.manifest["spec"].get("hostname") == pod_name[0]
                    and pod.manifest["spec"].get("subdomain") == service_name
                ]
                return [pod.address for pod in behind] or None
            for pod in behind:
                self._look_at_ports(service, pod)
            return [pod.address for pod in behind]

    def _look_at_ports(self, service: Mapping[str, Any], pod: Pod) -> None:
        """Raises Unsupported where a Service has another port than its pods: there is no proxy between."""
        for port in service["spec"]["ports"]:
            to = ports_of(pod.manifest["spec"]["containers"], port.get("targetPort", port["port"]))
            if to != port["port"]:
                self._failure = Unsupported(f"Service {service['metadata']['name']} leads port {port['port']} to {to}")


def _addresses(subnet: str) -> Iterator[str]:
    """Addresses of a network, each again only after all others."""
    hosts = list(ipaddress.ip_network(subnet).hosts())[_FIRST_ADDRESS:-1]
    return (str(each) for each in itertools.cycle(hosts))
