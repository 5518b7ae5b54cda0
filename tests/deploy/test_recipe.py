"""docs/spot-instances.md, followed from its first command to its last, with real services, proxies and workers."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.fronts import NAME, ROOT, front
from deploy.recipe import Machine, Unit, blocks
from freestep import Client
from meanwhile import wait_until
from ports import free_port

WAYS = {"caddy": "Caddy", "nginx": "nginx", "alone": "No proxy"}
SCRIPT = Path(__file__).parent / "spot_worker.py"
UNITS = ROOT / "deploy" / "systemd"


class Fleet:
    """The service's machine, and those of workers."""

    def __init__(self, way: str, folder: Path, tls: tuple[Path, Path], ca_certs: Path, stack: ExitStack) -> None:
        self.way = way
        self._folder = folder
        self._tls = tls
        self._stack = stack
        self.port = free_port()
        self._own_port = free_port()
        self.trust = {"FREESTEP_CA_CERTS": str(ca_certs), "CURL_CA_BUNDLE": str(ca_certs)}
        self.trusted = ssl.create_default_context(cafile=ca_certs)
        self.url = f"https://localhost:{self.port}"
        self.machine = self.new_machine("service")
        self.service: Unit | None = None
        self.blocks = blocks()

    def new_machine(self, name: str) -> Machine:
        machine = Machine(self._folder / name, **self.trust)
        self._stack.callback(machine.close)
        return machine

    def follow(self, heading: str, number: int | None = None, **given: str) -> str:
        """Types the blocks of a section, or one of them; `given` replaces values that the reader has to."""
        printed, chosen = "", self.blocks[heading] if number is None else [self.blocks[heading][number]]
        for name, value in given.items():
            assert any(f"{name}=" in block for block in chosen)
            chosen = [re.sub(rf"\b{name}=\S+", f"{name}={value}", block) for block in chosen]
        for block in chosen:
            block = block.replace("127.0.0.1:8000", f"127.0.0.1:{self._own_port}").replace(
                "$NAME:8443", f"localhost:{self.port}"
            )
            printed += self.machine.type(block.replace("PORT=8443", f"PORT={self.port}"))
            self._obey()
        return printed

    def _obey(self) -> None:
        """Does what systemctl was asked for, once."""
        for line in dict.fromkeys(self.machine.noted()):
            match line.split():
                case ["systemctl", "enable", "--now", "freestep"] | ["systemctl", "start" | "restart", "freestep"]:
                    self.stop_service()
                    self.start_service()
                case ["systemctl", "stop", "freestep"]:
                    self.stop_service()
                case ["systemctl", "restart", "caddy" | "nginx" as kind]:
                    self._start_front(kind)

    def start_service(self) -> None:
        self.service = self.machine.unit("freestep", FREESTEP_PORT=str(self._own_port))
        self._stack.callback(self.service.stop)

    def stop_service(self) -> None:
        if self.service is not None:
            self.service.stop()

    def _start_front(self, kind: str) -> None:
        paths = {"caddy": "/etc/caddy/Caddyfile", "nginx": "/etc/nginx/conf.d/freestep.conf"}
        file = self.machine.file(paths[kind])
        if file.exists():
            text = file.read_text()
            assert f"localhost:{self.port}" in text and NAME not in text
            text = text.replace(f"localhost:{self.port}", NAME)
            made = front(kind, self._folder / kind, self._tls, self.port, upstream=self._own_port, configuration=text)
            self._stack.enter_context(made)

    def is_ready(self) -> bool:
        """As step 1 asks, of a service that may be elsewhere by now."""
        url = self.url if self.way == "alone" else f"http://127.0.0.1:{self._own_port}"
        command = ["curl", "-fsS", f"{url}/readyz"]
        return subprocess.run(command, env={**self.machine.environment}, capture_output=True).returncode == 0

    def client(self, token: str | None = None) -> Client:
        token = token or self.machine.file("/var/lib/freestep/admin-token").read_text().strip()
        return Client(self.url, token=token, verify=self.trusted)


@pytest.fixture(params=WAYS)
def fleet(
    request: pytest.FixtureRequest, tmp_path: Path, certificate: tuple[Path, Path], ca_certs: Path
) -> Iterator[Fleet]:
    if request.param != "alone" and shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    with ExitStack() as stack:
        yield Fleet(request.param, tmp_path, certificate, ca_certs, stack)


