"""The dashboard's files and the sessions of browsers, by plain HTTP."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from freestep_service.access.sign_in_links import SignInLinks
from harness import AUTHORIZED, TOKEN, ThreadService
from plain_calls import Api, slug

FOLDER = Path(str(files("freestep_service.web").joinpath("dashboard")))
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""The SHA-256 of the files of uPlot 1.6.32, as `npm pack uplot@1.6.32` gets them."""
HALF = "Freestep-Session"


@pytest.fixture
def browser(service: ThreadService) -> Iterator[httpx.Client]:
    """What a browser is to a service: it has no token, and keeps cookies."""
    with httpx.Client(base_url=service.url) as http:
        yield http


def sign_in(browser: httpx.Client, **given: str) -> dict[str, str]:
    """Signs in; the header that the page then sends."""
    answer = browser.post("/dashboard/session", json=given)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    return {HALF: answer.json()["half"]}


def link(service: ThreadService, **headers: str) -> str:
    """The code of a new link."""
    answer = httpx.post(f"{service.url}/dashboard/links", headers=headers or AUTHORIZED)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["code"])


# Files


def test_files_come_with_a_policy_that_lets_them_do_little(browser: httpx.Client) -> None:
    names = ["/", *(f"/dashboard/files/{path.relative_to(FOLDER)}" for path in FOLDER.rglob("*") if path.is_file())]
    for name in names:
        answer = browser.get(name)
        assert answer.status_code == 200, name
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-cache"
        again = browser.get(name, headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_media_types_are_those_of_the_files(browser: httpx.Client) -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "/dashboard/files/style.css": "text/css; charset=utf-8",
        "/dashboard/files/main.js": "text/javascript; charset=utf-8",
        "/dashboard/files/vendor/uplot/LICENSE": "text/plain; charset=utf-8",
    }
    assert {name: browser.get(name).headers["Content-Type"] for name in types} == types


def test_nothing_else_is_a_file(browser: httpx.Client) -> None:
    for path in ("none.js", "", "../pages.py", "%2e%2e/pages.py", "vendor", "/etc/passwd"):
        answer = browser.get(f"/dashboard/files/{path}")
        assert answer.status_code == 404, path
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_files_name_nothing_of_another_host_and_have_no_script_or_style_inline() -> None:
    own = [path for path in FOLDER.rglob("*") if path.is_file() and "vendor" not in path.parts]
    assert {path.suffix for path in own} == {".html", ".js", ".css", ".svg"}
    for path in own:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*\ssrc=)", page)


def test_uplot_is_what_its_authors_released() -> None:
    found = {name: hashlib.sha256((FOLDER / "vendor" / "uplot" / name).read_bytes()).hexdigest() for name in UPLOT}
    assert found == UPLOT


# Sessions


def test_without_a_session_nobody_is_known_and_nothing_is_shown(browser: httpx.Client) -> None:
    session = browser.get("/dashboard/session").json()
    assert (session["scope"], session["name"], session["is_open"]) == (None, None, False)
    assert slug(browser.get("/v1/runs")) == "unauthenticated"


def test_a_pasted_token_begins_a_session_of_two_halves(api: Api, browser: httpx.Client) -> None:
    api.create()
    headers = sign_in(browser, token=f" {TOKEN} ")
    assert browser.get(api.path(), headers=headers).status_code == 200
    session = browser.get("/dashboard/session", headers=headers).json()
    assert (session["scope"], session["runs"], session["half"]) == ("admin", "*", None)
    # Neither half opens anything without the other.
    assert slug(browser.get(api.path())) == "unauthenticated"
    assert slug(httpx.get(api.url + api.path(), headers=headers)) == "unauthenticated"


def test_the_cookie_is_for_this_site_alone_and_says_nothing_of_the_token(browser: httpx.Client) -> None:
    answers = [browser.post("/dashboard/session", json={"token": TOKEN}) for _ in range(2)]
    cookies = [answer.headers["Set-Cookie"] for answer in answers]
    for cookie in cookies:
        assert {part.strip() for part in cookie.split(";")[1:]} >= {"HttpOnly", "SameSite=strict", "Path=/"}
        assert "Domain" not in cookie
        assert TOKEN not in cookie
    assert cookies[0] != cookies[1]
    assert TOKEN not in answers[0].text


