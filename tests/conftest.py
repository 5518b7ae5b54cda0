"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme

from freestep_service.storage.media import Storage, open_storage
from harness import ProcessService, ThreadService, store
from plain_calls import Api

torch.set_num_threads(1)
# Processes that tests start get signals as from a terminal, even if whoever started the tests ignores some.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Has clients trust one CA only, also those in processes that tests start: to load certifi's takes each 30 ms."""
    file = Path(tempfile.mkdtemp(prefix="freestep-tests-"), "ca.pem")
    trustme.CA().cert_pem.write_to_path(file)
    os.environ["SSL_CERT_FILE"] = str(file)
    config.add_cleanup(lambda: shutil.rmtree(file.parent))


@pytest.fixture(scope="session")
def shared() -> list[ThreadService]:
    """The services that tests share, one of those that have a store in common."""
    return []


@pytest.fixture(scope="module", autouse=True)
def leave_no_runs(shared: list[ThreadService]) -> Iterator[None]:
    """Deletes what the tests of a module leave on shared services: every run there costs time until the end."""
    yield
    for service in shared:
        service.delete_runs()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, shared: list[ThreadService]) -> Iterator[ThreadService]:
    """A service that tests share; each uses runs of its own."""
    running = ThreadService(tmp_path_factory.mktemp("data"))
    shared.append(running)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Settings of services that speak TLS and trust each other: a certificate for 127.0.0.1, its key and its CA."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files = {name: folder / f"{name}.pem" for name in ("ssl_certfile", "ssl_keyfile", "ca_certs")}
    for number, part in enumerate(certificate.cert_chain_pems):
        part.write_to_path(files["ssl_certfile"], append=number > 0)
    certificate.private_key_pem.write_to_path(files["ssl_keyfile"])
    authority.cert_pem.write_to_path(files["ca_certs"])
    return files


@pytest.fixture(scope="session")
def tls_service(tls: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadService]:
    """A service that speaks TLS, which tests share."""
    running = ThreadService(tmp_path_factory.mktemp("data"), **tls)
    yield running
    running.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., Api]]:
    """Makes plain HTTP callers of runs; their connections end with the test."""
    made: list[Api] = []

    def open_(url: str, *run: str) -> Api:
        made.append(Api(url, *run))
        return made[-1]

    yield open_
    for each in made:
        each.http.close()


@pytest.fixture
def api(service: ThreadService, connect: Callable[..., Api]) -> Iterator[Api]:
    """Plain HTTP calls to a run of the test's own."""
    calls = connect(service.url)
    yield calls
    calls.http.delete(calls.path())


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., ThreadService]]:
    """Starts services in threads, with settings of the test's own; they end with the test."""
    running: list[ThreadService] = []

    def start(data_dir: Path | None = None, **settings: Any) -> ThreadService:
        running.append(ThreadService(data_dir or tmp_path / "data", **settings))
        return running[-1]

    yield start
    ThreadService.stop_all(running)


@pytest.fixture(scope="session")
def shared_nodes(
    tmp_path_factory: pytest.TempPathFactory, shared: list[ThreadService]
) -> Iterator[Callable[..., list[ThreadService]]]:
    """Services that have a store and their runs in common, for tests that use runs of their own.

    Each number of services on a kind of store with the same settings is started once, and ends with the tests.
    """
    made: dict[tuple[Any, ...], list[ThreadService]] = {}
    with ExitStack() as stack:

        def nodes(count: int, kind: str = "valkey", **settings: Any) -> list[ThreadService]:
            key = count, kind, *sorted(settings.items())
            if key not in made:
                folder = tmp_path_factory.mktemp("nodes")
                common = {
                    "redis_url": stack.enter_context(store(kind, folder)),
                    "checkpoint_url": str(folder / "checkpoints"),
                    **settings,
                }
                made[key] = [
                    # One of them updates small shards on its event loop, as services do unless told otherwise.
                    ThreadService(folder / f"node-{number}", inline_elements=100_000 if number == 1 else 0, **common)
                    for number in range(count)
                ]
                stack.callback(ThreadService.stop_all, made[key])
                shared.append(made[key][0])
            return made[key]

        yield nodes


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., ProcessService]]:
    """Starts services in processes that can be killed; they end with the test, embedded stores included."""
    running: list[ProcessService] = []

    def start(data_dir: Path | None = None, **settings: Any) -> ProcessService:
        running.append(ProcessService(data_dir or tmp_path / "data", **settings))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey server that tests share; each uses keys of its own."""
    with store("valkey", tmp_path_factory.mktemp("store")) as url:
        yield url


@pytest.fixture(params=["valkey", "redis"])
def redis_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store that outlives the service: Valkey, and Debian's redis-server where it is installed."""
    with store(request.param, tmp_path) as url:
        yield url


@pytest.fixture(params=["directory", "memory", "fsspec-directory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One of each kind: a directory, a backend without directories, and one with them.

    Memory is not for threads: fsspec lists the dict that it is while others delete from it, should a garbage collection
    in between let them.
    """
    places = {
        "directory": str(tmp_path / "new" / "place"),
        "memory": f"memory://{uuid.uuid4()}/data",
        "fsspec-directory": f"local://{tmp_path}/new/place",
    }
    return open_storage(places[request.param])


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
