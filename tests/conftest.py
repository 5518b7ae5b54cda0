"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme

from certificates import AUTHORITY, issued
from documented import UNDOCUMENTED
from freestep import Client, Run
from freestep_service.optimizers.readiness import compile_loops
from freestep_service.storage.media import Storage, open_storage
from harness import TOKEN, Groups, ProcessService, ThreadService, store
from plain_calls import Api

torch.set_num_threads(1)
# Processes that tests start handle signals as from a terminal, even if the parent of the tests ignores some.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Has all clients, also in child processes, trust a single CA: loading certifi's takes each client 30 ms.

    Gives all services and clients the same admin token. Has the loops on disk before xdist starts its processes.
    """
    folder = Path(tempfile.mkdtemp(prefix="freestep-tests-"))
    (folder / "admin-token").write_text(TOKEN)
    (folder / "admin-token").chmod(0o600)
    os.environ["FREESTEP_ADMIN_TOKEN_FILE"] = str(folder / "admin-token")
    os.environ["FREESTEP_TOKEN"] = TOKEN
    # As raw requests call services.
    os.environ["FREESTEP_ALLOWED_HOSTS"] = "a,here,there,service.test"
    trustme.CA().cert_pem.write_to_path(folder / "ca.pem")
    os.environ["SSL_CERT_FILE"] = str(folder / "ca.pem")
    os.environ["XDG_CONFIG_HOME"] = str(folder)
    config.add_cleanup(lambda: shutil.rmtree(folder))
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        # Else each of the processes that run tests would compile the same loops, where none are on disk.
        compile_loops()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Looks for garbage once, when thousands of modules and tests are there to stay, and never again among those."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def as_documented() -> Iterator[None]:
    """Compares what services answer with their OpenAPI document, whatever a test is about."""
    UNDOCUMENTED.clear()
    yield
    assert not UNDOCUMENTED


@pytest.fixture(scope="session")
def shared() -> list[ThreadService]:
    """The services that tests share; of services with a common store, one."""
    return []


@pytest.fixture(autouse=True)
def leave_no_runs(shared: list[ThreadService], runs_of_modules: None) -> Iterator[None]:
    """Deletes the runs that a test leaves on shared services, which spend time on every run they have.

    Those of the module's fixtures are there before it.
    """
    before = {run.name for service in shared for run in service.registry.all()}
    yield
    for service in shared:
        service.delete_runs(kept=before)


@pytest.fixture(scope="module", autouse=True)
def runs_of_modules(shared: list[ThreadService]) -> Iterator[None]:
    """Deletes the runs of a module's fixtures."""
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


@pytest.fixture
def name() -> str:
    """Of a run that there is not yet."""
    return f"run-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run(service: ThreadService, name: str) -> Iterator[Run]:
    """The run, as an onlooker sees it."""
    with Client(service.url) as client:
        yield client.run(name)


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


@pytest.fixture(scope="session")
def client_ca(tls: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Settings of services that speak TLS and take certificates of clients."""
    file = tmp_path_factory.mktemp("clients") / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(file)
    return {**tls, "ssl_client_ca": file}


@pytest.fixture(scope="session")
def certified(
    client_ca: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, shared: list[ThreadService]
) -> Iterator[ThreadService]:
    """A service that takes certificates of clients, which tests share."""
    bound = {"ssl_client_runs": "mine-*", "ssl_client_workers": "{name}-*"}
    running = ThreadService(tmp_path_factory.mktemp("data"), **client_ca, **bound)
    shared.append(running)
    yield running
    running.stop()


@pytest.fixture
def certified_nodes(
    client_ca: dict[str, Path], shared_nodes: Callable[..., list[ThreadService]]
) -> list[ThreadService]:
    """Two services that share their runs; certificates of clients allow everything at both."""
    return shared_nodes(2, **client_ca, ssl_client_scope="admin")


@pytest.fixture
def shown(certified: ThreadService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The certificate of a client's environment, which has no token."""
    file = issued(tmp_path)
    monkeypatch.delenv("FREESTEP_TOKEN")
    # Nor does it find the admin token of the service, whose user it is.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("FREESTEP_CA_CERTS", str(certified.settings.ca_certs))
    monkeypatch.setenv("FREESTEP_CLIENT_CERT", str(file))
    return file


@pytest.fixture
def connect() -> Iterator[Callable[..., Api]]:
    """Makes `Api`s of runs; their connections are closed with the test."""
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
    """Starts services in threads, with the test's own settings; they are stopped with the test."""
    running: list[ThreadService] = []

    def start(data_dir: Path | None = None, **settings: Any) -> ThreadService:
        running.append(ThreadService(data_dir or tmp_path / "data", **settings))
        return running[-1]

    yield start
    ThreadService.stop_all(running)


@pytest.fixture(scope="session")
def node_groups(shared: list[ThreadService]) -> Iterator[Groups]:
    """The services that share a store and their runs, over modules."""
    made = Groups(shared)
    yield made
    made.end_unused()


@pytest.fixture(scope="module", autouse=True)
def unused_groups(node_groups: Groups) -> Iterator[None]:
    """Stops, after a module, what it has not used: services spend time without runs, too."""
    yield
    node_groups.end_unused()


@pytest.fixture(scope="session")
def shared_nodes(node_groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[ThreadService]]:
    """Services that share a store and their runs, for tests that use runs of their own.

    Services are started once for each number, kind of store and settings, and stopped after the first module that has
    not used them.
    """

    def nodes(count: int, kind: str = "valkey", **settings: Any) -> list[ThreadService]:
        return node_groups.group(tmp_path_factory.mktemp("nodes"), count, kind, settings)

    return nodes


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., ProcessService]]:
    """Starts services in processes that can be killed; they are stopped with the test, embedded stores included."""
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
    """A directory, an fsspec backend without directories, and one with them.

    The memory backend is not thread-safe: it lists its dict while other threads may delete from it.
    """
    places = {
        "directory": str(tmp_path / "new" / "place"),
        "memory": f"memory://{uuid.uuid4()}/data",
        "fsspec-directory": f"local://{tmp_path}/new/place",
    }
    return open_storage(places[request.param])


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads of torch's arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
