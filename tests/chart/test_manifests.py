"""What Helm makes of the chart is what several versions of Kubernetes take; values that cannot work are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

import freestep
from chart.custom_resources import SCHEMAS
from chart.rendered import (
    CHART,
    MATRIX,
    NAMESPACE,
    RELEASE,
    ROOT,
    VALUES,
    container,
    containers,
    helm,
    manifests,
    notes,
    only,
)

VERSIONS = ("1.29", "1.32", "1.34", "1.37")
"""Of Kubernetes: the oldest that Chart.yaml allows, and newer ones."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several without Redis": ({"shards": {"replicas": 2}, "checkpoints": {"kind": "shared"}}, "share a Redis"),
    "several with checkpoints of their own": (
        {"shards": {"replicas": 2}, "redis": {"builtin": {"enabled": True}}},
        "set checkpoints.kind to shared or object",
    ),
    "two Redis": ({"redis": {"builtin": {"enabled": True}, "url": "redis://r:6379"}}, "are both set"),
    "a journal without a claim": (
        {
            "shards": {"durability": "journal"},
            "persistence": {"enabled": False},
            "checkpoints": {"kind": "object", "object": {"url": "s3://b/f"}},
        },
        "has to come back with its pod",
    ),
    "checkpoints that go with the pod": ({"persistence": {"enabled": False}}, "would go with the pod"),
    "an object store without a place": ({"checkpoints": {"kind": "object"}}, "set checkpoints.object.url"),
    "a place that is not used": ({"checkpoints": {"object": {"url": "s3://b/f"}}}, "has to be object"),
    "a password in values": ({"redis": {"url": "redis://:secret@r:6379"}}, "would stand in manifests"),
    "a password behind the URL": (
        {"redis": {"url": "redis://r:6379/0?db=1&password=secret"}},
        "would stand in manifests",
    ),
    "a password beside another": (
        {"redis": {"url": "redis://r:6379?password=secret", "passwordSecret": {"name": "r"}}},
        "would stand in manifests",
    ),
    "a password for nobody": ({"redis": {"passwordSecret": {"name": "r"}}}, "set redis.url or redis.builtin.enabled"),
    "a CA without TLS": ({"redis": {"url": "redis://r:6379", "caSecret": {"name": "ca"}}}, "begin with rediss://"),
    "TLS without a certificate": ({"tls": {"enabled": True}}, "set tls.secretName"),
    "a certificate without TLS": ({"tls": {"secretName": "certificate"}}, "set tls.enabled"),
    "workers without an image": ({"workers": {"enabled": True, "run": "r"}}, "set workers.image"),
    "an evaluator without an image": (
        {"evaluator": {"enabled": True}, "workers": {"run": "r"}},
        "set evaluator.image",
    ),
    "workers without a run": ({"workers": {"enabled": True, "image": "w"}}, "workers.run is empty"),
    "scaling without workers": ({"workers": {"autoscaling": {"enabled": True}}}, "set workers.enabled"),
    "scaling of a Job": (
        {"workers": {"enabled": True, "image": "w", "run": "r", "kind": "Job", "autoscaling": {"enabled": True}}},
        "has to be Deployment",
    ),
    "scaling without a Prometheus": (
        {"workers": {"enabled": True, "image": "w", "run": "r", "autoscaling": {"enabled": True}}},
        "set workers.autoscaling.prometheus",
    ),
    "scaling between nothing": (
        {
            "workers": {
                "enabled": True,
                "image": "w",
                "run": "r",
                "autoscaling": {"enabled": True, "prometheus": "http://p", "minReplicas": 9},
            }
        },
        "minReplicas is above maxReplicas",
    ),
    "half of a resharding": ({"reshard": {"run": "r"}}, "both run and shards"),
    "the other half": ({"reshard": {"shards": 3}}, "both run and shards"),
    "metrics without a token": ({"monitoring": {"serviceMonitor": {"enabled": True}}}, "a token of scope read"),
    "a setting of the chart's": ({"shards": {"settings": {"redis-url": "redis://r"}}}, "is set by the chart"),
    "a name that is mistyped": ({"shards": {"replcas": 2}}, "replcas"),
    "less than nothing": ({"shards": {"replicas": -1}}, "replicas"),
    "a variable for a flag": (
        {"shards": {"settings": {"CHECKPOINT_SECONDS": 3}}},
        "at '/shards/settings': additional properties 'CHECKPOINT_SECONDS' not allowed",
    ),
    "a flag that is none": ({"shards": {"settings": {"checkpoint-second": 3}}}, "'checkpoint-second' not allowed"),
    "a flag of two values": ({"shards": {"settings": {"checkpoint-seconds": [3]}}}, "settings/checkpoint-seconds"),
    "an issuer without TLS": ({"oidc": {"issuer": "http://issuer"}}, "issuer"),
    "too little time to end": ({"shards": {"terminationGracePeriodSeconds": 1}}, "terminationGracePeriodSeconds"),
}


