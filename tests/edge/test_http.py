"""HTTP as RFC 9110 and RFC 9112 have it."""

from __future__ import annotations

import json

import pytest

from edge.answers import Answer
from edge.conftest import Edge
from freestep.wire.receiver import MEDIA_TYPE
from harness import OWN_HEAD, TOKEN
from plain_calls import BODY


def answered(edge: Edge, *sent: bytes) -> list[Answer]:
    """The answers up to the end of the connection."""
    with edge.peer() as peer:
        peer.send(*sent)
        return peer.answers()


@pytest.mark.parametrize("version", ["HTTP/0.9", "HTTP/2.0"])
def test_other_versions_of_http_are_refused(edge: Edge, version: str) -> None:
    (answer,) = answered(edge, edge.head("GET", version=version) + b"\r\n" + edge.head("DELETE") + b"\r\n")
    assert answer.status == 505
    assert answer.headers["content-type"] == "application/problem+json"
    assert edge.api.status()["run"] == edge.api.run


@pytest.mark.parametrize("line", ["GET {}", "GET {} HTTP/3", "GET {} HTTP/1.1x", "GET {} http/1.1", "PRI * HTTP/2.0"])
def test_a_request_line_that_is_none(edge: Edge, line: str) -> None:
    (answer,) = answered(edge, line.format(edge.api.path()).encode() + b"\r\nHost: here\r\n\r\nSM\r\n\r\n")
    assert answer.status in (400, 505)


HOSTS = {
    "none": b"",
    "two": b"Host: a\r\nHost: a\r\n",
    "two, spelled otherwise": b"Host: a\r\nHOST: b\r\n",
    "a list": b"Host: a, b c\r\n",
    "a path": b"Host: a/b\r\n",
    "a user": b"Host: me@a\r\n",
    "no port": b"Host: a:b\r\n",
    "a space": b"Host: a b\r\n",
    "half an address": b"Host: [::1\r\n",
}


@pytest.mark.parametrize("hosts", HOSTS, ids=HOSTS)
def test_a_host_stands_once_and_is_one(edge: Edge, hosts: str) -> None:
    (answer,) = answered(edge, f"GET {edge.api.path()} HTTP/1.1\r\n".encode() + HOSTS[hosts] + b"\r\n")
    assert answer.slug == "malformed-request"
    assert "Host" in answer.document["detail"]


@pytest.mark.parametrize(
    "host", ["here", "here:80", "127.0.0.1:8000", "[::1]:8000", "[::1]", "", "a_b.example.", "xn--a"]
)
def test_hosts(edge: Edge, host: str) -> None:
    with edge.peer() as peer:
        peer.send(f"GET /healthz HTTP/1.1\r\nHost: {host} \r\n\r\n".encode())
        assert peer.answer().status == 200


