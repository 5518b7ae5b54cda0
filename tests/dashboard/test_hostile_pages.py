"""Names that are attacks, pages of other origins, and what a script could take of a session."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from playwright.sync_api import expect

from dashboard.page_parts import OpenPage, chart
from freestep import Client
from harness import TOKEN, ThreadService
from plain_calls import Api, slug

pytestmark = pytest.mark.slow


ATTACKS = ("<img src=x onerror=alert(1)>", '"><script>alert(2)</script>', "__proto__", "constructor", "${alert(3)}")


def test_names_are_text(api: Api, open_page: OpenPage) -> None:
    api.run = f"{api.run}--script.alert_1_.__proto__"
    api.create()
    for name in ATTACKS:
        lease = api.lease(name)
        assert api.push(lease, api.status()["step"], Freestep_Loss="1.0").status_code == 200
        report = {"name": name, "value": 1.0, "step": 0}
        assert api.http.post(api.path("/metrics"), json=report).status_code == 200
    page = open_page(api.url)
    page.get_by_role("link", name=api.run).click()
    for name in ATTACKS:
        expect(page.locator("table.workers tbody th", has_text=name)).to_have_text(name)
        expect(chart(page, name).locator("canvas")).to_be_visible()
        expect(page.locator(".events")).to_contain_text(f"{name} joined")
    assert page.locator("main img, main script, main svg image").count() == 0
    api.http.delete(api.path())


def test_a_link_leaves_the_address_and_signs_in_once(service: ThreadService, open_page: OpenPage) -> None:
    with Client(service.url) as client:
        link = client.dashboard_link()
    page = open_page(service.url, signs_in=False)
    page.goto(link)
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    assert "sign-in" not in page.url
    again = open_page(service.url, signs_in=False)
    again.goto(link)
    expect(again.get_by_role("alert")).to_contain_text("the link is unknown here, was used, or has ended")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.evaluate("localStorage.getItem('freestep-session')") is None


def test_scripts_see_half_of_a_session(service: ThreadService, open_page: OpenPage) -> None:
    page = open_page(service.url)
    assert page.evaluate("document.cookie") == ""
    kept = page.evaluate("JSON.stringify(localStorage)")
    assert TOKEN not in kept
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")


def test_a_page_of_another_port_learns_no_token_and_does_nothing(api: Api, open_page: OpenPage) -> None:
    """Browsers take it for the same site, and send it the cookies of this host."""
    api.create()
    heard: list[str] = []

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Cookie", ""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Evil) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(api.url).context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        how = {"method": "POST", "credentials": "include", "mode": "no-cors"}
        page.evaluate("([url, how]) => fetch(url, how).then(() => null)", [api.url + api.path("/checkpoints"), how])
        server.shutdown()
    cookie = next(each for each in heard if each)
    assert cookie.startswith("freestep-") and TOKEN not in cookie
    assert slug(httpx.get(f"{api.url}/v1/runs", headers={"Cookie": cookie})) == "unauthenticated"
    assert len(api.http.get(api.path("/checkpoints")).json()["checkpoints"]) == 1
