"""The Job that makes Secrets makes those that are not there, over TLS, as the account that it has, and nothing else.

The API server is a stand-in: a real server of https that takes what that takes, and refuses what that refuses.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from chart.rendered import CHART, MATRIX, NAMESPACE, container, manifests, only
from freestep.api.token_form import scope_of
from meanwhile import end

SCRIPT = CHART / "files" / "make_secrets.py"
WANTED = [
    {"name": "tokens", "labels": {"a": "b"}, "keys": {"admin-token": "admin", "push-token": "push"}},
    {"name": "redis", "labels": {}, "keys": {"password": "password"}},
]


class Cluster:
    """The stand-in. `secrets` are those that it has, by name; `allowed` whether the account may make them."""

    def __init__(self, folder: Path) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        self.allowed = True
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == f"/api/v1/namespaces/{NAMESPACE}/secrets"
                name = body["metadata"]["name"]
                if self.headers["Authorization"] != "Bearer account-token":
                    status = 401
                elif not cluster.allowed:
                    status = 403
                elif name in cluster.secrets:
                    status = 409
                else:
                    status = 201
                    cluster.secrets[name] = body
                answer = json.dumps({"kind": "Status", "code": status}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        authority = trustme.CA()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(tls)
        folder.mkdir()
        authority.cert_pem.write_to_path(folder / "ca.crt")
        (folder / "token").write_text("account-token")
        self.account = folder
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def make(self, wanted: object = WANTED, host: str = "localhost") -> subprocess.CompletedProcess[str]:
        """Runs the script as the Job does."""
        return subprocess.run(
            [sys.executable, SCRIPT, f"https://{host}:{self._server.server_port}", NAMESPACE, json.dumps(wanted)],
            env={"FREESTEP_ACCOUNT": str(self.account), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        end(self._thread)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    running = Cluster(tmp_path / "account")
    yield running
    running.close()


def test_secrets_are_made_once(cluster: Cluster) -> None:
    done = cluster.make()
    assert done.returncode == 0, done.stderr
    tokens, redis = cluster.secrets["tokens"], cluster.secrets["redis"]
    assert tokens["metadata"]["labels"] == {"a": "b"} and tokens["type"] == "Opaque"
    for scope in ("admin", "push"):
        assert scope_of(tokens["stringData"][f"{scope}-token"]) == scope
    assert redis["stringData"]["password"].isalnum() and len(redis["stringData"]["password"]) == 64
    said = [*tokens["stringData"].values(), *redis["stringData"].values()]
    assert not any(each in done.stdout + done.stderr for each in said)
    before = json.dumps(cluster.secrets)
    again = cluster.make()
    assert again.returncode == 0 and "is there already" in again.stdout
    assert json.dumps(cluster.secrets) == before


def test_a_refusal_fails_the_job(cluster: Cluster) -> None:
    cluster.allowed = False
    done = cluster.make()
    assert done.returncode == 1 and "tokens cannot be made: 403" in done.stderr
    assert not cluster.secrets


def test_the_account_is_told_to_nobody_else(cluster: Cluster) -> None:
    done = cluster.make(host="127.0.0.1")
    assert done.returncode == 1 and "certificate verify failed" in done.stderr
    assert not cluster.secrets


def test_the_job_asks_for_what_pods_need(cluster: Cluster) -> None:
    """Each key that a rendered pod wants of a Secret is one that the rendered Job makes."""
    found = manifests(MATRIX["several"])
    job = container(MATRIX["several"], "secrets")
    assert only(found, "ConfigMap", "-secrets")["data"] == {SCRIPT.name: SCRIPT.read_text()}
    assert job.spec["command"] == ["python", f"{job.mounts()['scripts']}/{SCRIPT.name}"]
    assert job.environment("", {})["FREESTEP_ACCOUNT"] == job.mounts()["account"]
    api, namespace, wanted = job.spec["args"]
    assert (api, namespace) == ("https://kubernetes.default.svc", NAMESPACE)
    assert cluster.make(json.loads(wanted)).returncode == 0
    for each in cluster.secrets.values():
        # By that, whoever prunes takes them for what the release has left behind.
        assert "app.kubernetes.io/instance" not in each["metadata"]["labels"]
    (rule,) = only(found, "Role", "-secrets")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}
    needed = set()
    for component in ("shards", "redis", "workers", "evaluator", "test", "reshard"):
        each = container(MATRIX["several"], component)
        for volume in each.pod.get("volumes", ()):
            secret = volume.get("secret", {})
            needed |= {(secret["secretName"], item["key"]) for item in secret.get("items", ())}
        for variable in each.variables().values():
            if "secretKeyRef" in variable.get("valueFrom", {}):
                reference = variable["valueFrom"]["secretKeyRef"]
                needed.add((reference["name"], reference["key"]))
    made = {(name, key) for name, body in cluster.secrets.items() for key in body["stringData"]}
    assert needed == made


def test_nothing_is_made_where_all_is_given() -> None:
    assert not any(each["kind"] == "Role" for each in manifests(MATRIX["your own"]))
