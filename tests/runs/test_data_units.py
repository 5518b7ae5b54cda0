"""Data sets over plain HTTP: their units are handed out, and each counts once in a pass."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from data_calls import ask, claim, counted, create, give_back, holder, push, show
from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import TENSORS, Api, slug

NAN = {name: torch.full_like(tensor, torch.nan) for name, tensor in TENSORS.items()}


def test_every_example_counts_once_in_each_pass(api: Api) -> None:
    api.create()
    assert create(api, passes=2).status_code == 201
    lease = api.lease()
    examples: list[int] = []
    for step in range(6):
        answer = ask(api, lease).json()
        (unit,) = answer["units"]
        assert not answer["exhausted"]
        assert unit["unit"] == step and unit["pass"] == step // 3
        examples += range(unit["begin"], unit["end"])
        counted(api, lease, step, f"train={unit['unit']}")
    assert sorted(examples) == sorted([*range(10), *range(10)])
    assert examples[:10] != list(range(10)) or examples[10:] != list(range(10))
    assert ask(api, lease).json() == {"units": [], "exhausted": True}
    assert ask(api, lease, Prefer="wait=30").json() == {"units": [], "exhausted": True}
    status = show(api)
    assert (status["done"], status["out"], status["open"], status["examples_done"]) == (6, 0, 0, 20)
    assert status["exhausted"] and status["passes_done"] == 2 and status["passes"] == status["holders"] == []
    assert api.status()["data"] == {"train": {"done": 6, "total": 6, "exhausted": True}}


def shown(api: Api) -> dict[str, float]:
    """The units at /metrics, by data set and state."""
    found = re.findall(
        rf'^freestep_units{{name="(\S+)",run="{api.run}",state="(\w+)"}} (\S+)$',
        api.http.get("/metrics").text,
        re.MULTILINE,
    )
    return {f"{name} {state}": float(count) for name, state, count in found}


def test_prometheus_shows_what_is_open_out_and_done(api: Api) -> None:
    api.create()
    api.http.post(api.path("/checkpoints"))
    create(api, passes=2)
    create(api, "endless", passes=None)
    lease = api.lease()
    units = claim(api, lease, 4)
    counted(api, lease, 0, f"train={units[0]},{units[1]}")
    give_back(api, lease, units[3:])
    claim(api, lease, 2, name="endless")
    expected = {"train open": 3, "train out": 1, "train done": 2, "endless out": 2, "endless done": 0}
    wait_until(lambda: shown(api) == expected)
    status = show(api)
    assert (status["open"], status["out"], status["done"]) == (3, 1, 2)
    # To a state before the data sets.
    assert api.http.post(api.path("/checkpoints/0/restore")).status_code == 200
    wait_until(lambda: shown(api) == {})
    create(api)
    wait_until(lambda: shown(api) == {"train open": 3, "train out": 0, "train done": 0})
    api.http.delete(api.path())
    assert api.run not in api.http.get("/metrics").text


def test_a_data_set_is_created_once(api: Api, service: ThreadService) -> None:
    api.create()
    made = create(api, seed=7)
    spec = {"length": 10, "unit": 4, "passes": 1, "shuffle": "blocks", "seed": 7}
    assert made.status_code == 201 and made.json()["spec"] == spec and made.json()["units"] == 3
    before = api.state(service)
    again = create(api, seed=7)
    assert again.status_code == 200 and again.json() == made.json()
    refused = create(api, seed=8)
    assert slug(refused) == "data-exists" and '"seed":7' in refused.json()["detail"]
    assert api.state(service) == before
    assert [each["name"] for each in api.http.get(api.path("/data")).json()["data"]] == ["train"]


def test_a_run_has_its_weights_before_its_data(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    assert slug(create(api)) == "run-not-initialized"


@pytest.mark.parametrize(
    "spec",
    [
        {"length": 0},
        {"unit": 0},
        {"unit": 2.5},
        {"passes": 0},
        {"passes": 2**53 - 1},
        {"shuffle": "all"},
        {"seed": -1},
        {"length": 2**53},
        {"more": 1},
    ],
)
def test_what_is_no_data_set_is_refused(api: Api, spec: dict[str, Any]) -> None:
    api.create()
    assert slug(create(api, **spec)) == "malformed-request"
    assert slug(create(api, "no name")) == "malformed-request"
    assert slug(create(api, "n" * 65)) == "malformed-request"
    assert slug(api.http.get(api.path("/data/train"))) == "data-not-found"


def test_a_run_has_a_bounded_number_of_data_sets(api: Api) -> None:
    api.create()
    assert [create(api, f"set-{number}").status_code for number in range(16)] == [201] * 16
    assert slug(create(api, "one-more")) == "malformed-request"
    assert len(api.status()["data"]) == 16


@pytest.mark.parametrize(
    "units",
    [
        "train",
        "train=",
        "train=1,1",
        "train=1;train=2",
        "train=01",
        "train=-1",
        "train=1;",
        "=1",
        "train=1 ,2",
        "a b=1",
    ],
)
def test_what_names_no_units_is_refused(api: Api, service: ThreadService, units: str) -> None:
    api.create()
    create(api)
    lease = api.lease()
    claim(api, lease, 3)
    before = api.state(service)
    answer = push(api, lease, 0, units)
    assert slug(answer) == "malformed-request" and answer.json()["field"] == "Freestep-Units"
    assert api.state(service) == before


def test_too_many_units_at_once_are_refused(api: Api) -> None:
    api.create()
    create(api, length=10_000, unit=1)
    lease = api.lease()
    assert slug(ask(api, lease, 1025)) == "malformed-request"
    assert slug(ask(api, lease, 0)) == "malformed-request"
    numbers = [number for _ in range(4) for number in claim(api, lease, 1024)]
    assert numbers == list(range(4096))
    assert slug(ask(api, lease)) == "malformed-request"
    assert slug(push(api, lease, 0, f"train={','.join(map(str, range(1025)))}")) == "malformed-request"
    assert counted(api, lease, 0, f"train={','.join(map(str, range(1024)))}")["decision"] == "applied"
    assert claim(api, lease, 1024) == list(range(4096, 5120))
    assert len(give_back(api, lease)) == 4096
    assert show(api)["out"] == 0


def test_units_that_a_lease_does_not_have_are_refused_before_the_body(api: Api, service: ThreadService) -> None:
    api.create()
    create(api, length=100, unit=1)
    mine, other = api.lease("mine"), api.lease("other")
    assert claim(api, mine, 2) == [0, 1] and claim(api, other, 2) == [2, 3]
    counted(api, mine, 0, "train=1")
    before = api.state(service)
    for units, unheld in (("train=0,2", "train=2"), ("train=0,1,50", "train=1,50"), ("other=0;train=0", "other=0")):
        # The body is none: it is not read.
        answer = push(api, mine, 1, units, body=b"no tensors")
        assert slug(answer) == "unit-not-held" and answer.json()["units"] == unheld
    assert api.state(service) == before
    assert counted(api, mine, 1, "train=0")["decision"] == "applied"


def test_a_retry_finds_its_receipt_before_its_units_are_looked_for(api: Api) -> None:
    api.create()
    create(api)
    lease = api.lease()
    claim(api, lease, 2)
    first, again = push(api, lease, 0, "train=0", "key"), push(api, lease, 0, "train=0", "key")
    assert first.json() == {**again.json(), "replayed": False} and again.json()["replayed"]
    assert slug(push(api, lease, 0, "train=1", "key")) == "idempotency-conflict"
    assert slug(push(api, lease, 0, None, "key")) == "idempotency-conflict"
    assert show(api)["done"] == 1


def test_a_claim_that_comes_again_is_given_the_same_units(api: Api) -> None:
    api.create()
    create(api, length=100, unit=1)
    lease = api.lease()
    assert claim(api, lease, 3, Idempotency_Key="a") == [0, 1, 2]
    counted(api, lease, 0, "train=1")
    assert claim(api, lease, 3, Idempotency_Key="a") == [0, 2]
    assert claim(api, lease, 1, Idempotency_Key="b") == [3]
    assert claim(api, lease, 1) == [4]
    assert claim(api, lease, 1, Idempotency_Key="b") == [3]


def test_dropped_and_refused_pushes_open_their_units_again(api: Api) -> None:
    api.create(aggregation={"policy": "async", "max_staleness": 0})
    create(api, length=100, unit=1)
    slow, fast = api.lease("slow"), api.lease("fast")
    claim(api, slow, 3)
    counted(api, fast, 0, f"train={claim(api, fast)[0]}")
    assert counted(api, slow, 0, "train=0,2")["decision"] == "dropped"
    assert slug(push(api, slow, 1, "train=0")) == "unit-not-held"
    assert slug(push(api, slow, 1, "train=1", tensors=NAN)) == "non-finite-gradient"
    assert slug(push(api, slow, 1, "train=1")) == "unit-not-held"
    assert claim(api, fast, 4) == [0, 1, 2, 4]
    assert show(api)["done"] == 1


def test_accumulated_pushes_have_counted(api: Api) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    create(api)
    lease = api.lease()
    claim(api, lease, 2)
    assert counted(api, lease, 0, "train=0")["decision"] == "accumulated"
    assert show(api)["done"] == 1
    assert counted(api, lease, 0, "train=1")["decision"] == "applied"
    assert show(api)["done"] == 2


def test_units_of_a_lease_that_ends_are_handed_out_again(api: Api) -> None:
    api.create()
    create(api, length=100, unit=1)
    released, replaced, expired = api.lease("released"), api.lease("replaced"), api.lease("expired", ttl_ms=300)
    assert [claim(api, lease, 2) for lease in (released, replaced, expired)] == [[0, 1], [2, 3], [4, 5]]
    api.http.delete(api.path(f"/leases/{released['lease']}"))
    api.lease("replaced")
    taker = api.lease("taker")
    assert claim(api, taker, 4) == [0, 1, 2, 3]
    wait_until(lambda: show(api)["out"] == 4)
    assert claim(api, taker, 2) == [4, 5]
    assert slug(push(api, replaced, 0, "train=2")) == "lease-expired"
    assert slug(ask(api, replaced)) == "lease-expired"


def test_units_are_given_back(api: Api) -> None:
    api.create()
    create(api, length=100, unit=1)
    create(api, "other", length=100, unit=1)
    mine, other = api.lease("mine"), api.lease("other")
    assert claim(api, mine, 4) == [0, 1, 2, 3] == claim(api, mine, 4, "other")
    assert claim(api, other, 1) == [4]
    assert give_back(api, mine, [3, 1, 4, 77]) == [1, 3]
    assert give_back(api, mine, [1, 3]) == []
    assert claim(api, other, 3) == [1, 3, 5]
    assert give_back(api, mine) == [0, 2]
    assert show(api, "other")["out"] == 4
    refused = api.http.delete(api.path("/data/train/units"), params={"units": "1,x"}, headers=holder(mine))
    assert slug(refused) == "malformed-request"
    assert slug(api.http.delete(api.path("/data/none/units"), headers=holder(mine))) == "data-not-found"
    assert slug(ask(api, mine, name="none")) == "data-not-found"


def test_who_has_units_is_shown(api: Api) -> None:
    api.create()
    create(api, length=10, unit=4, passes=None)
    a, b = api.lease("a"), api.lease("b")
    claim(api, a, 2), claim(api, b, 2)
    counted(api, a, 0, "train=0")
    status = show(api)
    assert [(each["worker"], each["units"]) for each in status["holders"]] == [("a", 1), ("b", 2)]
    assert all(each["oldest_ms"] >= 0 for each in status["holders"])
    assert status["passes"] == [
        {"pass": 0, "open": 0, "out": 2, "done": 1},
        {"pass": 1, "open": 2, "out": 1, "done": 0},
    ]
    assert status["open"] is None and status["passes_done"] == 0 and not status["exhausted"]


def test_a_claim_waits_for_units_that_are_given_back(api: Api) -> None:
    api.create()
    create(api)
    mine, other = api.lease("mine"), api.lease("other")
    claim(api, mine, 3)
    assert ask(api, other).json() == {"units": [], "exhausted": False}
    waiting = under_way(lambda: claim(api, other, 1, Prefer="wait=600"))
    give_back(api, mine, [1])
    assert waiting.result() == [1]
    ended = under_way(lambda: ask(api, mine, Prefer="wait=600").json())
    counted(api, mine, 0, "train=0,2")
    counted(api, other, 1, "train=1")
    assert ended.result() == {"units": [], "exhausted": True}


def test_two_data_sets_count_for_themselves(api: Api) -> None:
    api.create()
    create(api, length=100, unit=1), create(api, "other", length=100, unit=1)
    lease = api.lease()
    claim(api, lease, 3), claim(api, lease, 2, "other")
    counted(api, lease, 0, "other=1;train=0,2")
    assert show(api)["done"] == 2 and show(api, "other")["done"] == 1
    api.http.delete(api.path(f"/leases/{lease['lease']}"))
    taker = api.lease("taker")
    assert claim(api, taker, 2) == [1, 3] and claim(api, taker, 2, "other") == [0, 2]


def test_a_deleted_run_leaves_nothing_of_its_data(api: Api, service: ThreadService) -> None:
    api.create()
    create(api)
    lease = api.lease()
    claim(api, lease, 2)
    give_back(api, lease, [0])
    api.http.delete(api.path())
    assert service.redis_dump(api.redis_key()) == {api.redis_key("deleted"): "1"}
    api.create()
    assert slug(api.http.get(api.path("/data/train"))) == "data-not-found"


def test_ten_million_units_cost_kilobytes(api: Api, service: ThreadService) -> None:
    api.create()
    create(api, length=10_000_000 * 16, unit=16)
    lease = api.lease()
    for step in range(20):
        numbers = claim(api, lease, 100)
        counted(api, lease, step, f"train={','.join(map(str, numbers[1:]))}")
        give_back(api, lease)
    with service.redis() as client:
        names = (api.redis_key(name) for name in ("out", "held", "back"))
        used = sum(client.memory_usage(name, samples=0) or 0 for name in names)
        used += len(json.dumps(client.hgetall(api.redis_key("run"))))
    assert used < 16 * 1024
    status = show(api)
    assert status["done"] + status["open"] == 10_000_000 and status["out"] == 0
