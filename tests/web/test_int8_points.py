"""Points pulled as int8, over plain HTTP: the bodies are those of the plain encoding of what fp32 pulls say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import encoded
from harness import ThreadService
from meanwhile import at_once
from plain_calls import Api, persistently, slug

SHAPES: dict[str, tuple[int, ...]] = {"w": (40, 33), "s": (), "e": (0, 4), "m": (3, 256), "b": (7,)}
GENERATOR = torch.Generator().manual_seed(9)
WEIGHTS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
GRADIENT = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}


def trained(api: Api, weights: Mapping[str, Tensor] = WEIGHTS, **changes: Any) -> dict[str, Any]:
    """A run after a push, in which x, y and z differ; returns its lease."""
    parameters = [{"name": name, "shape": list(tensor.shape)} for name, tensor in weights.items()]
    assert api.http.put(api.path(), json=api.spec(parameters=parameters, **changes)).status_code == 201
    assert persistently(lambda: api.initialize(weights)).status_code == 201
    lease = api.lease()
    assert api.push(lease, 0, tensors=weights).json()["decision"] == "applied"
    return lease


def assert_encodes(body: bytes, tensors: Mapping[str, Tensor]) -> None:
    """As the safetensors package reads the body."""
    items, expected = safetensors.torch.load(body), encoded.int8(tensors)[0]
    assert items.keys() == expected.keys()
    for name, item in items.items():
        torch.testing.assert_close(item, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("point", ["x", "y", "z"])
def test_a_point_is_the_wide_one_in_int8(api: Api, tmp_path: Any, point: str) -> None:
    trained(api)
    answer = api.http.get(api.path("/parameters"), params={"point": point, "dtype": "I8"})
    assert (answer.status_code, answer.headers["Freestep-Step"]) == (200, "1")
    assert_encodes(answer.content, api.pull(point)[0])
    file = tmp_path / "point.safetensors"
    file.write_bytes(answer.content)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {
            "freestep.run": api.run,
            "freestep.epoch": "1",
            "freestep.step": "1",
            "freestep.point": point,
            "freestep.encoding": "int8",
            "freestep.block": "256",
        }
        # Mapped from disk, where the scales have to lie at multiples of 4 bytes.
        assert torch.equal(opened.get_tensor("w::scale"), safetensors.torch.load(answer.content)["w::scale"])
    assert len(answer.content) < len(api.http.get(api.path("/parameters")).content) / 2


def test_tensors_of_one_element_are_longer_as_int8(api: Api) -> None:
    """5 bytes, of which 4 are the scale's: more than a vector of fp32 has room for."""
    weights = {f"s{number}": torch.tensor(number / 7) for number in range(3000)}
    trained(api, weights)
    answer = api.http.get(api.path("/parameters"), params={"dtype": "I8", "point": "y"})
    assert_encodes(answer.content, api.pull("y")[0])


def test_an_empty_model_has_points_too(api: Api) -> None:
    trained(api, {"e": torch.zeros(0, 4), "f": torch.zeros(0)})
    answer = api.http.get(api.path("/parameters"), params={"dtype": "I8"})
    assert_encodes(answer.content, {"e": torch.zeros(0, 4), "f": torch.zeros(0)})


