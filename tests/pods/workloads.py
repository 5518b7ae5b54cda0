"""What StatefulSets, Deployments and Jobs do next: a function of what they ask for and of the pods that they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pods.fields import Unsupported, known
from pods.pod import Pod

__all__ = ["Next", "index_of", "next_of", "ordinal_of", "revision_of"]


@dataclass
class Next:
    """Pods to make, by their ordinals (None for a Deployment's), and pods to end; what else is done follows later."""

    make: list[int | None] = field(default_factory=list)
    end: list[Pod] = field(default_factory=list)


def revision_of(workload: Mapping[str, Any]) -> str:
    """A word for a workload's template of pods."""
    return hashlib.sha256(json.dumps(workload["spec"]["template"], sort_keys=True).encode()).hexdigest()[:10]


def next_of(workload: Mapping[str, Any], pods: Sequence[Pod]) -> Next:
    """What a workload does next. Raises Unsupported.

    pods: its own; those of which nothing is left are a Job's.
    """
    return {"StatefulSet": _of_stateful_set, "Deployment": _of_deployment, "Job": _of_job}[workload["kind"]](
        workload, pods
    )


def _of_stateful_set(workload: Mapping[str, Any], pods: Sequence[Pod]) -> Next:
    spec = workload["spec"]
    known(
        spec,
        f"StatefulSet {workload['metadata']['name']}",
        *("replicas", "selector", "serviceName", "template", "volumeClaimTemplates", "podManagementPolicy"),
        *("updateStrategy", "persistentVolumeClaimRetentionPolicy"),
    )
    known(spec.get("updateStrategy", {}), "updateStrategy", "type")
    if spec.get("updateStrategy", {}).get("type", "RollingUpdate") != "RollingUpdate":
        raise Unsupported("a StatefulSet that is not updated by itself")
    count = spec.get("replicas", 1)
    by_ordinal = {ordinal_of(pod): pod for pod in pods}
    surplus = [pod for ordinal, pod in by_ordinal.items() if ordinal >= count and not pod.leaving]
    missing = [ordinal for ordinal in range(count) if ordinal not in by_ordinal]
    in_order = spec.get("podManagementPolicy", "OrderedReady") == "OrderedReady"
    if in_order and missing and not all(by_ordinal[below].ready for below in range(missing[0]) if below in by_ordinal):
        missing = []
    todo = Next(make=list(missing[:1] if in_order else missing), end=surplus)
    if in_order and not all(pod.ready for pod in pods):
        # A pod that never becomes ready has to be deleted by hand.
        return todo
    if todo.make or todo.end:
        return todo
    # From the highest ordinal down, each when those above it are ready again.
    for ordinal in sorted(by_ordinal, reverse=True):
        pod = by_ordinal[ordinal]
        if not pod.leaving and pod.revision != revision_of(workload):
            return Next(end=[pod])
        if not pod.ready:
            return todo
    return todo


def _of_deployment(workload: Mapping[str, Any], pods: Sequence[Pod]) -> Next:
    spec = workload["spec"]
    known(spec, f"Deployment {workload['metadata']['name']}", "replicas", "selector", "template", "strategy")
    if spec["strategy"]["type"] != "RollingUpdate":
        raise Unsupported("a Deployment that is recreated")
    count, rolling = spec.get("replicas", 1), spec["strategy"]["rollingUpdate"]
    staying = [pod for pod in pods if not pod.leaving]
    new = [pod for pod in staying if pod.revision == revision_of(workload)]
    old = [pod for pod in staying if pod not in new]
    surge = _part(rolling["maxSurge"], count, up=True)
    unavailable = _part(rolling["maxUnavailable"], count, up=False)
    if surge == unavailable == 0:
        unavailable = 1
    todo = Next(make=[None] * max(0, min(count - len(new), count + surge - len(staying))))
    # Those that are not ready first, then the youngest.
    todo.end += sorted(new, key=lambda pod: pod.ready)[: max(0, len(new) - count)]
    may_go = sum(pod.ready for pod in staying) - (count - unavailable)
    for pod in sorted(old, key=lambda pod: pod.ready):
        if not pod.ready or may_go > 0:
            may_go -= pod.ready
            todo.end.append(pod)
    return todo


def _of_job(workload: Mapping[str, Any], pods: Sequence[Pod]) -> Next:
    """A pod that fails by itself is one too many: nothing is made any more. One that was evicted is made again."""
    spec = workload["spec"]
    known(
        spec,
        f"Job {workload['metadata']['name']}",
        *("backoffLimit", "backoffLimitPerIndex", "completionMode", "completions", "parallelism", "podFailurePolicy"),
        "template",
    )
    if any(pod.failed and not pod.leaving for pod in pods):
        return Next()
    running = [pod for pod in pods if not (pod.succeeded or pod.gone.is_set())]
    taken = [pod for pod in pods if pod.succeeded or pod in running]
    if spec.get("completionMode") != "Indexed":
        return Next(make=[] if taken else [None])
    missing = [index for index in range(spec["completions"]) if index not in map(index_of, taken)]
    return Next(make=list(missing[: max(0, spec["parallelism"] - len(running))]))


def ordinal_of(pod: Pod) -> int:
    """The ordinal of a StatefulSet's pod."""
    return int(pod.labels["apps.kubernetes.io/pod-index"])


def index_of(pod: Pod) -> int:
    """The index of an indexed Job's pod."""
    return int(pod.labels["batch.kubernetes.io/job-completion-index"])


def _part(amount: int | str, count: int, *, up: bool) -> int:
    """A number of pods, or a percentage of all of them."""
    if isinstance(amount, int):
        return amount
    hundredths = int(amount.rstrip("%")) * count
    return -(-hundredths // 100) if up else hundredths // 100
