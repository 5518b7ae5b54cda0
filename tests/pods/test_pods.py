"""The chart's pods as real containers, through what happens to pods on a cluster: every acknowledged push counts once.

Each test trains a run of durability `journal` and one of durability `checkpoint` with real workers, whose weights say
which examples have counted, and how often. What a crash may cost is said in docs/journal.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import httpx
import pytest

from chart.rendered import NAMESPACE
from harness import AUTHORIZED
from pods.pod import Pod
from pods.release import REDIS, SHARDS, WORKERS, Release
from pods.training import CHECKPOINT, JOURNAL, Told, Training
from pods.workloads import index_of
from upgrade.installed import RELEASED, install

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Train = Callable[..., Training]

CLAIMS = [f"{volume}-{SHARDS}-1" for volume in ("data", "journal")]
"""Those of the second pod."""


def shards(release: Release) -> list[Pod]:
    return release.cluster.of("StatefulSet", SHARDS)


def epochs(training: Training) -> dict[str, int]:
    return {end: training.status(end)["epoch"] for end in (JOURNAL, CHECKPOINT)}


def test_a_first_installation_restarts_nothing(release: Release) -> None:
    first = [pod for pod in release.cluster.every() if pod.owner in (("StatefulSet", SHARDS), ("StatefulSet", REDIS))]
    assert [pod.restarts for pod in first] == [0] * 3, [pod.log() for pod in first]


def test_pods_have_no_privileges_and_reach_each_other(release: Release) -> None:
    for pod in release.cluster.pods:
        assert pod.succeeds("sh", "-c", "test $(id -u) = 10001 && ! touch /probe")
        for line in ("CapBnd:.0*", "NoNewPrivs:.1", "Seccomp:.2"):
            assert pod.succeeds("grep", "--quiet", f"^{line}$", "/proc/self/status"), line
    assert (tested := release.test()).succeeded, tested.log()


def test_workers_are_scaled_out_and_in(release: Release, train: Train) -> None:
    training = train(0)
    for workers in (8, 2):
        training.scale(workers)
        training.go_on()
        alive = {pod.name for pod in training.busy()}
        for end in (JOURNAL, CHECKPOINT):
            # Those that were ended have released theirs, which are good for a minute after a SIGKILL.
            leases = [lease["worker"] for lease in training.status(end)["workers"]]
            assert {name for name in alive for lease in leases if lease.startswith(name)} == alive
            assert len(leases) == workers
    training.finish()


def test_a_job_ends_with_its_run(release: Release, train: Train) -> None:
    training = train(kind="Job", length=300)
    evicted = training.busy()[0]
    assert release.cluster.evict(evicted)
    # Another pod has its index, and all examples are taken.
    release.cluster.wait_ready()
    assert {end: training.counts(end)[1] for end in (JOURNAL, CHECKPOINT)} == {JOURNAL: 300, CHECKPOINT: 300}
    indices = sorted((index_of(pod), list(pod.codes.values())) for pod in training.workers() if pod is not evicted)
    assert indices == [(0, [[0]]), (1, [[0]])]
    assert list(evicted.codes.values()) == [[143]]
    release.upgrade({"workers": {"kind": "Deployment", "replicas": 0}})
    training.finish()


def test_a_job_cuts_a_run_anew(release: Release, train: Train) -> None:
    training = train()
    training.go_on()
    release.upgrade({"reshard": {"run": f"{training.name}-{JOURNAL}", "shards": 3}})
    release.cluster.wait_ready()
    topology = training.ask(JOURNAL, lambda api: api.http.get(api.path("/topology"))).json()
    assert len(topology["shards"]) == 3
    training.go_on()
    # In a new epoch, into which nothing is lost.
    assert epochs(training) == {JOURNAL: 2, CHECKPOINT: 1}
    release.upgrade({"reshard": {"run": "", "shards": 0}})
    training.finish()


def test_a_rolling_restart_loses_no_step(release: Release, train: Train) -> None:
    training = train()
    training.go_on()
    before = shards(release)
    release.upgrade({"shards": {"podAnnotations": {"restarted": training.name}}})
    release.cluster.wait_ready()
    assert not set(map(id, before)) & set(map(id, shards(release)))
    training.go_on()
    assert epochs(training) == {JOURNAL: 1, CHECKPOINT: 1}
    # SIGTERM was enough.
    assert [pod.codes for pod in before] == [{"freestep": [0]}] * 2
    training.finish()


def test_a_new_version_of_the_image_takes_over_the_old_ones_state(release: Release, train: Train) -> None:
    if "FREESTEP_SERVICE_IMAGE" in os.environ:
        pytest.skip("FREESTEP_SERVICE_IMAGE names an image of one version")
    new = release.values["image"]["tag"]
    old = release.cluster.images.service("released", install(RELEASED, "released")).tag
    # 0.1.0 reads no password from a file.
    secret = {"secretKeyRef": {**release.values["redis"]["passwordSecret"], "key": "password"}}
    url = f"redis://:$(REDIS_PASSWORD)@{REDIS}.{NAMESPACE}.svc:6379/0"
    in_url = [{"name": "REDIS_PASSWORD", "valueFrom": secret}, {"name": "FREESTEP_REDIS_URL", "value": url}]
    release.upgrade({"image": {"tag": old}, "shards": {"extraEnv": in_url}})
    release.cluster.wait_ready()
    assert versions(release) == {old}
    training = train()
    training.go_on()
    redis = release.cluster.pod(f"{REDIS}-0")
    release.upgrade({"image": {"tag": new}, "shards": {"extraEnv": []}})
    release.cluster.wait_ready()
    # The store is not in the image; it is moved too when nodes are.
    assert release.cluster.evict(redis)
    redis.wait_gone()
    release.cluster.wait_ready()
    training.go_on()
    assert versions(release) == {new}
    assert epochs(training) == {JOURNAL: 1, CHECKPOINT: 1}
    training.finish()


def versions(release: Release) -> set[str]:
    """The tags that the shards' pods run, and what runs in them is what the tag says."""
    tags = {pod.manifest["spec"]["containers"][0]["image"].rpartition(":")[2] for pod in shards(release)}
    for pod in shards(release):
        is_released = pod.succeeds("sh", "-c", "freestep --version | grep --quiet 0.1.0")
        assert is_released == (tags == {"released"})
    return tags


