"""Redis as it is configured elsewhere: passwords, ACLs, TLS, Sentinel, clusters, servers that refuse writes or load."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from redis import Redis
from redis.exceptions import ResponseError

import forked
from coordination.servers import push_once, redis_server, refusal
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api, persistently, slug
from ports import free_port

pytestmark = pytest.mark.slow

ACL = "on >secret-password ~freestep:* ~{freestep:* &freestep:* +@all -@admin -@dangerous"
"""What a service needs, and not more."""


def test_passwords(start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", "--requirepass", "secret-password") as port:
        for who in ("", ":secret-guess@", "nobody:secret-password@"):
            line = refusal(f"redis://{who}127.0.0.1:{port}", tmp_path)
            assert f"Redis at 127.0.0.1:{port} cannot be used, name its user and password in redis_url" in line
        service = start_service(redis_url=f"redis://:secret-password@127.0.0.1:{port}")
        api = push_once(service, connect)
        # It is changed while the service lives: connections stay, and new ones are refused.
        with Redis(port=port, password="secret-password") as client:
            client.config_set("requirepass", "secret-other")
            client.client_kill_filter(skipme=True, _type="normal")
        wait_until(lambda: api.http.get("/readyz").status_code == 503)
        refused = api.http.get("/readyz")
        assert slug(refused) == "coordinator-unavailable" and "invalid username-password" in refused.json()["detail"]
        with Redis(port=port, password="secret-other") as client:
            client.config_set("requirepass", "secret-password")
        wait_until(lambda: api.http.get("/readyz").status_code == 200)
        service.stop()


def test_users_with_few_permissions(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    with redis_server(tmp_path / "redis") as port, Redis(port=port) as client:
        client.execute_command("ACL", "SETUSER", "worker", *ACL.split())
        client.execute_command("ACL", "SETUSER", "reader", *"on >secret-password ~* +@read +@connection".split())
        client.execute_command("ACL", "SETUSER", "guest", *"on >secret-password ~other:* &* +@all".split())
        for user in ("reader", "guest"):
            line = refusal(f"redis://{user}:secret-password@127.0.0.1:{port}", tmp_path)
            assert "cannot be used, allow its user what is missing, with ACL SETUSER: " in line
        service = start_service(redis_url=f"redis://worker:secret-password@127.0.0.1:{port}")
        api = push_once(service, connect)
        lease = api.lease()
        client.execute_command("ACL", "SETUSER", "worker", "-evalsha", "-eval")
        refused = api.push(lease, 1)
        assert (refused.status_code, slug(refused)) == (503, "coordinator-unavailable")
        assert "permissions" in refused.json()["detail"]
        client.execute_command("ACL", "SETUSER", "worker", "+evalsha", "+eval")
        assert api.push(api.lease(), 1).json()["step"] == 2
        service.stop()


def test_tls(start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path) -> None:
    authority, port = trustme.CA(), free_port()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "redis.pem")
    files = ("--tls-cert-file", f"{tmp_path}/redis.pem", "--tls-key-file", f"{tmp_path}/redis.pem")
    files += ("--tls-ca-cert-file", f"{tmp_path}/ca.pem", "--tls-auth-clients", "no")
    with redis_server(tmp_path / "redis", "--tls-port", str(port), *files):
        line = refusal(f"rediss://127.0.0.1:{port}", tmp_path)
        assert "certificate verify failed" in line
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem"
        service = start_service(redis_url=url)
        push_once(service, connect)
        service.stop()


def test_a_key_of_another_type_is_named_by_readyz(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    with redis_server(tmp_path / "redis") as port, Redis(port=port) as client:
        service = start_service(redis_url=f"redis://127.0.0.1:{port}")
        api = push_once(service, connect)
        client.delete("freestep:nodes")
        client.set("freestep:nodes", "text")
        refused = api.http.put("/v1/runs/another", json=api.spec())
        assert (refused.status_code, slug(refused)) == (503, "coordinator-unavailable")
        assert "WRONGTYPE" in refused.json()["detail"]
        client.delete("freestep:nodes")
        wait_until(lambda: api.http.put("/v1/runs/another", json=api.spec()).status_code == 201)
        service.stop()


def test_a_redis_that_cannot_write_its_snapshot(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    with redis_server(tmp_path / "redis") as port, Redis(port=port) as client:
        service = start_service(redis_url=f"redis://127.0.0.1:{port}")
        api = push_once(service, connect)
        (tmp_path / "redis").rename(tmp_path / "moved")
        shutil.rmtree(tmp_path / "moved")
        client.config_set("save", "1 1")

        def says_so() -> bool:
            answer = api.http.get("/readyz")
            return answer.status_code == 503 and "MISCONF" in answer.json()["detail"]

        wait_until(says_so)
        assert "cannot be used, it refuses what a service needs: MISCONF" in refusal(
            f"redis://127.0.0.1:{port}", tmp_path
        )
        # What is here can be read.
        assert api.http.get(api.path("/parameters")).status_code == 200
        client.config_set("stop-writes-on-bgsave-error", "no")
        wait_until(lambda: api.http.get("/readyz").status_code == 200)
        service.stop()


def test_a_redis_that_comes_to_evict(
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It did not when the service started. What it evicts is noticed, and nothing counts twice."""
    with redis_server(tmp_path / "redis", "--save", "") as port, Redis(port=port) as client:
        service = start_service(redis_url=f"redis://127.0.0.1:{port}")
        api = push_once(service, connect)
        lease = api.lease()
        receipts = [api.push(lease, number, f"key-{number}").json() for number in range(1, 6)]
        before, _ = api.pull()

        def readiness() -> str:
            answer = api.http.get("/readyz")
            return "ready" if answer.status_code == 200 else str(answer.json()["detail"])

        for policy in ("allkeys-lru", "allkeys-random"):
            client.config_set("maxmemory-policy", policy)
            told = f"set its maxmemory-policy to noeviction, it is {policy}"
            wait_until(lambda told=told: told in readiness())  # type: ignore[misc]
            assert caplog.text.count(told) == 1
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 2**20)
        numbers = iter(range(10**6))

        def notices() -> bool:
            client.set(f"other:{next(numbers)}", bytes(2**15))
            return f"run {api.run} is opened again: Redis has lost" in caplog.text

        wait_until(notices, 0.001)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 0)
        wait_until(lambda: readiness() == "ready")
        for number, receipt in enumerate(receipts, 1):
            again = persistently(lambda number=number: api.push(lease, number, f"key-{number}")).json()  # type: ignore[misc]
            assert again == receipt | {"replayed": True}
        after, step = api.pull()
        assert (step, api.status()["epoch"]) == (6, 1)
        assert all(after[name].equal(before[name]) for name in before)
        assert persistently(lambda: api.push(api.lease(), 6, "next")).json()["step"] == 7
        service.stop()


