"""Pushes: headers, answers and refusals, over plain HTTP. Bodies that are malformed are under tests/malformed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from select import select

import pytest
import safetensors.torch
import torch

from freestep.wire.receiver import MEDIA_TYPE
from harness import ThreadService
from meanwhile import at_once, wait_until
from plain_calls import BODY, SGD, TENSORS, Api, slug
from raw_pushes import answered, begun_push, is_pending
from states import export, tensors_of


def test_a_push_gets_a_receipt(api: Api) -> None:
    api.create()
    answer = api.push(api.lease(), 0)
    assert answer.status_code == 200
    assert answer.json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": False}


def test_staleness_is_in_the_receipt(api: Api) -> None:
    api.create()
    lease = api.lease()
    receipts = [api.push(lease, taken_at).json() for taken_at in (0, 0, 0, 3, 1)]
    assert [receipt["staleness"] for receipt in receipts] == [0, 1, 2, 0, 3]
    assert [receipt["step"] for receipt in receipts] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_push_may_be_answered_with_y(api: Api, dtype: str) -> None:
    api.create()
    lease = api.lease()
    headers = api.headers(lease, 0, Prefer="return=representation")
    answer = api.http.post(api.path("/gradients"), params={"dtype": dtype}, content=BODY, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == MEDIA_TYPE
    assert answer.headers["Preference-Applied"] == "return=representation"
    expected = {
        "Freestep-Decision": "applied",
        "Freestep-Step": "1",
        "Freestep-Receipt-Step": "1",
        "Freestep-Epoch": "1",
        "Freestep-Staleness": "0",
        "Freestep-Replayed": "false",
    }
    assert {name: answer.headers[name] for name in expected} == expected
    assert answer.content == api.http.get(api.path("/parameters"), params={"point": "y", "dtype": dtype}).content


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "I8"])
def test_answers_are_of_the_steps_that_they_name_while_others_push(api: Api, dtype: str) -> None:
    api.create(optimizer=SGD)
    body = safetensors.torch.save({name: torch.ones_like(tensor) for name, tensor in TENSORS.items()})

    def push(worker: str) -> int:
        lease, steps = api.lease(worker), []
        for turn in range(15):
            headers = api.headers(lease, 0, f"{worker}-{turn}", Prefer="return=representation")
            answer = api.http.post(api.path("/gradients"), params={"dtype": dtype}, content=body, headers=headers)
            steps.append(int(answer.headers["Freestep-Step"]))
            tensors = safetensors.torch.load(answer.content)
            for name in TENSORS:
                y = tensors[name].float()
                if dtype == "I8":
                    # Each tensor is less than a block.
                    y *= tensors[f"{name}::scale"].sum()
                # All are numbers of 8 bits, but in int8, where one is off by half a quantum at most.
                torch.testing.assert_close(y, TENSORS[name] - steps[-1], rtol=0, atol=0.2 if dtype == "I8" else 0)
        assert steps == sorted(set(steps))
        return steps[-1]

    assert max(at_once(*(partial(push, f"worker-{number}") for number in range(3)))) == 45


def test_unknown_preferences_are_ignored(api: Api) -> None:
    api.create()
    answer = api.push(api.lease(), 0, Prefer="handling=lenient, respond-async; foo=bar, return=minimal")
    assert answer.json()["decision"] == "applied"
    assert "Preference-Applied" not in answer.headers


def test_gradients_of_narrow_dtypes_are_widened(api: Api) -> None:
    api.create(optimizer=SGD)
    mixed = {"w": TENSORS["w"].bfloat16(), "b": TENSORS["b"].half(), "e": TENSORS["e"].bfloat16()}
    assert api.push(api.lease(), 0, tensors=mixed).json()["decision"] == "applied"
    y, _ = api.pull("y")
    for name in TENSORS:
        assert torch.equal(y[name], TENSORS[name] - mixed[name].float())


def test_tensors_may_come_in_any_order(api: Api) -> None:
    api.create(optimizer=SGD)
    api.push(api.lease(), 0, tensors=dict(reversed(TENSORS.items())))
    y, _ = api.pull("y")
    assert all(not tensor.any() for tensor in y.values())


def test_max_grad_norm_is_torchs(api: Api) -> None:
    api.create(optimizer={**SGD, "max_grad_norm": 0.5})
    api.push(api.lease(), 0)
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in TENSORS.values()]
    for parameter, gradient in zip(parameters, TENSORS.values(), strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    y, _ = api.pull("y")
    for name, parameter in zip(TENSORS, parameters, strict=True):
        torch.testing.assert_close(y[name], TENSORS[name] - parameter.grad)


def test_param_groups_have_hyperparameters_of_their_own(api: Api) -> None:
    parameters = [
        {"name": name, "shape": list(tensor.shape), "group": "frozen" if name == "w" else "default"}
        for name, tensor in TENSORS.items()
    ]
    api.create(optimizer=SGD, parameters=parameters, groups={"frozen": {"lr": 0}})
    api.push(api.lease(), 0)
    y, _ = api.pull("y")
    assert torch.equal(y["w"], TENSORS["w"])
    assert y["b"] == 0


REFUSED: list[tuple[str, dict[str, str | None], str]] = [
    ("no lease", {"Freestep-Lease": None}, "malformed-request"),
    ("no token", {"Freestep-Token": None}, "malformed-request"),
    ("no step", {"Freestep-Step": None}, "malformed-request"),
    ("no key", {"Idempotency-Key": None}, "malformed-request"),
    ("empty key", {"Idempotency-Key": ""}, "malformed-request"),
    ("long key", {"Idempotency-Key": "k" * 201}, "malformed-request"),
    ("token of words", {"Freestep-Token": "seven"}, "malformed-request"),
    ("huge token", {"Freestep-Token": "9" * 30}, "malformed-request"),
    ("step of words", {"Freestep-Step": "first"}, "malformed-request"),
    ("negative step", {"Freestep-Step": "-1"}, "malformed-request"),
    ("fraction of a step", {"Freestep-Step": "0.5"}, "malformed-request"),
    ("step ahead", {"Freestep-Step": "1"}, "malformed-request"),
    ("samples of words", {"Freestep-Samples": "many"}, "malformed-request"),
    ("no samples", {"Freestep-Samples": "0"}, "malformed-request"),
    ("negative samples", {"Freestep-Samples": "-3"}, "malformed-request"),
    ("infinite samples", {"Freestep-Samples": "inf"}, "malformed-request"),
    ("samples past fp32", {"Freestep-Samples": "1e39"}, "malformed-request"),
    ("samples with no inverse", {"Freestep-Samples": "1e-320"}, "malformed-request"),
    ("speed of words", {"Freestep-Speed": "fast"}, "malformed-request"),
    ("no speed", {"Freestep-Speed": "0"}, "malformed-request"),
    ("speed that is not finite", {"Freestep-Speed": "inf"}, "malformed-request"),
    ("loss of words", {"Freestep-Loss": "low"}, "malformed-request"),
    ("loss that is not finite", {"Freestep-Loss": "nan"}, "malformed-request"),
    ("other media type", {"Content-Type": "application/json"}, "unsupported-media-type"),
    ("no media type", {"Content-Type": None}, "unsupported-media-type"),
    ("foreign lease", {"Freestep-Lease": "f" * 32}, "lease-expired"),
    ("odd lease", {"Freestep-Lease": "{x}:y*"}, "malformed-request"),
    ("foreign token", {"Freestep-Token": "1"}, "lease-expired"),
]


@pytest.mark.parametrize(("headers", "name"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_claim_is_refused_and_changes_nothing(
    api: Api, service: ThreadService, headers: dict[str, str | None], name: str
) -> None:
    api.create()
    lease = api.lease()
    before = api.state(service)
    lines = {key: value for key, value in {**api.headers(lease, 0), **headers}.items() if value is not None}
    answer = api.http.post(api.path("/gradients"), content=BODY, headers=lines)
    assert slug(answer) == name
    if name == "malformed-request" and "step ahead" not in headers and headers != {"Freestep-Step": "1"}:
        assert answer.json()["field"] == next(iter(headers))
    assert api.state(service) == before
    assert api.push(lease, 0).json()["step"] == 1


def test_a_header_that_stands_twice_is_refused(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    before = api.state(service)
    headers = [*api.headers(lease, 0).items(), ("Freestep-Step", "0")]
    answer = api.http.post(api.path("/gradients"), content=BODY, headers=headers)
    assert (answer.status_code, slug(answer)) == (400, "malformed-request")
    assert api.state(service) == before


def test_a_body_of_unknown_length_is_refused(api: Api, service: ThreadService) -> None:
    def chunks() -> Iterator[bytes]:
        yield BODY

    api.create()
    lease = api.lease()
    before = api.state(service)
    answer = api.http.post(api.path("/gradients"), content=chunks(), headers=api.headers(lease, 0))
    assert (answer.status_code, slug(answer)) == (411, "length-required")
    assert api.state(service) == before


def test_a_body_over_the_limit_is_refused(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(max_body_bytes=100_000)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    before = api.state(service)
    answer = api.push(lease, 0, body=bytes(100_001))
    assert (answer.status_code, slug(answer)) == (413, "body-too-large")
    assert answer.json()["limit"] == 100_000
    assert api.state(service) == before
    large = api.spec(parameters=[{"name": "w", "shape": [25_001]}])
    refused = api.http.put("/v1/runs/large", json=large)
    assert (slug(refused), refused.json()["field"]) == ("invalid-spec", "parameters")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_is_not_finite_is_refused(
    api: Api, service: ThreadService, value: float, dtype: torch.dtype
) -> None:
    api.create()
    lease = api.lease()
    before = api.state(service)
    tensors = {name: tensor.to(dtype) for name, tensor in {**TENSORS, "b": torch.tensor(value)}.items()}
    answer = api.push(lease, 0, tensors=tensors)
    assert (answer.status_code, slug(answer)) == (422, "non-finite-gradient")
    assert api.state(service) == before


def test_a_gradient_whose_square_overflows_is_refused_unless_it_is_clipped(api: Api, service: ThreadService) -> None:
    huge = {**TENSORS, "b": torch.tensor(1e20)}
    api.create()
    lease = api.lease()
    before = api.state(service)
    answer = api.push(lease, 0, tensors=huge)
    assert (answer.status_code, slug(answer)) == (422, "non-finite-gradient")
    assert api.state(service) == before
    # A limit that is no help against that does not let it through either.
    for limit in (1.0, 1e30):
        api.http.delete(api.path())
        api.create(optimizer={"algorithm": "adamw_schedule_free", "max_grad_norm": limit})
        assert api.push(api.lease(), 0, tensors=huge).json()["decision"] == "applied"
        assert all(tensor.isfinite().all() for tensor in tensors_of(export(api)).values())


def test_a_body_that_stalls_is_given_up(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(stall_seconds=0.2)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    before = api.state(service)
    with begun_push(api, lease, BODY[:-1]) as connection:
        answer = b""
        while b"malformed-request" not in answer:
            received = connection.recv(4096)
            assert received, answer
            answer += received
    assert answer.startswith(b"HTTP/1.1 400")
    assert api.state(service) == before
    assert api.push(lease, 0, "raw").json()["step"] == 1


def test_a_body_that_drips_is_given_up(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(stall_seconds=0.3)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    with begun_push(api, lease, b"") as connection:
        connection.settimeout(0.02)
        answer = b""
        for byte in BODY:
            connection.sendall(bytes([byte]))
            try:
                answer = connection.recv(4096)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 400")
    assert api.push(lease, 0, "raw").json()["step"] == 1


def test_a_body_that_is_cut_leaves_nothing(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    before = api.state(service)
    begun_push(api, lease, BODY[: len(BODY) // 2]).close()
    wait_until(lambda: api.state(service) == before)
    assert api.push(lease, 0, "raw").json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": False}


def test_what_stalled_bodies_hold_costs_others_nothing(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(queue_seconds=30, stall_seconds=30)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    stalled = [begun_push(api, api.lease(key), BODY[:-1], key) for key in ("one", "two", "three")]
    pending = api.redis_key("pending")
    wait_until(lambda: len(service.redis_dump(pending).get(pending, ())) == 3)
    assert api.push(lease, 0, "four").json()["step"] == 1
    for connection in stalled:
        connection.sendall(BODY[-1:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()
    assert api.push(lease, 0, "five").json()["step"] == 5


def test_where_slow_peers_may_hold_nothing_the_slowest_are_ended_for_those_who_wait(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(queue_seconds=30, stall_seconds=30, slow_peer_bytes=0)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    stalled = [begun_push(api, api.lease(key), BODY[:-1], key) for key in ("one", "two")]
    pending = api.redis_key("pending")
    wait_until(lambda: len(service.redis_dump(pending).get(pending, ())) == 2)
    assert api.push(lease, 0, "three").json()["step"] == 1
    ended = [connection for connection in stalled if select([connection], [], [], 0)[0]]
    assert len(ended) == 1
    answer = ended[0].recv(4096)
    assert answer.startswith(b"HTTP/1.1 429") and b"others waited for its memory" in answer
    for connection in stalled:
        connection.close()


@pytest.mark.parametrize("samples", ["1e12", "1e-12"])
def test_the_most_and_the_fewest_samples_make_a_mean(api: Api, samples: str) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    for _ in range(2):
        assert api.push(lease, 0, Freestep_Samples=samples).status_code == 200
    torch.testing.assert_close(api.pull("y")[0]["w"], torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_losses_are_averaged_in_the_status(api: Api) -> None:
    api.create()
    lease = api.lease()
    assert api.status()["loss"] is None
    for loss, average in (("2", 2.0), ("4", 2.2), ("1.7e308", 1.7e307), ("-1.7e308", -1.7e306)):
        api.push(lease, 0, Freestep_Loss=loss)
        assert api.status()["loss"] == pytest.approx(average)


def test_a_push_whose_lease_runs_out_on_the_way_is_discarded(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease(ttl_ms=200)
    before = api.state(service)["points"]
    with begun_push(api, lease, BODY[:-1]) as connection:
        wait_until(lambda: not api.status()["workers"])
        connection.sendall(BODY[-1:])
        assert b"lease-expired" in answered(connection)
    after = api.state(service)
    assert after["points"] == before
    assert after["status"]["pushes"] == {"applied": 0, "accumulated": 0, "dropped": 0}
    left = {key.rpartition(":")[2] for key in after["redis"]}
    assert not left & {"pending", "group", "log"}
    # The mark alone.
    assert after["redis"][api.redis_key("receipts")] == {"": ""}


def test_a_push_that_a_restore_overtakes_is_discarded(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    with begun_push(api, lease, BODY[:-1]) as connection:
        wait_until(lambda: is_pending(service, api, "raw"))
        assert api.http.post(api.path("/checkpoints/0/restore")).json()["epoch"] == 2
        before = api.state(service)
        connection.sendall(BODY[-1:])
        assert b"lease-expired" in answered(connection)
    assert api.state(service) == before
    assert slug(api.push(lease, 0, "raw")) == "epoch-changed"


def test_a_run_may_be_deleted_while_a_push_is_on_its_way(api: Api, service: ThreadService) -> None:
    api.create()
    with begun_push(api, api.lease(), BODY[:-1]) as connection:
        wait_until(lambda: is_pending(service, api, "raw"))
        assert api.http.delete(api.path()).status_code == 204
        connection.sendall(BODY[-1:])
        assert b"run-not-found" in answered(connection)
    assert service.redis_dump(api.redis_key()) == {api.redis_key("deleted"): "1"}
