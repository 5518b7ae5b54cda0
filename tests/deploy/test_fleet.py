"""Workers behind a proxy: tokens that are replaced under way, a service that is restarted, and several processes."""

from __future__ import annotations

import os
import ssl
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from deploy.conftest import Site
from deploy.fronts import FRONTS, NAME, ROOT, front
from freestep import Client, Flat, RemoteOptimizer
from freestep.bulk import BulkTransport
from harness import TOKEN, ProcessService, ThreadService, store
from meanwhile import under_way, wait_until
from ports import free_port

NUMEL = 5_000_000
"""20 MB as fp32."""


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "optimizer": {"algorithm": "sgd", "lr": 1.0},
        "aggregation": {"policy": "async"},
        "parameters": [{"name": "w", "shape": [NUMEL]}],
        **changes,
    }


class _LosesAnAnswer(httpx.BaseTransport):
    """Loses the answer to the first push, and calls `then` before it says so."""

    def __init__(self, trusted: ssl.SSLContext, then: Callable[[], None]) -> None:
        self._transport = BulkTransport(trusted)
        self._then: Callable[[], None] | None = then

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._transport.handle_request(request)
        if request.url.path.endswith("/gradients") and self._then is not None:
            assert answer.status_code == 200
            answer.close()
            then, self._then = self._then, None
            then()
            raise httpx.ReadError("lost by the test")
        return answer

    def close(self) -> None:
        self._transport.close()


def test_a_push_that_is_repeated_under_another_token_counts_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file = f"run-{uuid.uuid4().hex[:8]}", tmp_path / "token"
    with site.client(token=TOKEN) as admin:
        old, new = (admin.create_token(f"fleet-{number}", "push", runs="run-*") for number in (1, 2))
        file.write_text(old.token)

        def replace() -> None:
            (tmp_path / "new").write_text(new.token)
            os.replace(tmp_path / "new", file)
            admin.revoke_token(old.id)

        monkeypatch.delenv("FREESTEP_TOKEN")
        monkeypatch.setenv("FREESTEP_TOKEN_FILE", str(file))
        http = httpx.Client(base_url=site.url, transport=_LosesAnAnswer(site.trusted, replace), timeout=60)
        with Client(http=http) as client:
            run = client.run(name)
            run.create(spec())
            run.initialize({"w": torch.zeros(NUMEL)})
            gradient = Flat(run.manifest)
            gradient.vector.fill_(1)
            with run.lease() as lease:
                receipt = run.push(gradient, lease.claim(0))
                assert (receipt.decision, receipt.step, receipt.replayed) == ("applied", 1, True)
                assert run.push(gradient, lease.claim(1)).step == 2
            assert bool((run.pull("y")[0]["w"] == -2).all())
        admin.run(name).delete()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FRONTS)
def test_a_worker_bears_with_a_restart_of_the_service(
    kind: str,
    start_process: Callable[..., ProcessService],
    tmp_path: Path,
    certificate: tuple[Path, Path],
    ca_certs: Path,
) -> None:
    port = free_port()
    service = start_process(advertise_url=f"https://localhost:{port}", trusted_proxies="127.0.0.1")
    with (
        front(kind, tmp_path / "front", certificate, port, upstream=service.port) as made,
        Client(made.url, verify=str(ca_certs)) as client,
    ):
        model = torch.nn.Linear(1000, 1000)
        with RemoteOptimizer(model, client=client, run="restarted", algorithm="sgd", lr=0.5) as opt:

            def step() -> int:
                opt.zero_grad()
                model(torch.ones(1, 1000)).mean().backward()
                opt.step()
                return opt.loaded.step

            assert step() == 1
            service.stop()
            # The proxy answers for the service.
            trusted = ssl.create_default_context(cafile=ca_certs)
            assert httpx.get(f"{made.url}/healthz", verify=trusted).status_code == 502
            stepped = under_way(step)
            service.start()
            # An orderly stop has lost nothing.
            assert stepped.result() >= 1
            assert step() >= 2


