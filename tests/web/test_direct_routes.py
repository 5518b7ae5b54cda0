"""The direct ways to the handlers of the data path: the same answers come over them as through the framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from freestep_service.web.direct_routes import DirectRoute
from harness import ThreadService
from plain_calls import BODY, Api

TENSORS = "application/vnd.safetensors"


@pytest.fixture
def framework(start_service: Callable[..., ThreadService]) -> ThreadService:
    """A service whose routes are all the framework's."""
    made = start_service()
    routes = made.app.router.routes
    routes[:] = [route for route in routes if not isinstance(route, DirectRoute)]
    return made


def calls(api: Api) -> Iterator[httpx.Response]:
    """Calls of each kind to a run that is made for them, good ones and bad ones."""
    api.create()
    gradients, parameters, http = api.path("/gradients"), api.path("/parameters"), api.http
    lease = api.lease()
    yield api.push(lease, 0, "one")
    yield api.push(lease, 0, "one")
    yield http.post(gradients, content=BODY[:-1] + b"\x01", headers=api.headers(lease, 0, "one"))
    yield api.push(lease, 1, "two", Prefer="return=representation")
    yield http.post(f"{gradients}?shard=0&of=2", content=BODY, headers=api.headers(lease, 2, "three"))
    yield http.post(f"{gradients}?shard=x", content=BODY, headers=api.headers(lease, 2, "three"))
    yield http.post(gradients, content=BODY, headers={**api.headers(lease, 2, "three"), "Content-Type": "text/plain"})
    yield http.post(gradients, content=BODY)
    yield http.post(gradients, content=BODY, headers={**api.headers(lease, 2, "three"), "Authorization": "Bearer x"})
    yield http.post(gradients, content=BODY, headers={**api.headers(lease, 2, "three"), "Origin": "http://elsewhere"})
    yield http.post(f"{gradients}/", content=BODY, headers=api.headers(lease, 2, "three"))
    yield http.post(gradients.replace("/v1", "//v1"), content=BODY, headers=api.headers(lease, 2, "three"))
    yield http.post("/v1/runs/no-such-run/gradients", content=BODY, headers=api.headers(lease, 2, "three"))
    yield http.post("/v1/runs/%2e%2e/gradients", content=BODY, headers=api.headers(lease, 2, "three"))
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"):
        yield http.request(method, gradients)
    for method in ("GET", "HEAD", "POST", "DELETE"):
        yield http.request(method, parameters)
    for query in ("point=z&dtype=BF16", "point=w", "point=x&point=y", "min_step=9", "dtype=I8", "checkpoint=0"):
        yield http.get(f"{parameters}?{query}")
    yield http.get(parameters, headers={"Range": "bytes=3-9"})
    yield http.get(parameters, headers={"Range": "bytes=999999-"})
    yield http.put(parameters, content=BODY, headers={"Content-Type": TENSORS})
    for method in ("PUT", "GET", "DELETE", "PUT"):
        yield http.request(method, api.path(f"/leases/{lease['lease']}"))


def told(api: Api, answer: httpx.Response) -> tuple[Any, ...]:
    """What an answer says, without what differs from service to service: its date, and its leases' names and tokens."""
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    body: Any = answer.content
    if body and "json" in headers["content-type"]:
        body = {name: value for name, value in answer.json().items() if name not in ("lease", "token")}
        headers.pop("content-length")
    return answer.request.method, answer.request.url.path.split("/")[-1], answer.status_code, headers, body


def test_no_answer_differs(service: ThreadService, framework: ThreadService, connect: Callable[..., Api]) -> None:
    assert any(isinstance(route, DirectRoute) for route in service.app.router.routes)
    ways = [connect(each.url, "compared") for each in (service, framework)]
    direct, through = ([told(api, answer) for answer in calls(api)] for api in ways)
    ways[0].http.delete(ways[0].path())
    for one, other in zip(direct, through, strict=True):
        assert one[2:] == other[2:], one[:2]
    assert {status for _, _, status, _, _ in direct} >= {200, 206, 400, 401, 403, 404, 405, 409, 410, 412, 415, 416}


def test_paths_are_made_by_the_routes_behind_them(service: ThreadService) -> None:
    route = next(route for route in service.app.router.routes if isinstance(route, DirectRoute))._route
    made = dict.fromkeys(route.param_convertors, "x")
    assert service.app.url_path_for(route.name, **made) == route.path_format.format(**made)