def test_over_tls_the_cookie_is_secure(tls_service: ThreadService) -> None:
    with httpx.Client(base_url=tls_service.url, verify=tls_service.trusted) as browser:
        answer = browser.post("/dashboard/session", json={"token": TOKEN})
        assert "; Secure" in answer.headers["Set-Cookie"]
        assert browser.get("/v1/runs", headers={HALF: answer.json()["half"]}).status_code == 200


def test_a_session_allows_what_its_token_allows(service: ThreadService, browser: httpx.Client, api: Api) -> None:
    api.create()
    made = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read", "runs": f"{api.run}*"}).json()
    headers = sign_in(browser, token=made["token"])
    assert browser.get(api.path(), headers=headers).status_code == 200
    assert slug(browser.post(api.path("/checkpoints"), headers=headers)) == "forbidden"
    assert slug(browser.get("/v1/runs/another", headers=headers)) == "forbidden"
    # And ends with it.
    api.http.delete(f"/v1/tokens/{made['id']}")
    assert slug(browser.get(api.path(), headers=headers)) == "unauthenticated"
    assert browser.get("/dashboard/session", headers=headers).json()["scope"] is None


def test_an_act_from_another_origin_is_refused(api: Api, browser: httpx.Client) -> None:
    api.create()
    headers = sign_in(browser, token=TOKEN)
    for foreign in ({"Origin": "http://evil.test"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        assert slug(browser.post(api.path("/checkpoints"), headers={**headers, **foreign})) == "forbidden"
    own = {"Origin": api.url, "Sec-Fetch-Site": "same-origin"}
    assert browser.post(api.path("/checkpoints"), headers={**headers, **own}).status_code == 201


@pytest.mark.parametrize("half", ["", "x", "0.", "8000.AAAA", "12.%%", "a" * 5000])
def test_a_half_that_is_none_is_refused(browser: httpx.Client, half: str) -> None:
    sign_in(browser, token=TOKEN)
    port = browser.base_url.port
    for given in (half, f"{port}.{half}"):
        assert slug(browser.get("/v1/runs", headers={HALF: given})) == "unauthenticated"


def test_halves_of_two_sessions_are_no_session(browser: httpx.Client) -> None:
    first = sign_in(browser, token=TOKEN)
    sign_in(browser, token=TOKEN)
    assert slug(browser.get("/v1/runs", headers=first)) == "unauthenticated"


def test_who_signs_out_is_not_known_any_more(browser: httpx.Client) -> None:
    headers = sign_in(browser, token=TOKEN)
    assert browser.delete("/dashboard/session", headers=headers).status_code == 204
    assert not browser.cookies
    assert slug(browser.get("/v1/runs", headers=headers)) == "unauthenticated"


def test_sign_in_refuses_what_is_no_token(browser: httpx.Client) -> None:
    for given in ("nonsense", TOKEN[:-1] + ("a" if TOKEN[-1] != "a" else "b"), "é"):
        answer = browser.post("/dashboard/session", json={"token": given})
        assert (slug(answer), answer.headers["WWW-Authenticate"]) == ("unauthenticated", 'Bearer realm="freestep"')
    for document in ({}, {"token": TOKEN, "code": "x"}, {"token": ""}, {"who": "me"}):
        assert slug(browser.post("/dashboard/session", json=document)) == "malformed-request"
    assert not browser.cookies


def test_a_session_outlasts_a_restart(start_service: Callable[..., ThreadService], tmp_path: Path) -> None:
    with httpx.Client() as browser:
        service = start_service(tmp_path / "data")
        answer = browser.post(f"{service.url}/dashboard/session", json={"token": TOKEN})
        service.stop()
        again = start_service(tmp_path / "data")
        # Its cookie is of the host, whatever the port.
        assert browser.get(f"{again.url}/v1/runs", headers={HALF: answer.json()["half"]}).status_code == 200


def test_another_process_of_the_service_knows_the_session_of_a_relayed_request(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api]
) -> None:
    nodes = shared_nodes(2)
    api = connect(nodes[0].url)
    api.create()
    for node in nodes:
        with httpx.Client(base_url=node.url) as browser:
            # An act's origin is that of the process which the browser knows.
            headers = sign_in(browser, token=TOKEN) | {"Origin": node.url, "Sec-Fetch-Site": "same-origin"}
            assert browser.post(api.path("/checkpoints"), headers=headers).status_code == 201
            paused = browser.patch(api.path(), headers=headers, json={"paused": True})
            assert (paused.status_code, paused.json()["control"]["paused"]) == (200, True)
            other = {**headers, "Origin": "https://attacker.example"}
            assert slug(browser.patch(api.path(), headers=other, json={"paused": False})) == "forbidden"


def test_a_service_without_tokens_is_open_to_the_page(start_service: Callable[..., ThreadService]) -> None:
    service = start_service(insecure=True)
    session = httpx.get(f"{service.url}/dashboard/session").json()
    assert (session["scope"], session["is_open"]) == ("admin", True)
    assert httpx.post(f"{service.url}/dashboard/links").json() == {"code": None, "seconds": 0}
    assert slug(httpx.post(f"{service.url}/dashboard/session", json={"token": TOKEN})) == "forbidden"


# Links


def test_a_link_signs_in_once(service: ThreadService, browser: httpx.Client) -> None:
    code = link(service)
    headers = sign_in(browser, code=code)
    assert browser.get("/v1/runs", headers=headers).status_code == 200
    assert slug(browser.post("/dashboard/session", json={"code": code})) == "unauthenticated"
    assert slug(browser.post("/dashboard/session", json={"code": "nonsense"})) == "unauthenticated"


def test_a_link_is_for_the_token_of_whoever_asked(service: ThreadService, browser: httpx.Client, api: Api) -> None:
    made = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read", "runs": "mine-*"}).json()
    headers = sign_in(browser, code=link(service, Authorization=f"Bearer {made['token']}"))
    assert browser.get("/dashboard/session", headers=headers).json()["runs"] == "mine-*"
    assert slug(httpx.post(f"{service.url}/dashboard/links")) == "unauthenticated"


def test_a_session_can_make_a_link_for_another_browser(service: ThreadService, browser: httpx.Client) -> None:
    headers = sign_in(browser, token=TOKEN)
    code = browser.post("/dashboard/links", headers=headers).json()["code"]
    with httpx.Client(base_url=service.url) as other:
        assert other.get("/v1/runs", headers=sign_in(other, code=code)).status_code == 200


def test_links_end_and_the_oldest_make_room() -> None:
    now = 0.0
    links = SignInLinks(lambda: now)
    code = links.make("token", "token")
    now = links.good_s - 1.0
    assert links.use(links.make("other", "other")) == "other"
    now += 1
    assert links.use(code) is None
    oldest, *others = [links.make(str(number), str(number)) for number in range(257)]
    assert links.use(oldest) is None
    assert [links.use(code) for code in others] == [str(number) for number in range(1, 257)]


def test_links_of_one_token_end_no_others() -> None:
    links = SignInLinks(lambda: 0.0)
    code = links.make("admin", "admin")
    # An issuer gives one subject any number of texts.
    oldest, *others = [links.make(f"text {number}", "reader") for number in range(1000)]
    assert links.use(code) == "admin"
    assert links.use(oldest) is None
    assert [code for code in others if links.use(code)] == others[-16:]


def test_a_link_is_of_the_token_that_let_its_maker_in(service: ThreadService, browser: httpx.Client, api: Api) -> None:
    """Whoever sends halves of any text beside a token would make links of any number of tokens."""
    made = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read"}).json()
    headers = sign_in(browser, token=TOKEN) | {"Authorization": f"Bearer {made['token']}"}
    code = browser.post("/dashboard/links", headers=headers).json()["code"]
    assert browser.get("/dashboard/session", headers=sign_in(browser, code=code)).json()["name"] == "reader"
