"""The policies, over plain HTTP and against plain references."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
import safetensors.torch
import schedulefree
import torch
from torch import Tensor

from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import SGD, TENSORS, Api, slug
from reference import ScheduleFree, fadas


def scaled(factor: float) -> dict[str, Tensor]:
    return {name: factor * tensor for name, tensor in TENSORS.items()}


def decisions(answers: list[httpx.Response]) -> list[str]:
    return [answer.json()["decision"] for answer in answers]


def test_async_takes_any_staleness(api: Api) -> None:
    api.create(aggregation={"policy": "async"})
    lease = api.lease()
    assert decisions([api.push(lease, 0) for _ in range(12)]) == ["applied"] * 12


def test_given_fields_overrule_a_policys_own(api: Api) -> None:
    api.create(aggregation={"policy": "async", "max_staleness": 2, "batch": 2})
    lease = api.lease()
    assert decisions([api.push(lease, 0) for _ in range(7)]) == ["accumulated", "applied"] * 3 + ["dropped"]


def test_ringmaster_drops_what_is_older_than_its_bound(api: Api) -> None:
    api.create(aggregation={"policy": "ringmaster", "max_staleness": 1})
    lease = api.lease()
    answers = [api.push(lease, taken_at) for taken_at in (0, 0, 0, 1, 2)]
    assert decisions(answers) == ["applied", "applied", "dropped", "applied", "applied"]
    assert answers[2].json() == {"decision": "dropped", "reason": "stale", "step": 2, "staleness": 2, "replayed": False}


@pytest.mark.parametrize(("workers", "bound"), [(1, 4), (3, 12)])
def test_ringmasters_own_bound_is_four_steps_a_live_worker(api: Api, workers: int, bound: int) -> None:
    api.create(aggregation={"policy": "ringmaster"})
    leases = [api.lease(f"worker-{number}") for number in range(workers)]
    answers = [api.push(leases[0], 0) for _ in range(bound + 2)]
    assert decisions(answers) == ["applied"] * (bound + 1) + ["dropped"]


def test_a_dropped_push_brings_fresh_y_and_moves_nothing(api: Api, service: ThreadService) -> None:
    api.create(aggregation={"policy": "quorum", "batch": 1})
    lease = api.lease()
    api.push(lease, 0)
    points = api.state(service)["points"]
    late = api.push(lease, 0, Prefer="return=representation")
    assert late.headers["Freestep-Decision"] == "dropped"
    assert late.headers["Freestep-Reason"] == "stale"
    assert late.headers["Freestep-Step"] == "1"
    assert late.content == points[1]
    assert api.state(service)["points"] == points


def test_sync_waits_for_every_live_worker(api: Api, service: ThreadService, connect: Callable[..., Api]) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    leases = [api.lease(f"worker-{number}") for number in range(3)]
    callers = [connect(service.url, api.run) for _ in leases[:2]]
    waiting = [
        under_way(partial(caller.push, lease, 0, Prefer="wait=30"))
        for caller, lease in zip(callers, leases, strict=False)
    ]
    wait_until(lambda: api.status()["pushes"]["accumulated"] == 2)
    assert api.status()["step"] == 0
    last = api.push(leases[2], 0, Prefer="wait=30").json()
    receipts = [last, *(each.result().json() for each in waiting)]
    assert [(receipt["decision"], receipt["step"]) for receipt in receipts] == [("applied", 1)] * 3
    assert not api.pull("y")[0]["w"].any()


def test_a_dead_workers_lease_runs_out_and_sync_goes_on_without_it(api: Api) -> None:
    api.create(aggregation={"policy": "sync"})
    api.lease("dead", ttl_ms=300)
    receipt = api.push(api.lease("alive"), 0, Prefer="wait=30").json()
    assert (receipt["decision"], receipt["step"]) == ("applied", 1)
    assert [worker["worker"] for worker in api.status()["workers"]] == ["alive"]


def test_a_released_lease_is_not_waited_for(api: Api, service: ThreadService, connect: Callable[..., Api]) -> None:
    api.create(aggregation={"policy": "sync"})
    leaving, staying = api.lease("leaving"), api.lease("staying")
    waiting = under_way(partial(connect(service.url, api.run).push, staying, 0, Prefer="wait=30"))
    wait_until(lambda: api.status()["pushes"]["accumulated"] == 1)
    api.http.delete(api.path(f"/leases/{leaving['lease']}"))
    assert waiting.result().json()["decision"] == "applied"


def test_a_worker_that_joins_is_waited_for(api: Api) -> None:
    api.create(aggregation={"policy": "sync"})
    first, second = api.lease("first"), api.lease("second")
    assert api.push(first, 0).json()["decision"] == "accumulated"
    third = api.lease("third")
    assert decisions([api.push(second, 0), api.push(third, 0)]) == ["accumulated", "applied"]


def test_a_worker_that_pushed_and_died_still_counts(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    gone, alive = api.lease("gone"), api.lease("alive")
    api.push(gone, 0, tensors=scaled(2))
    api.http.delete(api.path(f"/leases/{gone['lease']}"))
    assert api.push(alive, 0, tensors=scaled(0)).json()["decision"] == "applied"
    assert not api.pull("y")[0]["w"].any()


@pytest.mark.parametrize("policy", [{"policy": "sync"}, {"policy": "quorum", "batch": 2}])
def test_a_worker_contributes_once(api: Api, policy: dict[str, Any]) -> None:
    api.create(aggregation=policy)
    one, two = api.lease("one"), api.lease("two")
    answers = [api.push(one, 0), api.push(one, 0), api.push(two, 0)]
    assert decisions(answers) == ["accumulated", "dropped", "applied"]
    assert answers[1].json()["reason"] == "duplicate-worker"
    restarted = api.lease("one")
    assert decisions([api.push(restarted, 1), api.push(restarted, 1)]) == ["accumulated", "dropped"]


def test_quorum_takes_the_first_and_drops_the_late(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "quorum", "batch": 2})
    leases = [api.lease(f"worker-{number}") for number in range(3)]
    answers = [api.push(lease, 0, tensors=scaled(number)) for number, lease in enumerate(leases)]
    assert decisions(answers) == ["accumulated", "applied", "dropped"]
    torch.testing.assert_close(api.pull("y")[0]["w"], 0.5 * TENSORS["w"])


def test_buffered_takes_any_pushes_of_anybody(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "buffered", "batch": 3})
    lease = api.lease()
    answers = [api.push(lease, 0, tensors=scaled(factor)) for factor in (0.1, 0.2, 0.3, 0.4)]
    assert decisions(answers) == ["accumulated", "accumulated", "applied", "accumulated"]
    assert [answer.json()["staleness"] for answer in answers] == [0, 0, 0, 1]
    torch.testing.assert_close(api.pull("y")[0]["w"], 0.8 * TENSORS["w"])


def test_rennala_takes_fresh_pushes_of_anybody(api: Api) -> None:
    api.create(aggregation={"policy": "rennala", "batch": 2})
    lease = api.lease()
    answers = [api.push(lease, taken_at) for taken_at in (0, 0, 0, 1, 1)]
    assert decisions(answers) == ["accumulated", "applied", "dropped", "accumulated", "applied"]


def test_a_groups_gradient_is_weighted_by_samples(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "buffered", "batch": 3})
    lease = api.lease()
    api.push(lease, 0, tensors=scaled(0.5), Freestep_Samples="6")
    api.push(lease, 0, tensors=scaled(0.25), Freestep_Samples="3")
    api.push(lease, 0, tensors=scaled(-1.0))
    mean = (6 * 0.5 + 3 * 0.25 - 1.0) / 10
    torch.testing.assert_close(api.pull("y")[0]["w"], (1 - mean) * TENSORS["w"])


def test_each_push_of_a_group_is_clipped(api: Api) -> None:
    api.create(optimizer={**SGD, "max_grad_norm": 1.0}, aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    api.push(lease, 0, tensors=scaled(100.0))
    api.push(lease, 0, tensors=scaled(0.0))
    whole = float(torch.cat([tensor.reshape(-1) for tensor in TENSORS.values()]).norm())
    torch.testing.assert_close(api.pull("y")[0]["w"], (1 - 0.5 / whole) * TENSORS["w"])


@pytest.mark.parametrize(
    ("damping", "factors"),
    [("delay_adaptive", [1, 1, 2 / 2, 2 / 3]), ("inverse_sqrt", [1, 2**-0.5, 3**-0.5, 4**-0.5])],
)
def test_stale_steps_are_damped(api: Api, damping: str, factors: list[float]) -> None:
    api.create(optimizer={"algorithm": "sgd", "lr": 0.1}, aggregation={"policy": "async", "staleness_damping": damping})
    lease = api.lease("one")
    api.lease("two")
    for _ in factors:
        api.push(lease, 0)
    torch.testing.assert_close(api.pull("y")[0]["w"], (1 - 0.1 * sum(factors)) * TENSORS["w"])


def test_a_groups_damping_is_the_mean_of_its_pushes(api: Api) -> None:
    spec = {"policy": "buffered", "batch": 2, "staleness_damping": "inverse_sqrt"}
    api.create(optimizer={"algorithm": "sgd", "lr": 0.1}, aggregation=spec)
    lease = api.lease()
    for taken_at, samples in ((0, "1"), (0, "1"), (0, "3"), (1, "1")):
        api.push(lease, taken_at, Freestep_Samples=samples)
    factors = 1 + (3 * 2**-0.5 + 1) / 4
    torch.testing.assert_close(api.pull("y")[0]["w"], (1 - 0.1 * factors) * TENSORS["w"])


FADAS = {"staleness_damping": "fadas", "staleness_threshold": 2}


def test_above_its_threshold_fadas_bounds_the_learning_rate(api: Api) -> None:
    api.create(optimizer={"algorithm": "sgd", "lr": 0.3}, aggregation={"policy": "async", **FADAS})
    lease = api.lease()
    for _ in range(7):
        api.push(lease, 0)
    rates = [fadas(0.3, staleness, 2) for staleness in range(7)]
    assert rates == [0.3, 0.3, 0.3, 0.3, 1 / 4, 1 / 5, 1 / 6]
    torch.testing.assert_close(api.pull("y")[0]["w"], (1 - sum(rates)) * TENSORS["w"])


def test_fadas_takes_a_group_for_as_stale_as_its_stalest_push(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    """Wherever that is in the group, and with a restart in the middle of one."""
    service = start_service()
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation={"policy": "buffered", "batch": 3, **FADAS})
    lease, rates = api.lease(), []
    for group in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 0), (4, 4, 0), (5, 3, 2), (0, 6, 6)):
        for number, taken_at in enumerate(group):
            if (len(rates), number) == (6, 2):
                service.stop()
                service = start_service()
                api = connect(service.url, api.run)
                lease = api.lease()
            assert api.push(lease, taken_at, tensors=scaled(1.0)).status_code == 200
        rates.append(fadas(1.0, len(rates) - min(group), 2))
    assert rates == [1, 1, 1, 1 / 3, 1 / 4, 1 / 3, 1 / 6]
    torch.testing.assert_close(api.pull("y")[0]["w"], (1 - sum(rates)) * TENSORS["w"])


@pytest.mark.parametrize(
    "aggregation",
    [
        {"policy": "async", "staleness_damping": "fadas"},
        {"policy": "async", "staleness_threshold": 2},
        {"policy": "async", "staleness_damping": "inverse_sqrt", "staleness_threshold": 2},
    ],
)
def test_fadas_and_its_threshold_belong_together(api: Api, aggregation: dict[str, Any]) -> None:
    answer = api.http.put(api.path(), json=api.spec(aggregation=aggregation))
    assert (answer.status_code, slug(answer)) == (422, "invalid-spec")
    assert answer.json()["field"] == "aggregation.staleness_threshold"


def test_a_wait_that_runs_out_leaves_the_push_accumulated(api: Api) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    answer = api.push(api.lease(), 0, Prefer="wait=0.05, return=representation")
    assert answer.headers["Freestep-Decision"] == "accumulated"
    assert answer.headers["Preference-Applied"] == "return=representation, wait=0.05"
    assert torch.equal(safetensors.torch.load(answer.content)["w"], TENSORS["w"])


def test_a_group_is_one_step_of_the_package_on_the_mean(api: Api) -> None:
    api.create(
        optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1, "weight_decay": 0.01, "warmup_steps": 3},
        aggregation={"policy": "quorum", "batch": 2},
    )
    leases = [api.lease(f"worker-{number}") for number in range(2)]
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in TENSORS.items()}
    peer = schedulefree.AdamWScheduleFree(parameters.values(), lr=0.1, weight_decay=0.01, warmup_steps=3)
    peer.train()
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        pushed = [
            {name: torch.randn(tensor.shape, generator=generator) for name, tensor in TENSORS.items()} for _ in leases
        ]
        api.push(leases[0], step, tensors=pushed[0], Freestep_Samples="32")
        assert api.push(leases[1], step, tensors=pushed[1], Freestep_Samples="8").json()["step"] == step + 1
        for name, parameter in parameters.items():
            parameter.grad = (32 * pushed[0][name] + 8 * pushed[1][name]) / 40
        peer.step()
    for point in "yx":
        if point == "x":
            peer.eval()
        pulled, _ = api.pull(point)
        for name, parameter in parameters.items():
            torch.testing.assert_close(pulled[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", ["none", "delay_adaptive", "inverse_sqrt"])
def test_damping_scales_the_step_of_schedule_free_and_not_its_average(api: Api, damping: str) -> None:
    optimizer = {"algorithm": "sgd_schedule_free", "lr": 0.5, "delay_correction": {"name": "none"}}
    api.create(optimizer=optimizer, aggregation={"policy": "async", "staleness_damping": damping})
    lease = api.lease()
    factor = {
        "none": lambda _: 1.0,
        "delay_adaptive": lambda t: 1 / max(t, 1),
        "inverse_sqrt": lambda t: (1 + t) ** -0.5,
    }
    peer = ScheduleFree(TENSORS["w"], lr=0.5, beta=0.9)
    for step in range(6):
        api.push(lease, 0)
        peer.step(TENSORS["w"], factor[damping](step))
    for point in "xyz":
        torch.testing.assert_close(api.pull(point)[0]["w"], getattr(peer, point).float())


@pytest.mark.parametrize("end", ["released", "expired"])
def test_an_update_closed_by_the_end_of_a_lease_shows_in_the_metrics(
    api: Api, service: ThreadService, end: str
) -> None:
    api.create(aggregation={"policy": "sync"})
    leaving = api.lease("leaving")
    assert api.push(api.lease("staying"), 0).json()["decision"] == "accumulated"
    if end == "released":
        api.http.delete(api.path(f"/leases/{leaving['lease']}"))
    else:
        with service.redis() as client:
            client.zadd(api.redis_key("leases"), {"leaving": 1})
    assert api.http.get(api.path("/parameters"), params={"min_step": 1}, headers={"Prefer": "wait=30"}).is_success
    wait_until(lambda: f'freestep_step{{run="{api.run}"}} 1.0' in api.http.get("/metrics").text)


def test_who_waits_for_a_group_that_a_restore_gave_up_is_told(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    waiting = under_way(partial(connect(service.url, api.run).push, api.lease(), 0, Prefer="wait=60"))
    writer = service.registry.get(api.run).shard(0).core.writer
    wait_until(lambda: bool(writer._waiters))
    api.http.post(api.path("/checkpoints/0/restore"))
    answer = waiting.result()
    assert (answer.status_code, slug(answer)) == (409, "epoch-changed")
    lease = api.lease()
    assert decisions([api.push(lease, 0), api.push(lease, 0)]) == ["accumulated", "applied"]
