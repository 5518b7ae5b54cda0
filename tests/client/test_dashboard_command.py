"""`freestep dashboard` and `Client.dashboard_link`: a link that signs a browser in."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

import forked
from freestep import Client
from harness import ThreadService


def code_in(link: str) -> str:
    """The code of a link that leads to the page of all runs."""
    name, _, code = urlsplit(link).fragment.partition("=")
    assert name == "sign-in"
    return code


def test_a_link_signs_in_with_the_clients_token(service: ThreadService) -> None:
    with Client(service.url) as client, httpx.Client(base_url=service.url) as browser:
        link = client.dashboard_link()
        assert link.startswith(f"{service.url}/#")
        made = browser.post("/dashboard/session", json={"code": code_in(link)}).json()
        assert made["scope"] == "admin"
        assert client.dashboard_link("mnist").endswith("&to=/runs/mnist")


def test_without_tokens_it_is_the_pages_address(start_service: Callable[..., ThreadService]) -> None:
    service = start_service(insecure=True)
    with Client(service.url) as client:
        assert client.dashboard_link() == f"{service.url}/"
        assert client.dashboard_link("mnist") == f"{service.url}/#/runs/mnist"


@pytest.mark.slow
def test_the_command_prints_the_link_alone(service: ThreadService) -> None:
    done = forked.freestep("dashboard", FREESTEP_URL=service.url, COLUMNS="200")
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert httpx.post(f"{service.url}/dashboard/session", json={"code": code_in(line)}).status_code == 201
    assert "good once" in done.stderr
