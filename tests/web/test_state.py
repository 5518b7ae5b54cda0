"""The whole state of a run: out of one run and into another, which then takes the very same steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forms import FORMS, own
from harness import OWN_HEAD, ProcessService, ThreadService
from meanwhile import at_once, wait_until
from plain_calls import TENSORS, Api, persistently, slug
from raw_pushes import connected
from states import body_of, changed, document_of, export, free_memory, import_, points, tensors_of, train

PARAMETERS = [
    {"name": name, "shape": list(tensor.shape), "group": "own" if name == "b" else "default"}
    for name, tensor in TENSORS.items()
]


def grouped(form: str) -> dict[str, Any]:
    """Changes of a spec: an algorithm whose second param group has hyperparameters of its own."""
    return {
        "optimizer": FORMS[form],
        "parameters": PARAMETERS,
        "groups": {"own": own(form, lr=0.02, weight_decay=0.1)},
    }


@pytest.fixture
def other(service: ThreadService, connect: Callable[..., Api]) -> Api:
    """Another run of the same service, which there is not yet."""
    return connect(service.url)


@pytest.fixture
def moved(api: Api, other: Api) -> bytes:
    """The state of `api` after three steps, which `other` has gone on from for two more."""
    api.create()
    train(api, 0, 3)
    state = export(api)
    assert import_(other, state).status_code == 201
    train(other, 3, 5)
    return state


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_from_anothers_state_to_the_bit(api: Api, other: Api, form: str) -> None:
    api.create(**grouped(form))
    train(api, 0, 4)
    state = export(api)
    answer = import_(other, state)
    assert (answer.status_code, answer.json()["step"], answer.json()["initialized"]) == (201, 4, True)
    assert points(other) == points(api)
    assert tensors_of(export(other)).keys() == tensors_of(state).keys()
    train(api, 4, 8)
    train(other, 4, 8)
    assert points(other) == points(api)
    here, there = export(api), export(other)
    assert document_of(there) == {**document_of(here), "epoch": 2}
    assert all(torch.equal(tensor, tensors_of(there)[name]) for name, tensor in tensors_of(here).items())


def test_the_state_of_a_run_with_a_loss_for_each_push(api: Api, other: Api) -> None:
    api.create(optimizer={"algorithm": "adamc_schedule_free_plus", "polyak_beta": 0.9})
    lease = api.lease()
    for step in range(3):
        api.push(lease, step, Freestep_Loss="2.5")
    assert import_(other, export(api)).status_code == 201
    for each in (api, other):
        assert each.push(each.lease(), 3, Freestep_Loss="1.5").json()["step"] == 4
    assert points(other) == points(api)


def test_the_body_names_each_tensor_of_each_vector_and_all_scalars(api: Api) -> None:
    api.create(optimizer={"algorithm": "adamw_schedule_free"})
    train(api, 0, 2)
    answer = api.http.get(api.path("/state"))
    assert answer.headers["Content-Type"] == "application/vnd.safetensors"
    assert (answer.headers["Freestep-Epoch"], answer.headers["Freestep-Step"]) == ("1", "2")
    tensors, document = tensors_of(answer.content), document_of(answer.content)
    assert {(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        (f"{name}::{buffer}", torch.float32, tensor.shape)
        for name, tensor in TENSORS.items()
        for buffer in ("y", "z", "exp_avg_sq")
    }
    assert torch.equal(tensors["w::z"], api.pull("z")[0]["w"])
    assert (document["spec"], document["epoch"], document["step"]) == (api.status()["spec"], 1, 2)
    assert document["scalars"]["default"].keys() == {
        "k", "weight_sum", "lr_max", "beta", "c", "staleness", "scheduled_lr",
    }  # fmt: skip


def test_a_run_without_weights_has_no_state(api: Api, other: Api) -> None:
    assert slug(other.http.get(other.path("/state"))) == "run-not-found"
    api.http.put(api.path(), json=api.spec())
    assert slug(api.http.get(api.path("/state"))) == "run-not-initialized"


def test_pushes_that_wait_for_their_update_and_receipts_do_not_travel(api: Api, other: Api) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    answers = [api.push(lease, min(number // 2, 1), f"key-{number}").json() for number in range(3)]
    assert [answer["decision"] for answer in answers] == ["accumulated", "applied", "accumulated"]
    assert import_(other, export(api)).status_code == 201
    assert points(other) == points(api)
    lease = other.lease()
    # A key of the other run's, and the first of its update.
    again = other.push(lease, 1, "key-2").json()
    assert (again["decision"], again["replayed"]) == ("accumulated", False)
    assert other.push(lease, 1, "key-3").json()["step"] == 2


def test_reported_metrics_and_what_they_have_changed_travel(api: Api, other: Api) -> None:
    plateau = {"name": "plateau", "metric": "loss", "patience": 0, "factor": 0.5}
    api.create(optimizer={"algorithm": "sgd", "lr": 1.0, "schedule": plateau})
    train(api, 0, 2)
    for step in (1, 2):
        api.http.post(api.path("/metrics"), json={"name": "loss", "value": 3.0, "step": step})
    assert import_(other, export(api)).status_code == 201
    assert other.status()["metrics"] == {"loss": {"value": 3.0, "step": 2}}
    assert document_of(export(other))["scalars"]["default"]["lr"] == 0.5
    again = other.http.post(other.path("/metrics"), json={"name": "loss", "value": 3.0, "step": 2})
    assert again.json()["replayed"] is True
    train(api, 2, 3)
    train(other, 2, 3)
    assert points(other) == points(api)


def test_a_run_that_has_no_weights_yet_takes_a_state(api: Api, other: Api) -> None:
    api.create()
    train(api, 0, 2)
    # Two shards, where the state is of a run of one.
    assert other.http.put(other.path(), json=other.spec(shards=2)).status_code == 201
    early = other.lease()
    answer = import_(other, export(api))
    assert (answer.status_code, answer.json()["shards"]) == (201, 2)
    assert points(other) == points(api)
    assert slug(other.push(early, 2)) == "epoch-changed"
    train(api, 2, 4)
    train(other, 2, 4)
    assert points(other) == points(api)


@pytest.mark.parametrize("durability", ["none", "checkpoint"])
def test_a_run_takes_a_state_whatever_its_durability(api: Api, other: Api, durability: str) -> None:
    api.create(durability=durability)
    train(api, 0, 2)
    assert import_(other, export(api)).status_code == 201
    kept = [each["step"] for each in other.http.get(other.path("/checkpoints")).json()["checkpoints"]]
    assert kept == ([2] if durability == "checkpoint" else [])
    train(other, 2, 3)


def test_a_run_that_has_weights_keeps_them(moved: bytes, other: Api, service: ThreadService) -> None:
    before = other.state(service)
    answer = import_(other, moved)
    assert (answer.status_code, slug(answer)) == (412, "already-initialized")
    assert slug(import_(other, moved, replace="false")) == "already-initialized"
    assert slug(import_(other, moved, replace="yes")) == "malformed-request"
    assert other.state(service) == before


def test_a_state_replaces_another_in_a_new_epoch(moved: bytes, api: Api, other: Api) -> None:
    lease = other.lease()
    answer = import_(other, moved, replace="true")
    assert (answer.status_code, answer.json()["epoch"], answer.json()["step"]) == (200, 3, 3)
    assert slug(other.push(lease, 3)) == "epoch-changed"
    assert points(other) == points(api)
    train(api, 3, 6)
    train(other, 3, 6)
    assert points(other) == points(api)


@pytest.mark.parametrize("path", ["/state", "/parameters?point=y&dtype=BF16"])
def test_a_state_replaces_only_what_its_sender_has_seen(
    moved: bytes, other: Api, service: ThreadService, path: str
) -> None:
    seen = {"If-Match": other.http.get(other.path(path)).headers["ETag"]}
    train(other, 5, 6, worker="another")
    before = other.state(service)
    answer = import_(other, moved, headers=seen, replace="true")
    assert (slug(answer), answer.json()["step"]) == ("epoch-changed", 6)
    assert other.state(service) == before
    seen = {"If-Match": other.http.get(other.path(path)).headers["ETag"]}
    assert slug(import_(other, moved, headers=seen)) == "already-initialized"
    assert import_(other, moved, headers=seen, replace="true").json()["epoch"] == 3
    assert slug(import_(other, moved, headers=seen, replace="true")) == "epoch-changed"


def test_of_two_who_replace_what_they_have_seen_one_does(moved: bytes, other: Api) -> None:
    seen = {"If-Match": other.http.get(other.path("/state")).headers["ETag"]}
    answers = at_once(*[lambda: persistently(lambda: import_(other, moved, headers=seen, replace="true"))] * 4)
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert (other.status()["epoch"], other.status()["step"]) == (3, 3)


def test_an_etag_needs_a_run_that_has_weights(moved: bytes, api: Api, other: Api, connect: Callable[..., Api]) -> None:
    blank = connect(api.url)
    seen = {"If-Match": '"e1-s3-state-F32"'}
    assert slug(import_(blank, moved, headers=seen)) == "run-not-found"
    blank.http.put(blank.path(), json=blank.spec())
    assert slug(import_(blank, moved, headers=seen)) == "run-not-initialized"
    assert blank.status()["initialized"] is False
    for text in ("*", "e1-s3", '"e1-s3', 'W/"e1-s3"', '"e1-sx-state"', '"e1-s3", "e1-s4"'):
        assert slug(import_(other, moved, headers={"If-Match": text}, replace="true")) == "malformed-request"


@pytest.mark.parametrize("query", [{}, {"replace": "true"}])
@pytest.mark.parametrize("has_weights", [False, True])
def test_the_state_of_another_run_is_refused(
    moved: bytes, api: Api, connect: Callable[..., Api], service: ThreadService, has_weights: bool, query: Any
) -> None:
    blank = connect(api.url)
    spec = blank.spec(optimizer={"algorithm": "sgd_schedule_free", "lr": 0.25})
    blank.http.put(blank.path(), json=spec)
    if has_weights:
        blank.initialize()
    before = blank.status()
    refused = "already-initialized" if has_weights and not query else "run-exists"
    assert slug(import_(blank, moved, **query)) == refused
    assert blank.status() == before


def test_an_import_that_is_sent_again_counts_once(moved: bytes, other: Api) -> None:
    again = {"Idempotency-Key": "one-import"}
    first = import_(other, moved, headers=again, replace="true")
    train(other, 3, 5)
    second = import_(other, moved, headers=again, replace="true")
    assert (first.status_code, second.status_code) == (200, 200)
    assert (second.json()["epoch"], second.json()["step"]) == (first.json()["epoch"], 5)
    assert slug(import_(other, moved, headers={"Idempotency-Key": "another"})) == "already-initialized"
    newer = other.http.get(other.path("/state")).content
    assert slug(import_(other, newer, headers=again, replace="true")) == "idempotency-conflict"
    assert other.status()["epoch"] == second.json()["epoch"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_state_is_put_as_a_whole(moved: bytes, other: Api, number: int) -> None:
    answer = import_(other, moved, shard=number, of=1, replace="true")
    assert (slug(answer), answer.json()["field"]) == ("malformed-request", "shard")
    assert other.status()["step"] == 5


def test_a_body_without_its_length_or_of_another_type_is_refused(moved: bytes, other: Api) -> None:
    path = other.path("/state?replace=true")
    assert slug(other.http.put(path, content=moved, headers={"Content-Type": "application/json"})) == (
        "unsupported-media-type"
    )
    chunked = {"Content-Type": "application/vnd.safetensors"}
    assert slug(other.http.put(path, content=iter([moved]), headers=chunked)) == "length-required"
    assert other.status()["step"] == 5


def test_what_there_is_no_memory_for_is_refused(moved: bytes, other: Api, service: ThreadService) -> None:
    memory = service.registry.get(other.run)._context.resources.memory
    before, taken = other.state(service), free_memory(memory) - 10
    assert memory.try_reserve(taken)
    try:
        assert slug(other.http.get(other.path("/state"))) == "overloaded"
        assert slug(import_(other, moved, replace="true")) == "overloaded"
        assert other.state(service) == before
    finally:
        memory.release(taken)
    assert import_(other, export(other), replace="true").status_code == 200
    assert free_memory(memory) == taken + 10


def test_a_reader_that_leaves_gives_its_memory_back(service: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(service.url)
    large = {"w": torch.ones(8, 1024, 1024)}
    api.http.put(api.path(), json=api.spec(parameters=[{"name": "w", "shape": [8, 1024, 1024]}]))
    api.initialize(large)
    memory = service.registry.get(api.run)._context.resources.memory
    free = free_memory(memory)
    with connected(api.url) as connection:
        connection.sendall(f"GET {api.path('/state')} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
        assert connection.recv(1024).startswith(b"HTTP/1.1 200")
        assert memory.free < free
    wait_until(lambda: memory.free == free)
    state = export(api)
    assert torch.equal(tensors_of(state)["w::z"], large["w"])
    with connected(api.url) as connection:
        head = f"PUT {api.path('/state?replace=true')} HTTP/1.1\r\n{OWN_HEAD}Content-Length: {len(state)}\r\n"
        connection.sendall(f"{head}Content-Type: application/vnd.safetensors\r\n\r\n".encode() + state[: 1024**2])
        wait_until(lambda: memory.free < free)
    wait_until(lambda: memory.free == free)
    assert api.status()["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_a_state_that_was_taken_outlives_a_kill(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], api: Api, redis_url: str, shards: int
) -> None:
    api.create()
    train(api, 0, 3)
    state = export(api)
    process = start_process(redis_url=redis_url)
    there = connect(process.url)
    assert there.http.put(there.path(), json=there.spec(shards=shards)).status_code == 201
    assert import_(there, state).status_code == 201
    process.kill()
    process.start()
    assert points(there) == points(api)
    train(there, 3, 6)
    assert import_(there, state, replace="true").status_code == 200
    process.kill()
    process.start()
    assert (there.status()["step"], points(there)) == (3, points(api))


@pytest.mark.slow
def test_a_kill_before_the_answer_leaves_the_old_state_or_the_new(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], api: Api
) -> None:
    api.create()
    train(api, 0, 3)
    state = export(api)
    process = start_process()
    there = connect(process.url)
    there.create()
    train(there, 0, 1)
    there.http.post(there.path("/checkpoints"))
    old = points(there)
    with connected(there.url) as connection:
        head = f"PUT {there.path('/state?replace=true')} HTTP/1.1\r\n{OWN_HEAD}Content-Length: {len(state)}\r\n"
        connection.sendall(f"{head}Content-Type: application/vnd.safetensors\r\n\r\n".encode() + state)
        process.send_signal(signal.SIGKILL)
    process.kill()
    process.start()
    assert points(there) in (old, points(api))
    assert there.status()["initialized"] is True


def test_after_an_orderly_stop_nothing_of_it_is_lost(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], api: Api, tmp_path: Path
) -> None:
    api.create()
    train(api, 0, 3)
    first = start_service(tmp_path / "data")
    there = connect(first.url, "moved")
    assert import_(there, export(api)).status_code == 201
    train(there, 3, 5)
    train(api, 3, 5)
    first.stop()
    again = connect(start_service(tmp_path / "data").url, "moved")
    assert (again.status()["epoch"], points(again)) == (2, points(api))


def test_scalars_of_older_checkpoints_do(api: Api, other: Api) -> None:
    """Those without what later versions have added: it has its first value."""
    api.create()
    train(api, 0, 2)

    def strip(document: dict[str, Any]) -> None:
        for name in ("beta", "c", "staleness"):
            del document["scalars"]["default"][name]
        del document["expected_staleness"], document["metrics"], document["epoch"]

    assert import_(other, changed(export(api), strip)).status_code == 201
    train(api, 2, 4)
    train(other, 2, 4)
    assert points(other) == points(api)


def test_tensors_may_come_in_any_order(api: Api, other: Api) -> None:
    api.create(optimizer={"algorithm": "adamw_schedule_free"})
    train(api, 0, 2)
    state = export(api)
    assert import_(other, body_of(tensors_of(state), document_of(state))).status_code == 201
    assert points(other) == points(api)
