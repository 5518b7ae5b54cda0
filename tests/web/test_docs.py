"""The pages of the API's documentation need nothing but the service."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from harness import ThreadService
from plain_calls import Api


class Links(HTMLParser):
    """What a page loads: scripts, styles, icons."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img"):
            self.found += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.mark.parametrize(("page", "kinds"), [("/docs", {"js", "css", "png"}), ("/redoc", {"js", "png"})])
def test_a_page_loads_nothing_from_elsewhere(api: Api, page: str, kinds: set[str]) -> None:
    answer = api.http.get(page)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    links = Links()
    links.feed(answer.text)
    assert {link.rpartition(".")[2] for link in links.found} == kinds
    for link in links.found:
        assert link.startswith("/") and not link.startswith("//")
        loaded = api.http.get(link)
        assert loaded.status_code == 200
        assert len(loaded.content) == int(loaded.headers["Content-Length"]) > 1000
    assert "/openapi.json" in answer.text
    assert "https://" not in answer.text and "http://" not in answer.text


def test_what_is_not_there_is_a_problem(api: Api) -> None:
    for path in (
        "/static-offline-docs/none.js",
        "/static-offline-docs/../core.py",
        "/static-offline-docs/%2e%2e/core.py",
    ):
        answer = api.http.get(path)
        assert answer.status_code == 404
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_the_document_is_rendered_once_and_not_sent_to_who_has_it(
    start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start_service()
    rendered = []
    make = service.app.openapi

    def noting() -> dict[str, Any]:
        rendered.append(threading.current_thread())
        return make()

    monkeypatch.setattr(service.app, "openapi", noting)
    answers = [httpx.get(f"{service.url}/openapi.json") for _ in range(3)]
    assert len(rendered) == 1
    assert {answer.headers["Content-Type"] for answer in answers} == {"application/json"}
    assert len({answer.content for answer in answers}) == 1
    known = httpx.get(f"{service.url}/openapi.json", headers={"If-None-Match": answers[0].headers["ETag"]})
    assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", answers[0].headers["ETag"])