@VALUES
def test_helm_finds_nothing_to_object(values: dict[str, Any]) -> None:
    helm()
    from helm_python.chart import lint

    found = lint(CHART, values, strict=True, namespace=NAMESPACE)
    assert not found["errors"]
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]


@VALUES
def test_kubernetes_takes_what_is_rendered(values: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: `make chart`")
    jsonschema = pytest.importorskip("jsonschema")
    found = manifests(values)
    assert len(found) > 5
    for manifest in found:
        schema = SCHEMAS.get(manifest["kind"])
        if schema is not None:
            jsonschema.validate(manifest, schema)
            continue
        for version in VERSIONS:
            assert version in {each.rpartition(".")[0] for each in validate.utils.all_versions()}
            validate.validate(manifest, version, strict=True)


def test_kubeflow_takes_the_runtime_and_its_job() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: `make chart`")
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    runtime, job = yaml.safe_load_all((ROOT / "deploy" / "kubeflow" / "runtime.yaml").read_text())
    for manifest in (runtime, job):
        jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **replicated["template"]["spec"]["template"]}
    for version in VERSIONS:
        validate.validate(pod, version, strict=True)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    # What processes of a DataLoader hand over is there; a container's own is of 64 MB.
    mounted = {each["mountPath"]: each["name"] for each in pod["spec"]["containers"][0]["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    script = pod["spec"]["containers"][0]["command"][-1]
    assert "process_group=True" in (ROOT / script).read_text(), "the group would be as many workers as processes"


@pytest.mark.parametrize(("values", "reason"), REFUSED.values(), ids=REFUSED)
def test_values_that_cannot_work_are_refused_with_a_reason(values: dict[str, Any], reason: str) -> None:
    helm_error = helm().HelmError
    with pytest.raises(helm_error, match=re.escape(reason)):
        manifests(values)


@VALUES
def test_names_fit_together(values: dict[str, Any]) -> None:
    """Selectors select what they are for, claims, accounts and Secrets that are named exist or are asked for, once."""
    found = manifests(values)
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(names) == len(set(names))
    assert {each["metadata"].get("namespace") for each in found} == {NAMESPACE}
    made = set(names)
    labelled = [each.labels for each in containers(found)]

    def selects(selector: dict[str, str], component: str) -> bool:
        hit = {each["app.kubernetes.io/component"] for each in labelled if selector.items() <= each.items()}
        return hit == {component}

    for manifest in found:
        spec = manifest.get("spec", {})
        if manifest["kind"] in ("StatefulSet", "Deployment"):
            component = spec["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
            assert selects(spec["selector"]["matchLabels"], component)
        if manifest["kind"] == "StatefulSet":
            assert ("Service", spec["serviceName"]) in made
            volumes = {each["name"] for each in spec["template"]["spec"].get("volumes", ())}
            assert not volumes & {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", ())}
        if manifest["kind"] == "Service":
            component = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
            assert selects(spec["selector"], "redis" if component == "redis" else "shards")
        if manifest["kind"] == "PodDisruptionBudget":
            assert selects(spec["selector"]["matchLabels"], "shards") and spec["maxUnavailable"] == 1
            assert spec["unhealthyPodEvictionPolicy"] == "IfHealthyBudget"
        if manifest["kind"] == "ScaledObject":
            assert ("Deployment", spec["scaleTargetRef"]["name"]) in made
    for each in containers(found):
        account = each.pod.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in made
        mounted = {mount["name"] for mount in each.spec["volumeMounts"]}
        given = {volume["name"] for volume in each.pod.get("volumes", ())}
        given |= {volume["metadata"]["name"] for volume in each.manifest["spec"].get("volumeClaimTemplates", ())}
        assert mounted == given
        for volume in each.pod.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName", "")
            assert not claim.startswith(RELEASE) or ("PersistentVolumeClaim", claim) in made


def test_each_pod_is_asked_by_whom_it_serves_and_by_nobody_else() -> None:
    found = manifests({**MATRIX["several"], "networkPolicy": {"clients": []}})
    pods = {each.component: each.labels for each in containers(found)}
    policies = [each["spec"] for each in found if each["kind"] == "NetworkPolicy"]

    def selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        listed = all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))
        return listed and selector["matchLabels"].items() <= labels.items()

    reached: dict[str, set[str]] = {}
    for component, labels in pods.items():
        (policy,) = (each for each in policies if selected(each["podSelector"], labels))
        peers = [peer["podSelector"] for rule in policy["ingress"] for peer in rule["from"]]
        reached[component] = {name for name, own in pods.items() if any(selected(peer, own) for peer in peers)}
        named = {
            port["name"]
            for each in containers(found)
            if each.component == component
            for port in each.spec.get("ports", ())
        }
        assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == named
    assert reached.pop("shards") == pods.keys()
    assert reached.pop("redis") == {"shards"}
    assert not any(reached.values())


@VALUES
def test_no_pod_may_do_more_than_it_needs(values: dict[str, Any]) -> None:
    for each in containers(manifests(values)):
        own = each.spec["securityContext"]
        assert each.pod["automountServiceAccountToken"] is False
        # FREESTEP_PORT would be the URL of a Service that is named freestep.
        assert each.pod["enableServiceLinks"] is False
        assert each.pod["securityContext"]["runAsNonRoot"] is True and each.pod["securityContext"]["runAsUser"] > 0
        assert each.pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is (each.component != "workers" or values["workers"].get("kind") != "Job")
        tokens = [
            source["serviceAccountToken"]
            for volume in each.pod.get("volumes", ())
            for source in volume.get("projected", {}).get("sources", ())
            if "serviceAccountToken" in source
        ]
        is_asking_api = each.component in ("secrets", "shards")
        assert all(("audience" not in token) == is_asking_api for token in tokens)
        assert bool(tokens) == (each.component == "secrets" or _by_account(values, each.component))


def _by_account(values: dict[str, Any], component: str) -> bool:
    return bool(values.get("oidc")) and component in ("shards", "workers", "evaluator")


def test_workers_see_no_more_of_the_tokens_than_their_own() -> None:
    found = manifests(MATRIX["several"])
    seen = {
        each.component: {
            item["key"]
            for volume in each.pod.get("volumes", ())
            if volume.get("secret", {}).get("secretName", "").endswith("-tokens")
            for item in volume["secret"]["items"]
        }
        for each in containers(found)
    }
    assert seen == {
        "shards": {"admin-token", "push-token"},
        "reshard": {"admin-token"},
        "workers": {"push-token"},
        "evaluator": {"push-token"},
        "test": {"push-token"},
        "redis": set(),
        "secrets": set(),
    }


def test_shards_alone_have_an_image_for_gpus() -> None:
    values = MATRIX["your own"]
    nodes = {"nodeSelector": {"accelerator": "yes"}, "tolerations": [{"operator": "Exists"}]}
    images = {}
    for each in containers(manifests({**values, "tokens": {}})):
        if each.component != "workers":
            images[each.component] = each.spec["image"].rpartition(":")[2]
            assert nodes.items() <= each.pod.items(), each.component
        assert ("priorityClassName" in each.pod) == ("affinity" in each.pod) == (each.component == "shards")
    own = freestep.__version__
    assert images == {"shards": f"{own}-cuda", "secrets": own, "reshard": own, "test": own}


def test_the_valkey_goes_where_its_values_say() -> None:
    places: dict[str, Any] = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "stores"}],
        "affinity": {"podAffinity": {}},
        "priorityClassName": "high",
    }
    pod = container({"redis": {"builtin": {"enabled": True, **places}}}, "redis").pod
    assert places.items() <= pod.items()
    assert not places.keys() & container(MATRIX["several"], "redis").pod.keys()


