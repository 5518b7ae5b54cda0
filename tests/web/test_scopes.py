"""Who may call what: every route with a token of every scope, and what a refusal says.

The routes are those of the OpenAPI document, so that a new one is asked too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from documented import openapi
from freestep.api.token_form import SCOPES, make_token
from freestep_service.app import create_app
from freestep_service.runs.storage_claims import StorageClaims
from freestep_service.settings import Settings
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.claims import StorageInUse
from freestep_service.web.direct_routes import DirectRoute
from freestep_service.web.guard import GuardedRoute
from freestep_service.web.routes.data_request import DataRoute
from harness import AUTHORIZED, TOKEN, ThreadService
from meanwhile import wait_until
from plain_calls import BODY, TENSORS, Api, ShardedApi, slug
from raw_pushes import answered, connected, half_of_a_push, head_of_a_push

DOCUMENT = openapi()
OPERATIONS = {
    (method.upper(), path): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
SCOPE_OF = {
    ("GET", "/healthz"): None,
    ("GET", "/readyz"): None,
    ("GET", "/metrics"): "read",
    ("GET", "/v1/runs"): "read",
    ("GET", "/v1/runs/{run}"): "read",
    ("GET", "/v1/runs/{run}/topology"): "read",
    ("GET", "/v1/runs/{run}/parameters"): "read",
    ("GET", "/v1/runs/{run}/state"): "read",
    ("GET", "/v1/runs/{run}/leases"): "read",
    ("GET", "/v1/runs/{run}/checkpoints"): "read",
    ("GET", "/v1/runs/{run}/events"): "read",
    ("GET", "/v1/runs/{run}/history"): "read",
    ("POST", "/v1/runs/{run}/metrics"): "read",
    ("PUT", "/v1/runs/{run}"): "push",
    ("PUT", "/v1/runs/{run}/parameters"): "push",
    ("POST", "/v1/runs/{run}/leases"): "push",
    ("PUT", "/v1/runs/{run}/leases/{lease}"): "push",
    ("POST", "/v1/runs/{run}/leases/{lease}/memory"): "push",
    ("DELETE", "/v1/runs/{run}/leases/{lease}"): "push",
    ("POST", "/v1/runs/{run}/gradients"): "push",
    ("GET", "/v1/runs/{run}/data"): "read",
    ("GET", "/v1/runs/{run}/data/{name}"): "read",
    ("PUT", "/v1/runs/{run}/data/{name}"): "push",
    ("POST", "/v1/runs/{run}/data/{name}/units"): "push",
    ("DELETE", "/v1/runs/{run}/data/{name}/units"): "push",
    ("DELETE", "/v1/runs/{run}"): "admin",
    ("PATCH", "/v1/runs/{run}"): "admin",
    ("DELETE", "/v1/runs/{run}/workers/{worker}"): "admin",
    ("POST", "/v1/runs/{run}/reshard"): "admin",
    ("PUT", "/v1/runs/{run}/state"): "admin",
    ("POST", "/v1/runs/{run}/checkpoints"): "admin",
    ("POST", "/v1/runs/{run}/checkpoints/{step}/restore"): "admin",
    ("GET", "/v1/tokens"): "admin",
    ("POST", "/v1/tokens"): "admin",
    ("DELETE", "/v1/tokens/{id}"): "admin",
}
OF_THE_DASHBOARD = {
    ("GET", "/"): None,
    ("GET", "/dashboard/files/{path:path}"): None,
    ("GET", "/dashboard/session"): None,
    ("POST", "/dashboard/session"): None,
    ("DELETE", "/dashboard/session"): None,
    ("POST", "/dashboard/links"): "read",
}
"""What the API's document does not have."""
PAGES = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/static-offline-docs"}
"""What is no route of ours: the API's documentation, which says nothing of any run."""


def created(api: Api, scope: str, **wish: Any) -> dict[str, Any]:
    """A token, as its maker is shown it."""
    answer = api.http.post("/v1/tokens", json={"name": "test", "scope": scope, **wish})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def tokens(service: ThreadService) -> Iterator[dict[str, dict[str, str]]]:
    """A token of each scope for all runs, and for runs that begin with "mine-"."""
    api = Api(service.url)
    made = {f"{scope} {runs}": created(api, scope, runs=runs)["token"] for scope in SCOPES for runs in ("*", "mine-*")}
    yield {name: bearer(token) for name, token in made.items()}
    api.http.close()