@pytest.mark.parametrize(
    ("url", "host", "status"),
    [
        ("http://here", "here", 200),
        ("http://HERE:8000", "here:8000", 200),
        ("https://here", "here", 200),
        ("http://there", "here", 400),
        ("http://here:1", "here", 400),
        ("http://here@there", "here", 400),
        ("http://there@here", "here", 400),
        ("x://", "here", 400),
        ("http://", "", 400),
    ],
)
def test_a_target_that_is_a_url_is_at_the_host(edge: Edge, url: str, host: str, status: int) -> None:
    with edge.peer() as peer:
        peer.send(f"GET {url}/healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = peer.answer()
        assert answer.status == status
        assert status == 200 or (answer.slug == "malformed-request" and peer.is_at_its_end())


@pytest.mark.parametrize("url", ["http://here", "http://here?a=b", "http://here:70000/"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_url_without_a_path_is_that_of_the_page(edge: Edge, url: str, version: str) -> None:
    host = url.split("/")[2].partition("?")[0]
    with edge.peer() as peer:
        peer.send(f"GET {url} {version}\r\nHost: {host}\r\n\r\n".encode())
        answer = peer.answer()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("behind", ["#", "#/healthz", "?a=b#c", "/#/../"])
def test_a_target_has_no_fragment(edge: Edge, behind: str) -> None:
    """What a proxy takes for a part of the path, others leave out."""
    with edge.peer() as peer:
        peer.send(edge.head("DELETE", behind) + b"\r\n")
        answer = peer.answer("DELETE")
        assert answer.slug == "malformed-request"
        assert "fragment" in answer.document["detail"]
        assert peer.is_at_its_end()
    assert edge.api.status()["run"] == edge.api.run


def test_a_client_of_http_1_0_needs_no_host(edge: Edge) -> None:
    (answer,) = answered(edge, f"GET {edge.api.path()} HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    assert answer.status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_of_http_1_0_is_sent_no_chunks(edge: Edge, method: str) -> None:
    with edge.peer() as peer:
        peer.send(edge.head(method, "/events?follow=false", version="HTTP/1.0") + b"\r\n")
        answer = peer.answer(method)
        assert peer.is_at_its_end()
    # Which is what HTTP/1.0 means without a word; older versions of uvicorn say none.
    assert (answer.status, answer.headers.get("connection", "close")) == (200, "close")
    assert not answer.headers.keys() & {"transfer-encoding", "content-length"}
    assert answer.body.endswith(b"\n\n") if method == "GET" else answer.body == b""


@pytest.mark.parametrize("path", ["", "/parameters", "/leases", "/checkpoints", "/topology", "/parameters?shard=0"])
def test_head_is_get_without_a_body(edge: Edge, path: str) -> None:
    with edge.peer() as peer:
        peer.send(edge.head("GET", path) + b"\r\n")
        get = peer.answer()
        peer.send(2 * (edge.head("HEAD", path) + b"\r\n"))
        for _ in range(2):
            head = peer.answer("HEAD")
            assert (head.status, head.body) == (200, b"")
            assert {name: head.headers[name] for name in get.headers if name != "date"}.keys() == (
                get.headers.keys() - {"date"}
            )
            if path.startswith("/parameters"):
                assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.body))
                assert head.headers["etag"] == get.headers["etag"]


@pytest.mark.parametrize("wanted", ["bytes=0-9", "bytes=-1", "bytes=1000000-"])
@pytest.mark.parametrize("path", ["/parameters", "/parameters?shard=0"])
def test_head_is_of_the_whole(edge: Edge, path: str, wanted: str) -> None:
    with edge.peer() as peer:
        peer.send(edge.head("GET", path) + b"\r\n")
        whole = peer.answer()
        peer.send(edge.head("HEAD", path, f"Range: {wanted}") + b"\r\n")
        head = peer.answer("HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(len(whole.body)))
    assert "content-range" not in head.headers


@pytest.mark.parametrize("space", [" ", "\t", " \t "])
def test_white_space_around_a_value_is_none_of_it(edge: Edge, space: str) -> None:
    head = edge.head("GET", "/parameters", "If-None-Match: x", f"Range:{space}bytes=0-9{space}")
    with edge.peer() as peer:
        peer.send(head.replace(b"Host: here", f"Host:{space}here{space}".encode()) + b"\r\n")
        answer = peer.answer()
        assert (answer.status, len(answer.body)) == (206, 10)
        # A validator, which is compared byte by byte.
        lines = f"Range: bytes=0-9{space}", f"If-Range:{space}{answer.headers['etag']}{space}"
        peer.send(edge.head("GET", "/parameters", *lines) + b"\r\n")
        assert peer.answer().status == 206


def test_a_list_may_stand_in_several_headers(edge: Edge) -> None:
    with edge.peer() as peer:
        peer.send(edge.head("GET", "/parameters") + b"\r\n")
        tag = peer.answer().headers["etag"]
        lines = 'If-None-Match: "other"', f"If-None-Match: W/{tag}"
        peer.send(edge.head("GET", "/parameters", *lines) + b"\r\n")
        assert peer.answer().status == 304


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/v1/runs"])
def test_head_of_what_is_no_run(edge: Edge, path: str) -> None:
    with edge.peer() as peer:
        peer.send(f"HEAD {path} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
        assert peer.answer("HEAD").status == 200


ALLOWED = {
    "": "DELETE, GET, PATCH, PUT, HEAD",
    "/parameters": "GET, PUT, HEAD",
    "/state": "GET, PUT, HEAD",
    "/leases": "GET, POST, HEAD",
    "/leases/l": "DELETE, PUT",
    "/leases/l/memory": "POST",
    "/gradients": "POST",
    "/checkpoints": "GET, POST, HEAD",
    "/checkpoints/1/restore": "POST",
    "/topology": "GET, HEAD",
    "/metrics": "POST",
}


@pytest.mark.parametrize("path", ALLOWED)
@pytest.mark.parametrize("method", ["COPY", "OPTIONS", "TRACE"])
def test_allow_names_all_methods_of_a_path(edge: Edge, path: str, method: str) -> None:
    with edge.peer() as peer:
        peer.send(edge.head(method, path) + b"\r\n")
        answer = peer.answer()
    assert (answer.status, answer.headers["allow"]) == (405, ALLOWED[path])
    assert answer.headers["content-type"] == "application/problem+json"


def test_allow_is_what_the_document_says(edge: Edge) -> None:
    paths = edge.api.http.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        target = path.format(run=edge.api.run, lease="l", step=1, id="i", name="train", worker="w")
        allowed = edge.api.http.request("TRACE", target).headers["allow"].split(", ")
        assert set(allowed) - {"HEAD"} == {method.upper() for method in operations}, path


PLAIN = pytest.mark.parametrize("edge", ["http", "relayed"], indirect=True)
"""TLS has no half-closed connections."""


@PLAIN
def test_who_has_closed_their_side_is_answered(edge: Edge) -> None:
    head = edge.head("POST", "/leases", "Content-Type: application/json", "Content-Length: 16")
    with edge.peer() as peer:
        peer.send(edge.head("GET") + b"\r\n" + head + b"\r\n" + b'{"worker": "me"}' + edge.head("GET", "/topology"))
        peer.end()
        status, lease = peer.answers()
    assert (status.status, lease.status) == (200, 201)
    assert edge.api.http.delete(edge.api.path(f"/leases/{lease.document['lease']}")).status_code == 204


@PLAIN
def test_a_push_of_who_has_closed_their_side_is_answered(edge: Edge) -> None:
    lease = edge.api.lease()
    lines = [f"{name}: {value}" for name, value in edge.api.headers(lease, edge.api.status()["step"]).items()]
    with edge.peer() as peer:
        peer.send(edge.head("POST", "/gradients", *lines, f"Content-Length: {len(BODY)}") + b"\r\n" + BODY)
        peer.end()
        (answer,) = peer.answers()
    assert answer.document["decision"] == "applied"
    assert edge.api.http.delete(edge.api.path(f"/leases/{lease['lease']}")).status_code == 204


@PLAIN
def test_a_wait_of_who_has_closed_their_side_ends(edge: Edge) -> None:
    with edge.peer() as peer:
        peer.send(edge.head("GET", "/parameters?min_step=1000", "Prefer: wait=600") + b"\r\n")
        peer.end()
        (answer,) = peer.answers()
    assert (answer.status, answer.slug) == (503, "shard-unavailable")


@PLAIN
def test_a_request_that_is_cut_off_is_not_run(edge: Edge) -> None:
    spec = json.dumps(edge.api.spec()).encode()
    path = f"/v1/runs/{edge.api.run}-cut"
    for lines in (f"Content-Length: {len(spec)}", "Transfer-Encoding: chunked"):
        head = f"PUT {path} HTTP/1.1\r\n{OWN_HEAD}Content-Type: application/json\r\n{lines}\r\n\r\n".encode()
        with edge.peer() as peer:
            peer.send(head, b"%x\r\n%b" % (len(spec), spec) if "chunked" in lines else spec[:-1])
            peer.end()
            assert peer.answers() == []
        assert edge.api.http.get(path).status_code == 404


def test_an_unexpected_error_ends_the_connection(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bytes:
        raise RuntimeError("planted")

    monkeypatch.setattr(edge.service.app.state.context.metrics, "expose", fail)
    body = b"x" * 300_000
    head = f"GET /metrics HTTP/1.1\r\n{OWN_HEAD}Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    (answer,) = answered(edge, head.encode(), body + edge.head("DELETE") + b"\r\n")
    assert (answer.status, answer.headers["connection"]) == (500, "close")
    assert "planted" not in answer.body.decode()
    assert edge.api.status()["run"] == edge.api.run