@VALUES
def test_what_the_chart_sets_cannot_be_set_beside_it(values: dict[str, Any]) -> None:
    own = {"journal-wait-seconds", "threads", *values.get("shards", {}).get("settings", {})}
    names = container(values, "shards").variables()
    flags = {name.removeprefix("FREESTEP_").lower().replace("_", "-") for name in names if name.startswith("FREESTEP_")}
    # Which no setting of the service is.
    flags -= {"url", "token-file"}
    helm_error = helm().HelmError
    for flag in {*flags, "insecure"} - own:
        with pytest.raises(helm_error, match=f"shards.settings.{flag} is set by the chart"):
            manifests({**values, "shards": {**values.get("shards", {}), "settings": {flag: "x"}}})


@VALUES
def test_notes_name_what_there_is(values: dict[str, Any]) -> None:
    text, found = notes(values), manifests(values)
    shards = only(found, "StatefulSet", "-shards")["metadata"]["name"]
    assert f"exec {shards}-0 -- freestep" in text
    assert ("helm uninstall" in text) == ("tokens" not in values)
    assert ("ca.crt" in text) == ("tls" in values)
    assert "<no value>" not in text


def test_a_prometheus_of_another_namespace_is_let_in_or_missed() -> None:
    reader = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    values = MATRIX["accounts and monitoring"]
    named = {**values, "networkPolicy": {"clients": [reader]}}
    (rule,) = only(manifests(named), "NetworkPolicy", "-shards")["spec"]["ingress"]
    assert reader in rule["from"]
    is_open = {**values, "networkPolicy": {"enabled": False}}
    hints = ["A Prometheus of another namespace" in notes(each) for each in (values, named, is_open, {})]
    assert hints == [True, False, False, False]