@pytest.fixture(params=["paths", "relayed"])
def processes(
    request: pytest.FixtureRequest, tmp_path: Path, certificate: tuple[Path, Path]
) -> Iterator[Callable[[str], tuple[str, list[ThreadService]]]]:
    """Makes two services behind a proxy, as the recipe says: each with a path of its own, or with private addresses."""
    with ExitStack() as stack:

        def make(kind: str) -> tuple[str, list[ThreadService]]:
            port, is_paths = free_port(), request.param == "paths"
            common = {
                "redis_url": stack.enter_context(store("valkey", tmp_path)),
                "checkpoint_url": str(tmp_path / "checkpoints"),
                "trusted_proxies": "127.0.0.1",
                "ca_certs": str(tmp_path / "ca.pem"),
            }
            services = []
            for number in (1, 2):
                own = {"advertise_url": f"https://localhost:{port}/{number}"} if is_paths else {"allowed_hosts": NAME}
                services.append(ThreadService(tmp_path / f"node-{number}", **common, **own))
            stack.callback(ThreadService.stop_all, services)
            ports = [each.settings.port for each in services]
            text = (_by_path if is_paths else _all)(kind, ports)
            made = front(kind, tmp_path / "front", certificate, port, configuration=text)
            return stack.enter_context(made).url, services

        yield make


def _by_path(kind: str, ports: list[int]) -> str:
    """The configuration with a path for each service, the first of which has all other paths too."""
    if kind == "nginx":
        text = (ROOT / "deploy" / "nginx" / "freestep.conf").read_text().replace(":8000", f":{ports[0]}")
        begin, _, rest = text.partition("    location / {\n")
        location, _, end = rest.partition("    }\n")
        made = ""
        for path, port in (("/", ports[0]), *((f"/{number}/", port) for number, port in enumerate(ports, 1))):
            target = f"proxy_pass http://127.0.0.1:{port}/;"
            made += f"    location {path} {{\n{location.replace('proxy_pass http://freestep;', target)}    }}\n"
        return begin + made + end
    text = (ROOT / "deploy" / "caddy" / "Caddyfile").read_text()
    begin, _, rest = text.partition("\treverse_proxy 127.0.0.1:8000 {\n")
    options, _, end = rest.partition("\n\t}\n")
    made = ""
    for path, port in ((f"/{number}/*", port) for number, port in enumerate(ports, 1)):
        made += f"\thandle_path {path} {{\n\treverse_proxy 127.0.0.1:{port} {{\n{options}\n\t}}\n\t}}\n"
    made += f"\thandle {{\n\treverse_proxy 127.0.0.1:{ports[0]} {{\n{options}\n\t}}\n\t}}\n"
    return begin + made + end


def _all(kind: str, ports: list[int]) -> str:
    """The configuration with all services as its upstream."""
    if kind == "nginx":
        text = (ROOT / "deploy" / "nginx" / "freestep.conf").read_text()
        servers = "\n".join(f"    server 127.0.0.1:{port};" for port in ports)
        return text.replace("    server 127.0.0.1:8000;", servers)
    text = (ROOT / "deploy" / "caddy" / "Caddyfile").read_text()
    return text.replace("127.0.0.1:8000", " ".join(f"127.0.0.1:{port}" for port in ports))


@pytest.mark.parametrize("kind", FRONTS)
def test_two_processes_are_behind_one_proxy(
    kind: str,
    processes: Callable[[str], tuple[str, list[ThreadService]]],
    ca_certs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "ca.pem").write_bytes(ca_certs.read_bytes())
    url, services = processes(kind)
    with Client(url, verify=str(ca_certs)) as client:
        run = client.run("sharded")
        run.create(spec(shards=2))
        wait_until(lambda: not run.topology().missing)
        owners = {shard.url for shard in run.topology().shards}
        assert owners == {service.settings.own_url() for service in services}
        run.initialize({"w": torch.zeros(NUMEL)})
        gradient, y = Flat(run.manifest), Flat(run.manifest)
        gradient.vector.fill_(1)
        with run.lease() as lease:
            for step in range(3):
                receipt, pulled = run.exchange(gradient, lease.claim(step), y)
                assert (receipt.step, pulled.step) == (step + 1, step + 1)
                assert bool((y.vector == -(step + 1)).all())
        assert bool((run.pull("x")[0]["w"] == -3).all())
        run.delete()
