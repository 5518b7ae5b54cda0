"""The container files agree with the project and with each other; no engine is needed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from freestep.demo.evaluator import Evaluation

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("service", "worker")
OVERRIDES: tuple[tuple[str, ...], ...] = ((), ("docker-compose.gpu.yml",))


def dockerfile(name: str) -> str:
    return (ROOT / "docker" / f"{name}.Dockerfile").read_text()


def instructions(name: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest), comments and line continuations resolved."""
    lines = "\n".join(line for line in dockerfile(name).splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined if line]


def last(name: str, instruction: str) -> str:
    """What an instruction says in the stage that becomes the image."""
    final = instructions(name)
    starts = [index for index, (word, _) in enumerate(final) if word == "FROM"]
    said = [rest for word, rest in final[starts[-1] :] if word == instruction]
    assert said, f"{name}.Dockerfile's last stage has no {instruction}"
    return said[-1]


def compose(file: str = "docker-compose.yml") -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    document: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return document


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_does_not_run_as_root(name: str) -> None:
    uid, _, gid = last(name, "USER").partition(":")
    assert int(uid) > 0 and int(gid) > 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_states_its_healthcheck(name: str) -> None:
    check = last(name, "HEALTHCHECK")
    assert "healthcheck.py" in check if name == "service" else check == "NONE"