@pytest.fixture
def plain(service: ThreadService) -> Iterator[httpx.Client]:
    """Who asks without a token."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


@pytest.fixture
def as_(service: ThreadService, api: Api) -> Iterator[Callable[..., Api]]:
    """The test's run, as who has a new token sees it."""
    made: list[Api] = []

    def open_(scope: str, **wish: Any) -> Api:
        made.append(Api(service.url, wish.pop("run", api.run)))
        made[-1].http.headers.update(bearer(created(api, scope, **wish)["token"]))
        return made[-1]

    yield open_
    for each in made:
        each.http.close()


def routes_of(router: Any) -> Iterator[Any]:
    """All routes, those of included routers too."""
    for route in router.routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else routes_of(included)


def test_every_route_has_its_scope() -> None:
    secured = {call: operation["security"] for call, operation in OPERATIONS.items()}
    assert {call: security[0]["token"][0] if security else None for call, security in secured.items()} == SCOPE_OF
    routes = list(routes_of(create_app(Settings())))
    hidden = [route for route in routes if isinstance(route, GuardedRoute) and not route.include_in_schema]
    assert {(method, route.path): route.scope for route in hidden for method in route.methods} == OF_THE_DASHBOARD
    ours = (GuardedRoute, DirectRoute)  # The latter are ways to some of the former.
    assert {route.path for route in routes if not isinstance(route, ours)} == PAGES
    assert DOCUMENT["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


@pytest.mark.parametrize("kind", [GuardedRoute, DataRoute])
def test_a_route_without_a_scope_is_an_error(kind: type[APIRoute]) -> None:
    router = APIRouter(route_class=kind)

    async def forgotten() -> None:
        raise AssertionError("it is open")

    with pytest.raises(TypeError, match=r"/new names no scope: decorate .*forgotten"):
        router.get("/new")(forgotten)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=" ".join)
def test_every_route_lets_in_whom_its_scope_admits(
    plain: httpx.Client, tokens: dict[str, dict[str, str]], method: str, path: str
) -> None:
    needed = SCOPE_OF[method, path]
    is_of_a_run = "{run}" in path
    # A run that nobody has: who is let in is told so.
    asked = path.format(run="mine-1", lease="none", step=1, id="none", name="train", worker="none")

    def ask(headers: dict[str, str], path: str = asked) -> httpx.Response:
        return plain.request(method, path, headers=headers)

    if needed is None:
        for headers in ({}, bearer("wrong"), *tokens.values()):
            assert ask(headers).status_code == 200
        return
    for headers in ({}, bearer(make_token("admin")), bearer("none"), {"Authorization": "Basic YTpi"}):
        answer = ask(headers)
        assert (answer.status_code, slug(answer)) == (401, "unauthenticated")
        problem = answer.json()
        assert problem["scope"] == needed
        assert problem["run"] == ("mine-1" if is_of_a_run else None)
        assert f"a token of scope {needed} for" in problem["detail"]
        assert answer.headers["WWW-Authenticate"] == f'Bearer realm="freestep", scope="{needed}"'
    for name, headers in tokens.items():
        scope, pattern = name.split()
        has_scope = SCOPES.index(scope) >= SCOPES.index(needed)  # type: ignore[arg-type]
        is_for = pattern == "*" or is_of_a_run or path == "/v1/runs"
        answer = ask(headers)
        if has_scope and is_for:
            assert answer.status_code not in (401, 403), answer.text
        else:
            assert (answer.status_code, slug(answer)) == (403, "forbidden")
            assert answer.json()["scope"] == needed
            challenge = f'Bearer realm="freestep", error="insufficient_scope", scope="{needed}"'
            assert answer.headers["WWW-Authenticate"] == challenge
        if is_of_a_run and pattern != "*":
            # Whether there is such a run is not told.
            for run in ("yours", "mine", "Mine-1", "xmine-1", "%2e%2e"):
                assert (
                    ask(
                        headers, path.format(run=run, lease="none", step=1, id="none", name="train", worker="none")
                    ).status_code
                    == 403
                )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "the request carries no token"),
        ("Bearer", "a token is fst_"),
        (f"Bearer {TOKEN[:-1]}", "a token is fst_"),
        (f"Bearer {TOKEN[:-1]}{'a' if TOKEN[-1] != 'a' else 'b'}", "the token is mistyped"),
        (f"Bearer {make_token('push')}", "the token is unknown, or was revoked"),
        (f"Token {TOKEN}", "must be Bearer and a token"),
        (TOKEN, "must be Bearer and a token"),
    ],
    ids=["none", "no text", "short", "mistyped", "unknown", "another scheme", "no scheme"],
)
def test_what_is_wrong_with_a_token_is_said_and_the_token_is_not(plain: httpx.Client, given: str, said: str) -> None:
    answer = plain.get("/v1/runs", headers={"Authorization": given} if given else {})
    assert slug(answer) == "unauthenticated"
    assert said in answer.json()["detail"]
    token = given.rpartition(" ")[2]
    assert len(token) < 10 or token not in answer.text


