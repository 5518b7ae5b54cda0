"""Whatever document a route is sent, its handler gets what the model says, or the document is refused."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from asgi_calls import Sender, call, scope_of
from freestep.errors import RunNotFound
from freestep_service.app import create_app
from freestep_service.settings import Settings
from freestep_service.web.json_bodies import JsonBodies
from fuzz.target import Target, mutants
from run_specs import HYPERPARAMETERS, POLICIES

__all__ = ["TARGET"]

_ROUTES = (
    ("PUT", "/v1/runs/fuzzed"),
    ("POST", "/v1/runs/fuzzed/leases"),
    ("POST", "/v1/runs/fuzzed/metrics"),
    ("POST", "/v1/runs/fuzzed/reshard"),
)


class _Run:
    """What handlers find in the place of a run: it keeps what they call it with, and goes no further."""

    leases_are_elsewhere, owns_any = False, True

    def __init__(self) -> None:
        self.leases = self.reports = self
        self.quotas = SimpleNamespace(grant=lambda token, run, worker, granting: granting())
        self.given: Any = None

    async def _take(self, *given: Any) -> Any:
        self.given = given
        raise RunNotFound

    create = grant = report = reshard = _take
    name = "fuzzed"

    async def find(self, name: str) -> Any:
        return self


@cache
def _app() -> tuple[FastAPI, _Run]:
    app, run = create_app(Settings(insecure=True)), _Run()
    app.state.context = SimpleNamespace(
        registry=run,
        relay=None,
        settings=Settings(insecure=True),
        tokens=SimpleNamespace(is_good=lambda token: True),
        audit=SimpleNamespace(note=lambda deed: None),
        json_bodies=JsonBodies(30.0),
    )
    return app, run


def check(data: bytes) -> None:
    if not data:
        return
    (method, path), body = _ROUTES[data[0] % len(_ROUTES)], data[1:]
    app, run = _app()
    run.given = None
    answer = call(app, scope_of(method, path, {"Content-Type": "application/json"}), Sender([body]))
    problem = answer.json()
    assert answer.status == problem["status"] and answer.status in (400, 404, 422), problem
    assert (run.given is not None) == (answer.status == 404)
    for each in run.given or ():
        if isinstance(each, BaseModel):
            # It stands in Redis and in files, and is read there again.
            assert type(each).model_validate_json(each.model_dump_json()) == each


def _spec(algorithm: str, policy: str) -> dict[str, Any]:
    return {
        "optimizer": {"algorithm": algorithm, **HYPERPARAMETERS[algorithm]},
        "aggregation": {"policy": policy, **POLICIES[policy]},
        "parameters": [{"name": "w", "shape": [2, 3]}, {"name": "é", "shape": [], "group": "g"}],
        "groups": {"g": {"lr": 0.5}},
    }


_SEEDS = (
    *(b"\0" + json.dumps(_spec(algorithm, policy)).encode() for algorithm in HYPERPARAMETERS for policy in POLICIES),
    b"\0"
    + json.dumps({"optimizer": {"algorithm": "sgd"}, "parameters": [], "shards": 2, "lease_ttl_ms": 500}).encode(),
    b'\1{"worker": "me", "ttl_ms": 1000}',
    b'\2{"name": "accuracy", "value": 0.5, "step": 3, "epoch": 1}',
    b'\3{"shards": 2}',
)
_WORDS = (
    b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"-", b"0", b".", b"1e400", b"1e-400", b"-0.0", b"NaN",
    b"Infinity", b"null", b"true", b"false", b"9007199254740993", b"9" * 400, b'"\\ud800"', b'"\\udfff": 1,',
    b"\\u0000", b"\xff", b"\xef\xbb\xbf", b"[" * 50, b'{"a":' * 50, b'"optimizer"', b'"algorithm"', b'"parameters"',
    b'"shape"', b'"groups"', b'"group"', b'"aggregation"', b'"policy"', b'"batch"', b'"shards"', b'"worker"',
    b'"value"', b'"schedule"', b'"base"',
)  # fmt: skip

TARGET = Target(check, _SEEDS, _WORDS, mutants(_SEEDS, _WORDS))