@pytest.mark.parametrize(
    ("listens", "at"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::1", "::1"), ("127.0.0.2", "127.0.0.2")]
)
@pytest.mark.parametrize("status", [200, 503])
def test_the_healthcheck_asks_where_the_service_listens(listens: str, at: str, status: int) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(HTTPServer):
        address_family = socket.AF_INET6 if ":" in at else socket.AF_INET

    try:
        server = Server((at, 0), Ready)
    except OSError as error:
        pytest.skip(f"{at} is no address of this machine: {error}")
    with server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        where = {"FREESTEP_HOST": listens, "FREESTEP_PORT": str(server.server_port)}
        done = subprocess.run(
            [sys.executable, ROOT / "docker" / "healthcheck.py"], env={**os.environ, **where}, check=False
        )
        server.shutdown()
        answering.join()
    assert done.returncode == (status != 200)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_commands_are_in_exec_form(name: str) -> None:
    said = [rest for word, rest in instructions(name) if word in ("ENTRYPOINT", "CMD")]
    assert said and all(rest.startswith("[") for rest in said)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_copied_files_exist_and_pass_the_dockerignore(name: str) -> None:
    passed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in instructions(name):
        if word == "COPY" and "--from=" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in passed, f"{source} is kept from the engine by .dockerignore"


def test_images_share_their_first_stages() -> None:
    """The layer with torch is stored once only while these lines are equal."""
    first, second = (dockerfile(name).partition("# ----\n")[0].splitlines()[2:] for name in DOCKERFILES)
    assert first == second
    assert any("install --no-deps" in line for line in first)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_versions_come_from_the_project(name: str) -> None:
    """No version of a package stands in a Dockerfile; every installation from an index takes constraints.txt."""
    installs = [rest for word, rest in instructions(name) if word == "RUN" and "pip install" in rest]
    assert len(installs) == {"service": 5, "worker": 4}[name]
    for command in installs:
        assert "==" not in command
        assert command.endswith(" .") or "--constraint constraints.txt" in command
    python = re.search(r"^ARG PYTHON=python:(\d+\.\d+)-slim$", dockerfile(name), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python and f"Programming Language :: Python :: {python[1]}" in project["classifiers"]


def test_the_service_brings_a_list_of_its_packages_and_not_what_makes_it() -> None:
    stages = dockerfile("service").split("\nFROM ")
    (made,) = (stage for stage in stages if stage.startswith("client AS sbom"))
    assert "cyclonedx-py environment" in made and "/opt/freestep/bin/python" in made and "-u PIP_PYTHON" in made
    copied = [rest for word, rest in instructions("service") if word == "COPY" and "--from=sbom" in rest]
    assert copied == ["--from=sbom /sbom.cdx.json /opt/freestep/sbom.cdx.json"]
    assert copied[0] in stages[-1]


@pytest.mark.parametrize("extra", [None, "service", "demo", "sbom", "audit"])
def test_requirements_are_the_projects(extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    command = [sys.executable, "docker/requirements.py", *([extra] if extra else [])]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [each for each in wanted if not each.startswith("freestep[")]
    assert printed


def test_compose_builds_from_files_that_exist() -> None:
    for service in compose()["services"].values():
        if build := service.get("build"):
            assert (ROOT / build["context"] / build["dockerfile"]).is_file()


def test_compose_gives_no_container_more_than_it_needs() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        # Our own images have a user that is not root; Redis's has one too, and is told to be it from the beginning.
        assert "build" in service or service["user"] == "redis", name


def test_compose_bounds_what_containers_log() -> None:
    for name, service in compose()["services"].items():
        # The driver's files have no bound by default.
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "10"}}, name


def test_compose_publishes_on_loopback_only() -> None:
    services = compose()["services"]
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(ports) == ["shard"]
    # None is any that is free: two containers of one service cannot publish the same one.
    assert ports["shard"] == ["127.0.0.1:${FREESTEP_PORT:-}:8000"]
    assert compose()["networks"]["store"] == {"internal": True}
    assert [name for name, service in services.items() if "store" in service.get("networks", ())] == ["redis", "shard"]


def test_podman_takes_the_options_of_containers(tmp_path: Path) -> None:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    for name, service in compose()["services"].items():
        options = [f"--log-driver={service['logging']['driver']}", f"--restart={service['restart']}"]
        options += [f"--log-opt={key}={value}" for key, value in service["logging"]["options"].items()]
        options += [f"--publish={port.replace('${FREESTEP_PORT:-}', '')}" for port in service.get("ports", ())]
        command = ["podman", "create", "--quiet", *options, "--rootfs", str(tmp_path), "true"]
        created = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert created.returncode == 0, f"{name}: {created.stderr}"
        subprocess.run(["podman", "rm", created.stdout.strip()], stdout=subprocess.DEVNULL, check=True, timeout=60)


@pytest.mark.parametrize("name", ["shard", "worker"])
def test_compose_lets_services_be_scaled(name: str) -> None:
    service = compose()["services"][name]
    assert "container_name" not in service
    # Each container's own id is the hostname by which the others reach it, and part of a worker's name.
    assert "hostname" not in service and "FREESTEP_ADVERTISE_URL" not in service["environment"]
    assert "FREESTEP_WORKER" not in service["environment"], "two workers of one name would fence each other off"


def test_compose_runs_modules_that_exist() -> None:
    evaluator = compose()["services"]["evaluator"]["command"]
    worker = last("worker", "CMD")
    for module in (evaluator[-1], re.findall(r'"([^"]+)"', worker)[-1]):
        assert (ROOT / "client" / Path(*module.split("."))).with_suffix(".py").is_file(), module


def test_compose_keeps_data_in_declared_volumes() -> None:
    document = compose()
    mounts = {
        name: [mount.split(":")[:2] for mount in service.get("volumes", ())]
        for name, service in document["services"].items()
    }
    assert mounts["redis"] and ["checkpoints", last("service", "VOLUME")] in mounts["shard"]
    assert {volume for each in mounts.values() for volume, _ in each} == set(document["volumes"])


def test_compose_gives_workers_a_push_token_and_nothing_more() -> None:
    services = compose()["services"]
    file = services["shard"]["environment"]["FREESTEP_PUSH_TOKEN_FILE"]
    volume = "push-token:" + str(Path(file).parent)
    assert volume in services["shard"]["volumes"]
    for name in ("worker", "evaluator"):
        assert services[name]["volumes"] == [f"{volume}:ro"]
        assert services[name]["environment"]["FREESTEP_TOKEN_FILE"] == file
    assert any(str(Path(file).parent) in rest.split() for word, rest in instructions("service") if word == "RUN")
    assert "insecure" not in (ROOT / "docker-compose.yml").read_text().lower()


def test_gpu_override_says_that_it_is_untested_and_fits_the_images() -> None:
    assert (ROOT / "docker-compose.gpu.yml").read_text().startswith("# UNTESTED")
    service = compose("docker-compose.gpu.yml")["services"]["shard"]
    for argument in service["build"]["args"]:
        assert f"ARG {argument}=" in dockerfile("service")


def test_survival_knows_the_containers_and_reads_the_evaluator() -> None:
    survive = runpy.run_path(str(ROOT / "docker" / "survive.py"))
    services = compose()["services"]
    assert set(survive["KINDS"]) == set(services)
    assert services["worker"]["environment"]["FREESTEP_RUN"] == survive["RUN"]
    said = Evaluation(0.0, 1, 1234, {"w": 3}, 0.5, 0.25, 1230, 0.9512, 0.2, 0.1, 1234, 0.9, 0.3, 0.2)
    assert survive["EVALUATION"].findall(f"{said}\n") == [("1234", "95.1")]
    assert set(survive["SETTINGS"]) <= set(re.findall(r"\${(\w+)", (ROOT / "docker-compose.yml").read_text()))


@pytest.mark.parametrize("override", OVERRIDES, ids=["plain", "gpu"])
def test_compose_accepts_its_files(override: tuple[str, ...]) -> None:
    if shutil.which("docker-compose"):
        command = ["docker-compose"]
    elif (
        shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        command = ["docker", "compose"]
    else:
        pytest.skip("Docker Compose is not installed")
    for file in ("docker-compose.yml", *override):
        command += ["-f", file]
    checked = subprocess.run([*command, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