def test_a_token_stands_once(plain: httpx.Client) -> None:
    lines = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {make_token('read')}")]
    assert slug(plain.get("/v1/runs", headers=lines)) == "unauthenticated"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_name_of_the_scheme_has_no_case(plain: httpx.Client, scheme: str) -> None:
    assert plain.get("/v1/runs", headers={"Authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_a_refusal_comes_before_the_body_and_changes_nothing(
    api: Api, as_: Callable[..., Api], service: ThreadService
) -> None:
    api.create()
    lease = api.lease()
    reader = as_("read")
    before = api.state(service)
    for headers in (dict(reader.http.headers), {"Authorization": "Bearer none"}):
        with connected(api.url) as connection:
            head = head_of_a_push(
                api.path("/gradients"),
                {**api.headers(lease, 0, "refused"), "Authorization": headers.get("authorization", "Bearer none")},
                length=1 << 30,
            )
            connection.sendall(head)
            assert json.loads(answered(connection))["type"].rpartition(":")[2] in ("forbidden", "unauthenticated")
    for refused in (
        reader.push(lease, 0),
        reader.http.delete(api.path()),
        reader.initialize(),
        reader.http.post(api.path("/leases"), json={"worker": "new"}),
        reader.http.delete(api.path(f"/leases/{lease['lease']}")),
    ):
        assert slug(refused) == "forbidden"
    assert api.state(service) == before


def test_a_list_has_the_runs_that_the_token_is_for(
    api: Api, as_: Callable[..., Api], connect: Callable[..., Api]
) -> None:
    other = connect(api.url)
    for each in (api, other):
        each.create()
    for pattern, runs in ((api.run, {api.run}), ("*", {api.run, other.run}), ("none-*", set())):
        listed = as_("read", runs=pattern).http.get("/v1/runs").json()["runs"]
        assert {each["run"] for each in listed} & {api.run, other.run} == runs


def test_readiness_names_runs_to_those_whose_they_are(
    plain: httpx.Client, api: Api, as_: Callable[..., Api], service: ThreadService
) -> None:
    api.create()
    service.registry._set_aside[api.run] = Damaged("its spec is not valid")
    try:
        shown = [
            each.get("/readyz").json()["problems"].get(api.run)
            for each in (plain, api.http, as_("read").http, as_("read", runs=api.run).http, as_("read", runs="x").http)
        ]
    finally:
        del service.registry._set_aside[api.run]
    reason = "its spec is not valid"
    assert shown == [None, reason, reason, reason, None]


def test_readiness_names_the_storage_to_those_who_have_a_token(
    plain: httpx.Client, as_: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = str(StorageInUse("s3://bucket/of/theirs"))
    monkeypatch.setattr(StorageClaims, "problem", taken)
    answers = [each.get("/readyz") for each in (plain, as_("read", runs="x").http)]
    assert [slug(each) for each in answers] == 2 * ["storage-unavailable"]
    assert [each.json()["detail"] for each in answers] == ["a service with another Redis uses the storage", taken]


def test_workers_may_be_bound_to_names(api: Api, as_: Callable[..., Api], service: ThreadService) -> None:
    api.create()
    bound = as_("push", workers="site-a-*")
    lease = bound.lease("site-a-1")
    before = api.state(service)
    refused = bound.http.post(api.path("/leases"), json={"worker": "site-b-1"})
    assert (refused.status_code, slug(refused)) == (403, "forbidden")
    assert (refused.json()["worker"], refused.json()["run"]) == ("site-b-1", api.run)
    assert api.state(service) == before
    assert bound.push(lease, 0).json()["step"] == 1
    # A lease of the same name fences the older one off.
    again = bound.lease("site-a-1")
    assert slug(bound.push(lease, 1)) == "lease-expired"
    assert bound.push(again, 1).json()["step"] == 2


def test_a_retry_under_a_new_token_finds_its_receipt(api: Api, as_: Callable[..., Api]) -> None:
    api.create()
    first = as_("push", name="first")
    lease = first.lease()
    receipt = first.push(lease, 0, "key").json()
    with connected(api.url) as connection:
        connection.sendall(half_of_a_push(first, lease, 1, "cut"))
    listed = api.http.get("/v1/tokens").json()["tokens"]
    (mine,) = [each["id"] for each in listed if each["name"] == "first"]
    second = as_("push")
    assert api.http.delete(f"/v1/tokens/{mine}").status_code == 204
    assert slug(first.push(lease, 0, "key")) == "unauthenticated"
    assert second.push(lease, 0, "key").json() == {**receipt, "replayed": True}
    assert second.push(lease, 1, "cut", body=BODY).json()["step"] == 2


def test_tokens_are_made_listed_and_revoked(api: Api, service: ThreadService) -> None:
    wish = {"name": "spot-fleet", "scope": "push", "runs": "mnist-*", "workers": "site-a-*", "expires_in": 3600}
    answer = api.http.post("/v1/tokens", json=wish)
    assert answer.headers["Cache-Control"] == "no-store"
    made = answer.json()
    token = made.pop("token")
    assert made.items() >= {"name": "spot-fleet", "scope": "push", "runs": "mnist-*", "workers": "site-a-*"}.items()
    assert made["expires_at"] > made["created_at"] and made["last_used_at"] is None
    listed = api.http.get("/v1/tokens")
    assert made in listed.json()["tokens"]
    assert token not in listed.text and "digest" not in listed.text
    assert httpx.get(f"{service.url}/v1/runs", headers=bearer(token)).status_code == 200

    def use() -> str | None:
        (mine,) = [each for each in api.http.get("/v1/tokens").json()["tokens"] if each["id"] == made["id"]]
        return mine["last_used_at"]  # type: ignore[no-any-return]

    wait_until(lambda: use() is not None)
    assert api.http.delete(f"/v1/tokens/{made['id']}").status_code == 204
    assert slug(httpx.get(f"{service.url}/v1/runs", headers=bearer(token))) == "unauthenticated"
    again = api.http.delete(f"/v1/tokens/{made['id']}")
    assert (again.status_code, slug(again)) == (404, "token-not-found")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"name": 101 * "n"}, "name"),
        ({"scope": "root"}, "scope"),
        ({"scope": None}, "scope"),
        ({"runs": ""}, "runs"),
        ({"runs": "a b"}, "runs"),
        ({"workers": ""}, "workers"),
        ({"scope": "read", "workers": "w-*"}, "workers"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": 1e12}, "expires_in"),
        ({"expires_in": "7d"}, "expires_in"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_wish_that_is_none_makes_none(api: Api, change: dict[str, Any], field: str) -> None:
    before = api.http.get("/v1/tokens").json()
    answer = api.http.post("/v1/tokens", json={"name": "n", "scope": "push", **change})
    assert (answer.status_code, slug(answer), answer.json()["field"]) == (400, "malformed-request", field)
    after = api.http.get("/v1/tokens").json()
    assert [each["id"] for each in after["tokens"]] == [each["id"] for each in before["tokens"]]


def test_a_token_of_one_process_is_good_at_the_others(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api]
) -> None:
    nodes = shared_nodes(2)
    one, other = connect(nodes[0].url, "both"), ShardedApi(nodes[1].url, "both")
    token = created(one, "push", runs="both")
    other.http.headers.update(bearer(token["token"]))
    other.create(shards=2)
    # The requests for the parts of a whole carry it to those who have them.
    assert other.pull("y")[0].keys() == TENSORS.keys()
    assert other.push(other.lease(), 0).json()["step"] == 1
    assert slug(other.http.delete(other.path())) == "forbidden"
    assert one.http.delete(f"/v1/tokens/{token['id']}").status_code == 204
    wait_until(lambda: other.http.get(other.path()).status_code == 401)
    other.http.close()


def test_insecure_is_open_to_all(start_service: Callable[..., ThreadService], caplog: pytest.LogCaptureFixture) -> None:
    service = start_service(insecure=True, admin_token_file=None)
    assert "everybody who reaches this service may do everything" in caplog.text
    assert not (service.settings.data_dir / "admin-token").exists()
    api = Api(service.url)
    for headers in ({}, bearer("wrong"), AUTHORIZED):
        del api.http.headers["Authorization"]
        api.http.headers.update({"Authorization": "", **headers})
        assert api.http.put(api.path(), json=api.spec()).is_success
        # They would be good when the service is not insecure any more.
        assert slug(api.http.post("/v1/tokens", json={"name": "n", "scope": "admin"})) == "forbidden"
        assert api.http.delete(api.path()).status_code == 204
    api.http.close()