def test_clients_outside_the_cluster_are_let_in_or_missed() -> None:
    client = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    elsewhere = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}
    for kind in ("LoadBalancer", "NodePort"):
        values = {"service": {"type": kind}}
        named = {**values, "networkPolicy": {"clients": [client]}}
        (rule,) = only(manifests(named), "NetworkPolicy", "-shards")["spec"]["ingress"]
        assert client in rule["from"]
        of_the_cluster = {**values, "networkPolicy": {"clients": [elsewhere]}}
        is_open = {**values, "networkPolicy": {"enabled": False}}
        hints = ["outside the cluster" in notes(each) for each in (values, of_the_cluster, named, is_open, {})]
        assert hints == [True, True, False, False, False]


def test_a_release_may_have_no_process_for_a_while() -> None:
    values = {**MATRIX["several"], "shards": {**MATRIX["several"]["shards"], "replicas": 0}}
    found = manifests(values)
    assert only(found, "StatefulSet", "-shards")["spec"]["replicas"] == 0
    assert f"{freestep.__version__}: 0 processes" in notes(values)


def test_an_evaluator_is_given_what_a_worker_is() -> None:
    given: dict[str, Any] = {
        "enabled": True,
        "image": "registry.example.org/worker:1",
        "envFrom": [{"secretRef": {"name": "bucket"}}],
        "gpu": {"count": 1},
        "sharedMemory": "2Gi",
        "runAsUser": 1000,
        "readOnlyRootFilesystem": False,
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"a": "b"},
    }
    values = {"workers": {**given, "run": "r"}, "evaluator": given}
    worker, evaluator = (container(values, component) for component in ("workers", "evaluator"))
    own = {"name": "evaluator", "env": [e for e in worker.spec["env"] if e["name"] != "FREESTEP_LEAVE_ON_SIGTERM"]}
    assert evaluator.spec == worker.spec | own
    assert evaluator.pod | {"containers": []} == worker.pod | {"containers": []}
    annotated = evaluator.manifest["spec"]["template"]["metadata"]["annotations"]
    assert annotated == worker.manifest["spec"]["template"]["metadata"]["annotations"] == {"a": "b"}
    assert evaluator.pod["securityContext"]["runAsUser"] == 1000
    assert evaluator.spec["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    "release", ["a" * 53, "training-" + "a" * 22, "freestep-" + "a" * 44, "a-b"], ids=lambda name: str(len(name))
)
def test_two_releases_of_a_namespace_have_nothing_in_common(release: str) -> None:
    values = {**MATRIX["several"], "workers": {**MATRIX["several"]["workers"], "kind": "Job"}}
    one, two = (
        {(each["kind"], each["metadata"]["name"]) for each in manifests(values, release=name)}
        for name in (release, f"{release[:-1]}z")
    )
    assert not one & two
    # Of a StatefulSet's name a label of its pods is made, behind which there is a hash.
    assert all(len(name) <= (52 if kind == "StatefulSet" else 63) for kind, name in one)


@pytest.mark.parametrize("release", ["a.b", "1a"])
def test_a_release_whose_services_could_not_have_its_name_is_refused(release: str) -> None:
    helm_error = helm().HelmError
    with pytest.raises(helm_error, match="set fullnameOverride"):
        manifests({}, release=release)
    assert manifests({"fullnameOverride": "fs"}, release=release)
