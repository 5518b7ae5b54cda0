"""Settings: the environment, flags, and what is refused."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

import forked
from freestep_service.settings import Settings, misspelt


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREESTEP_PORT", "9001")
    monkeypatch.setenv("FREESTEP_DATA_DIR", "/somewhere")
    monkeypatch.setenv("FREESTEP_REDIS_URL", "redis://store")
    settings = Settings()
    assert (settings.port, settings.data_dir, settings.redis_url) == (9001, Path("/somewhere"), "redis://store")


def test_flags_overrule_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREESTEP_PORT", "9001")
    flags = ["--port", "9002", "--host", "0.0.0.0", "--insecure", "--checkpoints-kept", "7"]
    settings = CliApp.run(Settings, cli_args=flags)
    assert (settings.port, settings.host, settings.checkpoints_kept) == (9002, "0.0.0.0", 7)


def test_variables_that_are_almost_settings_are_found() -> None:
    given = ["FREESTEP_CHECKPOINT_SECOND", "freestep_shared_memroy", "FREESTEP_PORT", "PATH", "CHECKPOINT_SECOND"]
    assert misspelt(given) == {
        "FREESTEP_CHECKPOINT_SECOND": "FREESTEP_CHECKPOINT_SECONDS",
        "freestep_shared_memroy": "FREESTEP_SHARED_MEMORY",
    }


def test_variables_of_clients_and_of_containers_are_not_taken_for_settings() -> None:
    of_clients = (
        "CLIENT_CERT CLIENT_KEY LEAVE_ON_SIGTERM PARENT_TOKEN RETRY_SECONDS RUN SHARDS TOKEN TOKEN_FILE URL WORKER"
    )
    # Kubernetes sets these where a Service is named freestep.
    of_containers = "SERVICE_HOST SERVICE_PORT SERVICE_IMAGE WORKER_IMAGE PORT_8000_TCP PORT_8000_TCP_ADDR"
    assert misspelt(f"FREESTEP_{name}" for name in f"{of_clients} {of_containers}".split()) == {}


def test_threads_are_half_the_cores_unless_chosen() -> None:
    assert Settings(threads=3).thread_count() == 3
    assert Settings().thread_count() >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--port", "70000"], "port: Input should be less than or equal to 65535"),
        (["--checkpoints-kept", "0"], "checkpoints_kept"),
        (["--colour", "blue"], "--colour"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], complaint: str) -> None:
    done = forked.freestep("serve", *flags)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0"])
def test_who_listens_on_all_addresses_is_reached_by_the_machines_name(host: str) -> None:
    assert Settings(host=host).own_url() == f"http://{gethostname()}:8000"


@pytest.mark.parametrize("url", ["http://host:8000", "https://host/behind/a/proxy", "http://[::1]:8000/"])
def test_an_advertised_url_is_one_of_a_service(url: str) -> None:
    assert Settings(advertise_url=url).own_url() == url.rstrip("/")


@pytest.mark.parametrize(
    "url", ["host:8000", "ftp://host", "http://", "//host", "http://host?query=1", "http://host#here"]
)
def test_any_other_advertised_url_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="is no http or https URL"):
        Settings(advertise_url=url)