def test_a_redis_that_still_loads(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as port, Redis(port=port) as client:
        client.mset({f"key-{number}": "x" * 4096 for number in range(1000)})
        client.save()
    slow = ("--key-load-delay", "100000", "--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no")
    streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()
    with redis_server(tmp_path / "redis", *slow) as port, Redis(port=port) as client:
        url = f"redis://127.0.0.1:{port}"
        line = refusal(url, tmp_path)
        assert "start the service again when it has loaded its data" in line
        flags = ["--port", "0", "--data-dir", str(tmp_path / "data"), "--redis-url", url]
        patient = forked.start("serve", *flags, "--redis-wait-seconds", "7200", streams=streams)
        try:
            wait_until(lambda: "waiting for at most 7200 s: " in streams[2].read_text())
            client.config_set("key-load-delay", 0)
            wait_until(lambda: "freestep listens on " in streams[1].read_text())
        finally:
            patient.terminate()
            forked.join(patient)


@pytest.fixture
def address() -> Iterator[str]:
    """An address of this machine that is not loopback: one that it has, or one that it is given for the test."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        # Nothing is sent: the system tells from where it would be.
        probe.connect(("203.0.113.1", 9))
        own = str(probe.getsockname()[0])
        if not own.startswith("127."):
            yield own
            return
    given = "198.51.100.1"
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("this machine has no address but loopback, and to give it one takes root and iproute2")
    added = subprocess.run(["ip", "address", "add", f"{given}/32", "dev", "lo"], capture_output=True, text=True)
    if added.returncode != 0:
        pytest.skip(f"this machine has no address but loopback, and may be given none: {added.stderr.strip()}")
    yield given
    subprocess.run(["ip", "address", "delete", f"{given}/32", "dev", "lo"], check=True)


def test_protected_mode(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path, address: str
) -> None:
    with redis_server(tmp_path / "redis", "--bind", "0.0.0.0", "--protected-mode", "yes") as port:
        url = f"redis://{address}:{port}"
        line = refusal(url, tmp_path)
        assert "it is in protected mode: set a password and name it in redis_url, or bind" in line
        # Connections from the machine itself are no others.
        with Redis(port=port) as client:
            client.config_set("protected-mode", "no")
            service = start_service(redis_url=url)
            api = push_once(service, connect)
            client.config_set("protected-mode", "yes")
            client.client_kill_filter(skipme=True, _type="normal")
            wait_until(lambda: api.http.get("/readyz").status_code == 503)
            assert "protected mode" in api.http.get("/readyz").json()["detail"]
            client.config_set("protected-mode", "no")
            wait_until(lambda: api.http.get("/readyz").status_code == 200)
            service.stop()


def test_a_sentinel_is_refused(tmp_path: Path) -> None:
    configuration, port = tmp_path / "sentinel.conf", free_port()
    configuration.write_text("sentinel monitor main 127.0.0.1 1 1\n")
    with redis_server(tmp_path / "redis", str(configuration), "--sentinel", port=port):
        line = refusal(f"redis://127.0.0.1:{port}", tmp_path)
        assert "it is a Sentinel, which keeps nothing: name the server that it watches" in line
        assert "a proxy or a virtual address that follows its primary" in line
    done = forked.freestep(
        "serve", "--port", "0", "--data-dir", f"{tmp_path}/data", "--redis-url", f"redis+sentinel://h:{port}/main"
    )
    assert done.returncode == 2
    assert "is no URL of a Redis server" in done.stderr
    assert "name a proxy or a virtual address that follows the primary" in done.stderr


def test_a_cluster_of_one_node(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    with redis_server(tmp_path / "redis", "--cluster-enabled", "yes") as port, Redis(port=port) as client:
        url = f"redis://127.0.0.1:{port}"
        assert "cannot be used, complete the cluster: " in refusal(url, tmp_path)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=True))
        service = start_service(redis_url=url)
        api = push_once(service, connect)
        with suppress(ResponseError):
            client.script_flush()
        assert api.push(api.lease("again"), 1).json()["step"] == 2
        service.stop()