class Worker:
    """A spot instance that was given user-data.sh."""

    def __init__(self, fleet: Fleet, name: str, token: str) -> None:
        self.machine = fleet.new_machine(name)
        text = (ROOT / "deploy" / "worker" / "user-data.sh").read_text()
        lines = {"URL": fleet.url, "RUN": "mnist", "TOKEN": token, "SCRIPT": SCRIPT.as_uri()}
        for key, value in lines.items():
            text, count = re.subn(rf"(?m)^{key}=.*$", f"{key}={value}", text)
            assert count == 1, key
        # Once more, as on an image that was made so.
        for _ in range(2):
            self.machine.type(f"(\n{text}\n)")
        assert self.machine.noted()[-1] == "systemctl enable --now freestep-worker"
        assert self.machine.file("/etc/freestep/token").stat().st_mode & 0o777 == 0o600
        self.unit = self.start()

    def start(self) -> Unit:
        """As systemd does when the machine starts, and when the script has failed."""
        self.unit = self.machine.unit("freestep-worker")
        return self.unit

    def pushes(self) -> int:
        assert self.unit.is_alive(), self.unit.log.read_text()
        return self.unit.log.read_text().count("applied")

    def trains(self) -> None:
        """Waits for two pushes more."""
        before = self.pushes()
        wait_until(lambda: self.pushes() >= before + 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_leads_to_a_fleet_that_trains(fleet: Fleet, certificate: tuple[Path, Path]) -> None:
    for name, part in zip(("cert.pem", "key.pem"), certificate, strict=True):
        shutil.copy(part, fleet.machine.clone / name)

    # The service, and TLS.
    fleet.follow("The service", NAME=f"localhost:{fleet.port}")
    fleet.follow(WAYS[fleet.way])
    wait_until(fleet.is_ready)
    fleet.follow("The firewall")

    # A token for the fleet.
    said = fleet.follow("A token for the fleet")
    assert "wrong" not in said and "accepted" in said
    assert "fleet-1" in said
    tokens = {"fleet-1": (fleet.machine.clone / "fleet-1").read_text().strip()}

    # Workers.
    worker, other = (Worker(fleet, name, tokens["fleet-1"]) for name in ("worker-1", "worker-2"))
    worker.trains()
    other.trains()
    said = fleet.follow("Workers")
    assert "sgd_schedule_free" in said
    with fleet.client() as client:
        run = client.run("mnist")
        assert len(run.status().workers) == 2

        # A machine is taken away: with notice, and without.
        other.unit.stop()
        assert len(run.status().workers) == 1
        worker.unit.kill()
        wait_until(lambda: not run.status().workers)
        step = run.status().step
        assert run.pull("x")[1] == step
        worker.start()
        worker.trains()
        assert run.status().step > step

        # Another token.
        fleet.follow("Another token, under way", 0)
        fleet.machine.type(f"WORKERS=one\nexport SSH_FROM={fleet.machine.folder} SSH_TO={worker.machine.folder}")
        fleet.follow("Another token, under way", 1)
        tokens["fleet-2"] = (fleet.machine.clone / "fleet-2").read_text().strip()
        assert worker.machine.file("/etc/freestep/token").read_text().strip() == tokens["fleet-2"]
        ids = {token.name: token.id for token in client.tokens()}
        fleet.follow("Another token, under way", 2, ID=ids["fleet-1"])
        assert "fleet-1" not in {token.name for token in client.tokens()}
        worker.trains()

        # A backup, which another machine goes on from.
        kept = run.status().step
        fleet.follow("Backups and disk", 0)
    worker.unit.stop()
    fleet.stop_service()
    audited = fleet.machine.file("/var/lib/freestep/audit.jsonl").read_text()
    assert "create_token" in audited and "revoke_token" in audited
    shutil.rmtree(fleet.machine.file("/var/lib/freestep"))
    fleet.machine.file("/var/lib/freestep").mkdir()
    fleet.start_service()
    wait_until(fleet.is_ready)
    fleet.follow("Backups and disk", 1)
    wait_until(fleet.is_ready)
    worker.start()
    fleet.follow("Backups and disk", 2)
    with fleet.client() as client:
        assert client.run("mnist").status().step >= kept
    worker.trains()
    worker.unit.stop()
