"""Robust rules, over plain HTTP and against plain torch: what they make of pushes, whom they name, whom they ban."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from encoded import assemble, topk
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import SGD, TENSORS, Api, slug

CLIP = {"policy": "async", "robust": "clip"}
MEDIAN: dict[str, Any] = {"policy": "quorum", "batch": 3, "robust": "coordinate_median"}
TRIMMED = {"policy": "quorum", "batch": 3, "robust": "trimmed_mean", "beta": 0.2}
KRUM = {"policy": "quorum", "batch": 5, "robust": "krum", "f": 1, "m": 2}


def scaled(factor: float) -> dict[str, Tensor]:
    return {name: factor * tensor for name, tensor in TENSORS.items()}


def outcomes(answers: list[httpx.Response]) -> list[tuple[str, str | None]]:
    return [(answer.json()["decision"], answer.json().get("reason")) for answer in answers]


def has_moved(api: Api, factor: float) -> None:
    """The weights are these times TENSORS."""
    pulled, _ = api.pull("y")
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(pulled[name], factor * tensor, rtol=1e-6, atol=1e-6)


def test_clip_cuts_a_push_at_the_usual_norm_and_names_outliers(api: Api) -> None:
    api.create(optimizer=SGD, aggregation=CLIP)
    lease = api.lease()
    factors = (0.125, 0.125, 0.125, 0.125, 1.0, 100.0)
    answers = [api.push(lease, max(step - 1, 0), tensors=scaled(each)) for step, each in enumerate(factors)]
    usual = ("applied", None)
    assert outcomes(answers) == [("dropped", "norms-unknown"), usual, usual, usual, usual, ("applied", "outlier")]
    # The first was not applied, and the last two are clipped to the others' norm.
    has_moved(api, 1 - 3 * 0.125 - 2 * 0.125)
    status = api.status()
    assert (status["step"], status["outliers"], status["pushes"]["dropped"]) == (5, {"worker": 1}, 1)
    assert [worker["outliers"] for worker in status["workers"]] == [1]


@pytest.mark.parametrize(("max_grad_norm", "left"), [(0.25, 0.1875), (0.15, 0.15)])
def test_the_smaller_of_both_bounds_counts(api: Api, max_grad_norm: float, left: float) -> None:
    norm = float(torch.cat([tensor.reshape(-1) for tensor in TENSORS.values()]).norm())
    optimizer = SGD | {"max_grad_norm": max_grad_norm * norm}
    api.create(optimizer=optimizer, aggregation=CLIP | {"clip_factor": 1.5})
    lease = api.lease()
    for step, factor in enumerate((0.125, 0.125, 1.0, 0.25)):
        api.push(lease, max(step - 1, 0), tensors=scaled(factor))
    has_moved(api, 1 - 0.125 - 2 * left)


def test_claimed_samples_do_not_weigh_under_a_robust_rule(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "quorum", "batch": 2, "robust": "clip"})
    leases = [api.lease(f"worker-{number}") for number in range(2)]
    for lease in leases:
        assert outcomes([api.push(lease, 0, tensors=scaled(0.25))]) == [("dropped", "norms-unknown")]
    api.push(leases[0], 0, tensors=scaled(0.25), Freestep_Samples="1000000")
    api.push(leases[1], 0, tensors=scaled(-0.25))
    has_moved(api, 1.0)


def test_rules_that_compare_take_one_push_of_each_worker(api: Api) -> None:
    api.create(optimizer=SGD, aggregation=MEDIAN | {"policy": "buffered"})
    leases = [api.lease(f"worker-{number}") for number in range(3)]
    answers = [
        api.push(leases[number], 0, tensors=scaled(factor)) for number, factor in ((0, 0.5), (0, 0.5), (1, -9.0))
    ]
    assert outcomes(answers) == [("accumulated", None), ("dropped", "duplicate-worker"), ("accumulated", None)]
    assert outcomes([api.push(leases[2], 0, tensors=scaled(0.25))]) == [("applied", None)]
    has_moved(api, 1 - 0.25)


def test_an_update_that_a_leases_end_closes_is_made_of_what_there_is(api: Api) -> None:
    aggregation = {"policy": "sync", "robust": "trimmed_mean", "beta": 0.3, "max_batch": 8}
    api.create(optimizer=SGD, aggregation=aggregation)
    leases = [api.lease(f"worker-{number}") for number in range(4)]
    for lease, factor in zip(leases, (0.5, 100.0, 0.25), strict=False):
        api.push(lease, 0, tensors=scaled(factor))
    assert api.http.delete(api.path(f"/leases/{leases[3]['lease']}")).status_code == 204
    wait_until(lambda: api.status()["step"] == 1)
    has_moved(api, 1 - 0.5)


def test_krum_takes_the_push_that_others_are_near(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "quorum", "batch": 5, "robust": "krum", "f": 1})
    for number, factor in enumerate((1000.0, 0.5, 0.25, 0.3125, -0.25)):
        answer = api.push(api.lease(f"worker-{number}"), 0, tensors=scaled(factor))
    assert answer.json()["decision"] == "applied"
    # Of the distances to the two nearest, in sixteenths: 3 and 4 of 0.5, 1 and 4 of 0.25, 1 and 3 of 0.3125.
    has_moved(api, 1 - 0.3125)


@pytest.mark.parametrize(
    ("aggregation", "interruption"),
    [
        (MEDIAN, "restart"),
        (MEDIAN, "reshard"),
        (TRIMMED, "restore"),
        (TRIMMED, "reshard"),
        (KRUM, "restart"),
        (KRUM, "restore"),
        (KRUM, "reshard"),
    ],
)
def test_an_update_that_is_interrupted_is_the_same(
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    redis_url: str,
    aggregation: dict[str, Any],
    interruption: str,
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1}, aggregation=aggregation)
    batch = aggregation["batch"]
    factors = (0.5, -3.0, 0.25, 1000.0, 0.375)[:batch]

    def push(number: int) -> httpx.Response:
        return api.push(api.lease(f"worker-{number}"), 0, tensors=scaled(factors[number]))

    answers = [push(number) for number in range(batch - 1)]
    match interruption:
        case "restart":
            service.stop()
            api = connect(start_service(redis_url=redis_url).url, api.run)
        case "restore":
            assert api.http.post(api.path("/checkpoints")).status_code == 201
            push(batch - 1)
            assert api.status()["step"] == 1
            assert api.http.post(api.path("/checkpoints/0/restore")).is_success
        case "reshard":
            assert api.http.post(api.path("/reshard"), json={"shards": 3}).is_success
    answers.append(push(batch - 1))
    assert [answer.json()["decision"] for answer in answers] == ["accumulated"] * (batch - 1) + ["applied"]
    pulled, step = api.pull("z")
    assert step == 1
    expected = connect(service.url if interruption != "restart" else api.url)
    expected.create(optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1}, aggregation=aggregation)
    for number, factor in enumerate(factors):
        expected.push(expected.lease(f"worker-{number}"), 0, tensors=scaled(factor))
    assert all(torch.equal(pulled[name], tensor) for name, tensor in expected.pull("z")[0].items())


@pytest.mark.parametrize("interruption", ["restart", "restore"])
def test_norms_and_bans_are_part_of_the_state(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, interruption: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation=CLIP | {"ban_after": 1})
    lease, spoiler = api.lease(), api.lease("spoiler")
    outcomes([api.push(each, 0, tensors=scaled(0.125)) for each in (lease, spoiler)])
    assert outcomes([api.push(spoiler, 0, tensors=scaled(100.0))]) == [("applied", "outlier")]
    if interruption == "restart":
        service.stop()
        api = connect(start_service(redis_url=redis_url).url, api.run)
    else:
        assert api.http.post(api.path("/checkpoints")).status_code == 201
        assert api.http.post(api.path("/checkpoints/1/restore")).is_success
    refused = api.http.post(api.path("/leases"), json={"worker": "spoiler"})
    assert (refused.status_code, slug(refused), refused.json()["outliers"]) == (403, "worker-banned", 1)
    assert api.status()["outliers"] == {"spoiler": 1}
    assert outcomes([api.push(api.lease(), 1, tensors=scaled(100.0))]) == [("applied", "outlier")]
    has_moved(api, 1 - 2 * 0.125)


def test_a_banned_worker_is_out_at_once(api: Api, service: ThreadService) -> None:
    api.create(optimizer=SGD, aggregation=CLIP | {"ban_after": 1})
    lease, spoiler = api.lease(), api.lease("spoiler")
    for each in (lease, spoiler):
        api.push(each, 0)
    answer = api.push(spoiler, 0, "outlier", tensors=scaled(100.0))
    assert outcomes([answer]) == [("applied", "outlier")]
    assert [worker["worker"] for worker in api.status()["workers"]] == ["worker"]
    with service.redis() as client:
        wait_until(lambda: not client.hexists(f"freestep:{{{api.run}}}:workers", "spoiler"))
    before = api.state(service)
    assert slug(api.push(spoiler, 1)) == "lease-expired"
    assert slug(api.http.put(api.path(f"/leases/{spoiler['lease']}"))) == "lease-expired"
    assert slug(api.http.post(api.path("/leases"), json={"worker": "spoiler"})) == "worker-banned"
    again = api.push(spoiler, 0, "outlier", tensors=scaled(100.0))
    assert again.json() == answer.json() | {"replayed": True}
    assert api.state(service) == before


def test_top_k_is_refused_under_a_rule_by_coordinate(api: Api, service: ThreadService) -> None:
    api.create(aggregation=MEDIAN)
    lease = api.lease()
    before = api.state(service)
    answer = api.push(lease, 0, body=assemble(*topk(TENSORS, 0.5)))
    assert (answer.status_code, slug(answer)) == (422, "malformed-tensors")
    assert "dense, int8" in answer.json()["detail"]
    assert api.state(service) == before


def test_krum_is_refused_where_too_many_shards_would_compare_too_many_pushes(api: Api) -> None:
    many = KRUM | {"batch": 256}
    refused = api.http.put(api.path(), json=api.spec(aggregation=many, shards=33))
    assert (refused.status_code, slug(refused), refused.json()["field"]) == (422, "invalid-spec", "shards")
    api.create(aggregation=many)
    refused = api.http.post(api.path("/reshard"), json={"shards": 33})
    assert (refused.status_code, slug(refused), refused.json()["field"]) == (422, "invalid-spec", "shards")
    assert api.status()["shards"] == 1