def test_a_node_is_drained(release: Release, train: Train) -> None:
    training = train(4)
    training.go_on()
    cluster = release.cluster
    node = cluster.pod(f"{SHARDS}-1").node_name
    gone = cluster.drain(node)
    names = {pod.name for pod in gone}
    assert f"{SHARDS}-1" in names and len([pod for pod in gone if pod.owner[1] == WORKERS]) == 2
    for end in (JOURNAL, CHECKPOINT):
        # What the drain has ended holds nothing any more.
        leases = [lease["worker"] for lease in training.status(end)["workers"]]
        assert not [lease for lease in leases for name in names if lease.startswith(name)]
    cluster.wait_ready()
    assert node not in {pod.node_name for pod in cluster.pods}
    cluster.uncordon(node)
    training.go_on()
    assert epochs(training) == {JOURNAL: 1, CHECKPOINT: 1}
    training.finish()


def test_a_pod_whose_node_dies_comes_back_with_its_volume(release: Release, train: Train) -> None:
    training = train()
    training.go_on()
    kept = training.checkpoint(CHECKPOINT)
    training.go_on()
    lost = release.cluster.pod(f"{SHARDS}-1")
    lost.delete(grace_s=0)
    lost.wait_gone()
    newest = training.newest(JOURNAL)
    release.cluster.wait_ready()
    training.go_on()
    assert epochs(training) == {JOURNAL: 1, CHECKPOINT: 2}
    assert training.newest(JOURNAL) > newest
    resumed = min(told for told in training.told(CHECKPOINT) if told.epoch == 2)
    assert resumed.step == kept + 1

    def survives(end: str, told: Told) -> bool:
        return end == JOURNAL or told.epoch == 2 or told.step <= kept

    training.finish(survives)


def test_a_pod_that_is_evicted_needs_no_volume(release: Release, train: Train) -> None:
    training = train()
    training.go_on()
    evicted = release.cluster.pod(f"{SHARDS}-1")
    for claim in CLAIMS:
        release.cluster.claims.lose(claim)
    assert release.cluster.evict(evicted)
    # One at a time.
    assert not release.cluster.evict(release.cluster.pod(f"{SHARDS}-0"))
    evicted.wait_gone()
    release.cluster.wait_ready()
    training.go_on()
    # It left a checkpoint of its last state, where the other one sees it.
    assert epochs(training) == {JOURNAL: 1, CHECKPOINT: 1}
    training.finish()


def test_a_pod_whose_node_dies_with_its_volume_goes_back_to_the_checkpoint(release: Release, train: Train) -> None:
    training = train()
    training.go_on()
    kept = {end: training.checkpoint(end) for end in (JOURNAL, CHECKPOINT)}
    training.go_on()
    lost = release.cluster.pod(f"{SHARDS}-1")
    for claim in CLAIMS:
        release.cluster.claims.lose(claim)
    lost.delete(grace_s=0)
    lost.wait_gone()
    # A run that has lost nothing that was promised goes on by itself. The other one waits for the disk ...
    release.cluster.wait_until(lambda: training.status(CHECKPOINT)["epoch"] == 2)
    release.cluster.wait_until(lambda: f"{training.name}-{JOURNAL}" in problems(release))
    assert training.newest(JOURNAL)[0] == 1
    # ... until it is told that this is gone.
    release.upgrade({"shards": {"settings": {"journal-wait-seconds": 0}}})
    release.cluster.wait_ready()
    training.go_on()
    for end in (JOURNAL, CHECKPOINT):
        assert training.status(end)["epoch"] == 2
        resumed = min(told for told in training.told(end) if told.epoch == 2)
        assert resumed.step == kept[end] + 1
    training.finish(lambda end, told: told.epoch == 2 or told.step <= kept[end])


def problems(release: Release) -> str:
    """What keeps pods from being ready, as they say to who has a token."""
    answers = [httpx.get(f"http://{pod.address}:8000/readyz", headers=AUTHORIZED) for pod in shards(release)]
    return " ".join(answer.text for answer in answers if answer.status_code != 200)
