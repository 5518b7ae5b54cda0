"""Points out and initial weights in, over plain HTTP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import schedulefree
import torch

from freestep.wire.receiver import MEDIA_TYPE
from harness import OWN_HEAD, ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import BODY, TENSORS, Api, slug
from raw_pushes import answered, connected

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def trained(api: Api, steps: int = 3) -> dict[str, Any]:
    """A run after some pushes of its own weights as gradients; returns its lease."""
    api.create()
    lease = api.lease()
    for step in range(steps):
        assert api.push(lease, step).status_code == 200
    return lease


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_are_the_schedulefree_packages(api: Api, dtype: str) -> None:
    trained(api)
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in TENSORS.items()}
    peer = schedulefree.SGDScheduleFree(parameters.values(), lr=0.5)
    peer.train()
    for _ in range(3):
        for name, parameter in parameters.items():
            parameter.grad = TENSORS[name].clone()
        peer.step()
    y = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    z = {name: peer.state[parameter]["z"] for name, parameter in parameters.items()}
    peer.eval()
    x = {name: parameter.detach() for name, parameter in parameters.items()}
    for point, expected in (("x", x), ("y", y), ("z", z)):
        pulled, step = api.pull(point, dtype=dtype)
        assert step == 3
        for name in TENSORS:
            assert pulled[name].dtype == DTYPES[dtype]
            torch.testing.assert_close(pulled[name], expected[name].to(DTYPES[dtype]))


def test_the_default_is_x_in_fp32(api: Api) -> None:
    trained(api)
    answer = api.http.get(api.path("/parameters"))
    assert answer.headers["Content-Type"] == MEDIA_TYPE
    assert answer.headers["Freestep-Step"] == "3"
    assert answer.headers["Freestep-Epoch"] == "1"
    assert answer.content == api.http.get(api.path("/parameters"), params={"point": "x", "dtype": "F32"}).content


def test_a_pull_names_its_step_in_the_file_too(api: Api, tmp_path: Any) -> None:
    trained(api)
    file = tmp_path / "x.safetensors"
    file.write_bytes(api.http.get(api.path("/parameters")).content)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {
            "freestep.run": api.run,
            "freestep.epoch": "1",
            "freestep.step": "3",
            "freestep.point": "x",
        }


def test_an_etag_names_epoch_step_point_and_dtype(api: Api) -> None:
    lease = trained(api)
    tags = {
        api.http.get(api.path("/parameters"), params={"point": point, "dtype": dtype}).headers["ETag"]
        for point in "xyz"
        for dtype in DTYPES
    }
    assert len(tags) == 9
    tag = api.http.get(api.path("/parameters")).headers["ETag"]
    for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        again = api.http.get(api.path("/parameters"), headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["ETag"] == tag
    api.push(lease, 3)
    fresh = api.http.get(api.path("/parameters"), headers={"If-None-Match": tag})
    assert fresh.status_code == 200
    assert fresh.headers["ETag"] != tag


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("bytes=0-9", 0, 10), ("bytes=200-", 200, None), ("bytes=-10", -10, None), ("bytes=5-100000", 5, None)],
)
def test_a_range_is_a_part_of_the_body(api: Api, asked: str, begin: int, end: int | None) -> None:
    trained(api)
    whole = api.http.get(api.path("/parameters"))
    part = api.http.get(api.path("/parameters"), headers={"Range": asked})
    assert part.status_code == 206
    assert part.content == whole.content[begin:end]
    first = begin if begin >= 0 else len(whole.content) + begin
    last = first + len(part.content) - 1
    assert part.headers["Content-Range"] == f"bytes {first}-{last}/{len(whole.content)}"
    assert part.headers["ETag"] == whole.headers["ETag"]


@pytest.mark.parametrize(
    "asked", ["bytes=-", "bytes=9-3", "bytes=0-1,5-6", "lines=0-1", "nonsense", f"bytes={'9' * 5000}-"]
)
def test_what_is_no_single_range_gets_the_whole_body(api: Api, asked: str) -> None:
    trained(api)
    answer = api.http.get(api.path("/parameters"), headers={"Range": asked})
    assert answer.status_code == 200
    assert answer.content == api.http.get(api.path("/parameters")).content


def test_a_range_past_the_end_is_refused(api: Api) -> None:
    trained(api)
    size = len(api.http.get(api.path("/parameters")).content)
    answer = api.http.get(api.path("/parameters"), headers={"Range": f"bytes={size}-"})
    assert (answer.status_code, slug(answer)) == (416, "range-not-satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{size}"


def test_a_download_is_resumed_only_while_the_step_is_the_same(api: Api) -> None:
    lease = trained(api)
    whole = api.http.get(api.path("/parameters"))
    headers = {"Range": "bytes=100-", "If-Range": whole.headers["ETag"]}
    assert api.http.get(api.path("/parameters"), headers=headers).status_code == 206
    api.push(lease, 3)
    changed = api.http.get(api.path("/parameters"), headers=headers)
    assert changed.status_code == 200
    assert changed.headers["Freestep-Step"] == "4"


def test_a_pull_may_wait_for_a_step(api: Api, service: ThreadService, connect: Callable[..., Api]) -> None:
    lease = trained(api)
    http, query = connect(service.url).http, {"point": "y", "min_step": 5}
    waiting = under_way(lambda: http.get(api.path("/parameters"), params=query, headers={"Prefer": "wait=30"}))
    assert api.push(lease, 3).json()["step"] == 4
    assert not waiting.done()
    assert api.push(lease, 4).json()["step"] == 5
    answer = waiting.result()
    assert (answer.status_code, answer.headers["Freestep-Step"]) == (200, "5")


@pytest.mark.parametrize("headers", [{}, {"Prefer": "wait=0.05"}])
def test_a_step_that_is_not_reached(api: Api, headers: dict[str, str]) -> None:
    trained(api)
    answer = api.http.get(api.path("/parameters"), params={"min_step": 4}, headers=headers)
    assert (answer.status_code, slug(answer)) == (504, "step-not-reached")
    assert answer.json()["step"] == 3


@pytest.mark.parametrize("query", [{"point": "w"}, {"dtype": "F64"}, {"min_step": -1}, {"min_step": "one"}])
def test_a_malformed_query_is_refused(api: Api, query: dict[str, Any]) -> None:
    trained(api)
    answer = api.http.get(api.path("/parameters"), params=query)
    assert (answer.status_code, slug(answer)) == (400, "malformed-request")
    assert answer.json()["field"] == next(iter(query))


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", ""])
def test_a_malformed_wait_is_refused(api: Api, wait: str) -> None:
    trained(api)
    answer = api.http.get(api.path("/parameters"), headers={"Prefer": f"wait={wait}"})
    assert (answer.status_code, slug(answer)) == (400, "malformed-request")


def test_a_run_without_weights_has_no_points(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    answer = api.http.get(api.path("/parameters"))
    assert (answer.status_code, slug(answer)) == (409, "run-not-initialized")


def test_the_first_weights_win(api: Api, service: ThreadService) -> None:
    api.create()
    before = api.state(service)
    answer = api.initialize({name: tensor + 1 for name, tensor in TENSORS.items()})
    assert (answer.status_code, slug(answer)) == (412, "already-initialized")
    assert api.state(service) == before


def test_of_many_who_bring_weights_at_once_one_wins(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    api.http.put(api.path(), json=api.spec())
    weights = [{name: tensor + number for name, tensor in TENSORS.items()} for number in range(6)]
    answers = at_once(*(partial(connect(service.url, api.run).initialize, each) for each in weights))
    (winner,) = [number for number, answer in enumerate(answers) if answer.status_code == 201]
    assert [slug(answer) for answer in answers if answer.status_code != 201] == ["already-initialized"] * 5
    assert torch.equal(api.pull("y")[0]["w"], weights[winner]["w"])


def test_weights_of_narrow_dtypes_become_fp32_masters(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    mixed = {"w": TENSORS["w"].bfloat16(), "b": TENSORS["b"].half(), "e": TENSORS["e"]}
    assert api.initialize(mixed).status_code == 201
    y, _ = api.pull("y")
    for name in TENSORS:
        assert torch.equal(y[name], mixed[name].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(api: Api, value: float) -> None:
    api.http.put(api.path(), json=api.spec())
    answer = api.initialize({**TENSORS, "b": torch.tensor(value)})
    assert (answer.status_code, slug(answer)) == (422, "malformed-tensors")
    assert api.status()["initialized"] is False
    assert api.initialize().status_code == 201


@pytest.mark.parametrize(
    ("changes", "status", "name"),
    [
        ({"headers": {"Content-Type": "application/json"}}, 415, "unsupported-media-type"),
        ({"content": iter([b"", b"x"])}, 411, "length-required"),
        ({"content": b"nonsense"}, 422, "malformed-tensors"),
        ({"content": safetensors.torch.save({"w": TENSORS["w"]})}, 422, "malformed-tensors"),
    ],
)
def test_refused_weights_leave_the_run_waiting(
    api: Api, service: ThreadService, changes: dict[str, Any], status: int, name: str
) -> None:
    api.http.put(api.path(), json=api.spec())
    before = api.state(service)
    call = {"content": BODY, "headers": {"Content-Type": MEDIA_TYPE}, **changes}
    answer = api.http.put(api.path("/parameters"), **call)
    assert (answer.status_code, slug(answer)) == (status, name)
    assert api.state(service) == before
    assert api.initialize().status_code == 201


def test_a_run_may_be_deleted_while_its_weights_are_on_their_way(api: Api, service: ThreadService) -> None:
    api.http.put(api.path(), json=api.spec())
    lines = f"{OWN_HEAD}Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(BODY)}\r\nExpect: 100-continue"
    head = f"PUT {api.path('/parameters')} HTTP/1.1\r\n{lines}\r\n\r\n"
    with connected(api.url) as connection:
        connection.sendall(head.encode())
        # The service asks for the body once it has a place for it.
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        assert api.http.delete(api.path()).status_code == 204
        connection.sendall(BODY)
        assert b"run-not-found" in answered(connection)
    assert service.redis_dump(api.redis_key()) == {api.redis_key("deleted"): "1"}
    with service.redis() as client:
        assert not client.sismember("freestep:runs", api.run)
    assert not (service.settings.data_dir / "runs" / api.run).exists()


def test_who_waits_for_a_step_of_a_deleted_run_is_told(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    trained(api)
    http, query = connect(service.url).http, {"min_step": 5}
    waiting = under_way(lambda: http.get(api.path("/parameters"), params=query, headers={"Prefer": "wait=600"}))
    writer = service.registry.get(api.run).shard(0).core.writer
    wait_until(lambda: bool(writer._waiters))
    api.http.delete(api.path())
    answer = waiting.result()
    assert (answer.status_code, slug(answer)) == (404, "run-not-found")