def test_an_etag_and_ranges_are_those_of_any_dtype(api: Api) -> None:
    lease = trained(api)
    query = {"point": "y", "dtype": "I8"}
    whole = api.http.get(api.path("/parameters"), params=query)
    tag, size = whole.headers["ETag"], len(whole.content)
    assert tag != api.http.get(api.path("/parameters"), params={"point": "y"}).headers["ETag"]
    known = api.http.get(api.path("/parameters"), params=query, headers={"If-None-Match": tag})
    assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", tag)
    for begin, end in ((0, size), (8, 9), (size // 2, size - 3), (size - 1, size)):
        wanted = {"Range": f"bytes={begin}-{end - 1}", "If-Range": tag}
        part = api.http.get(api.path("/parameters"), params=query, headers=wanted)
        assert (part.status_code, part.content) == (206, whole.content[begin:end])
        assert part.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{size}"
    beyond = api.http.get(api.path("/parameters"), params=query, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, slug(beyond)) == (416, "range-not-satisfiable")
    api.push(lease, 1, tensors=GRADIENT)
    fresh = api.http.get(api.path("/parameters"), params=query, headers={"If-None-Match": tag})
    assert (fresh.status_code, fresh.headers["Freestep-Step"]) == (200, "2")


def test_pulls_of_all_kinds_share_what_memory_there_is(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    trained(api)
    queries = [{"point": point, "dtype": dtype} for point in "xyz" for dtype in ("F32", "BF16", "I8")]
    https = [connect(service.url).http for _ in queries]
    calls = [
        lambda http=http, query=query: http.get(api.path("/parameters"), params=query).content
        for http, query in zip(https, queries, strict=True)
    ]
    for query, body in zip(queries, at_once(*calls), strict=True):
        assert body == api.http.get(api.path("/parameters"), params=query).content


def test_y_comes_as_int8_with_a_push(api: Api) -> None:
    lease = trained(api)
    more = api.headers(lease, 1, Prefer="return=representation")
    body = safetensors.torch.save(GRADIENT)
    answer = api.http.post(api.path("/gradients"), params={"dtype": "I8"}, content=body, headers=more)
    assert (answer.status_code, answer.headers["Freestep-Decision"]) == (200, "applied")
    assert answer.headers["Freestep-Step"] == "2"
    assert_encodes(answer.content, api.pull("y")[0])


def parts_of(api: Api, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each shard has of some tensors."""
    return [
        {
            each["name"]: tensors[each["name"]].reshape(-1)[each["begin"] : each["end"]].reshape(each["shape"])
            for each in shard["slices"]
        }
        for shard in api.http.get(api.path("/topology")).json()["shards"]
    ]


def test_shards_encode_their_parts(api: Api) -> None:
    lease = trained(api, shards=3)
    parts = parts_of(api, GRADIENT)

    def push(shard: int) -> httpx.Response:
        return api.http.post(
            api.path("/gradients"),
            params={"shard": shard, "of": 3, "dtype": "I8"},
            content=safetensors.torch.save(parts[shard]),
            headers=api.headers(lease, 1, "parts", Prefer="return=representation"),
        )

    def pull(shard: int, cut: str = "cut") -> httpx.Response:
        query = {"shard": shard, "of": 3, "point": "y", "dtype": "I8", "cut": cut}
        return api.http.get(api.path("/parameters"), params=query)

    pushed = at_once(*(lambda shard=shard: push(shard) for shard in range(3)))
    pulled = at_once(*(lambda shard=shard: pull(shard) for shard in range(3)))
    assert {answer.headers["Freestep-Step"] for answer in (*pushed, *pulled)} == {"2"}
    for shard, expected in enumerate(parts_of(api, api.pull("y")[0])):
        assert pushed[shard].content == pulled[shard].content
        assert_encodes(pushed[shard].content, expected)
        tag, size = pulled[shard].headers["ETag"], len(pulled[shard].content)
        query = {"shard": shard, "of": 3, "point": "y", "dtype": "I8"}
        known = api.http.get(api.path("/parameters"), params=query, headers={"If-None-Match": tag})
        assert known.status_code == 304
        ranged = api.http.get(api.path("/parameters"), params=query, headers={"Range": f"bytes=8-{size - 2}"})
        assert (ranged.status_code, ranged.content) == (206, pulled[shard].content[8:-1])


def test_the_whole_of_several_shards_is_refused(api: Api, service: ThreadService) -> None:
    """Blocks begin anew with each shard's part of a tensor, which one body cannot say."""
    lease = trained(api, shards=3)
    before = api.state(service)
    # Reading the points of several shards leaves its marks there.
    del before["redis"]
    body, headers = safetensors.torch.save(GRADIENT), api.headers(lease, 1, "key", Prefer="return=representation")
    for answer in (
        api.http.get(api.path("/parameters"), params={"dtype": "I8"}),
        api.http.post(api.path("/gradients"), params={"dtype": "I8"}, content=body, headers=headers),
    ):
        assert (answer.status_code, slug(answer)) == (400, "malformed-request")
        assert (answer.json()["field"], answer.json()["shards"]) == ("dtype", 3)
    assert {key: value for key, value in api.state(service).items() if key in before} == before
    answer = api.http.post(api.path("/gradients"), content=body, headers=headers)
    assert (answer.status_code, answer.headers["Freestep-Step"]) == (200, "2")


def test_names_that_leave_none_for_scales_are_refused(api: Api, service: ThreadService) -> None:
    weights = {"w": torch.ones(2), "w::scale": torch.ones(1)}
    lease = trained(api, weights)
    before = api.state(service)
    body, headers = safetensors.torch.save(weights), api.headers(lease, 1, "key", Prefer="return=representation")
    for answer in (
        api.http.get(api.path("/parameters"), params={"dtype": "I8"}),
        api.http.post(api.path("/gradients"), params={"dtype": "I8"}, content=body, headers=headers),
    ):
        assert (answer.status_code, slug(answer)) == (422, "malformed-tensors")
    assert api.state(service) == before
    assert api.http.post(api.path("/gradients"), content=body, headers=headers).status_code == 200
