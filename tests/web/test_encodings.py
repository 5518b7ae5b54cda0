"""Gradients that come as int8 with scales, or as their largest values: what they say is applied, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from encoded import assemble, decoded, int8, topk
from freestep.wire.receiver import MEDIA_TYPE
from harness import ThreadService
from meanwhile import at_once
from plain_calls import SGD, Api, slug

SHAPES: dict[str, tuple[int, ...]] = {"w": (40, 33), "s": (), "e": (0, 4), "b": (7,)}
GENERATOR = torch.Generator().manual_seed(7)
GRADIENT = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
Items = tuple[dict[str, Tensor], dict[str, str]]

ENCODED: dict[str, Items] = {
    "int8": int8(GRADIENT),
    "int8-of-one": int8(GRADIENT, 1),
    "int8-of-seven": int8(GRADIENT, 7),
    "int8-of-all": int8(GRADIENT, 2**31),
    "topk": topk(GRADIENT, 0.05),
    "topk-bf16-i64": topk(GRADIENT, 0.3, torch.bfloat16, torch.int64),
    "topk-f16": topk(GRADIENT, 0.3, torch.float16),
    "topk-of-all": topk(GRADIENT, 1.0),
    "topk-of-none": topk({name: tensor[..., :0] if tensor.dim() else tensor for name, tensor in GRADIENT.items()}, 0.0),
}


def create(api: Api, **changes: Any) -> None:
    parameters = [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()]
    spec = api.spec(**{"parameters": parameters, "optimizer": SGD, "durability": "none", **changes})
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize({name: torch.zeros(shape) for name, shape in SHAPES.items()}).status_code == 201


@pytest.mark.parametrize("name", ENCODED)
def test_what_they_say_is_applied(api: Api, name: str) -> None:
    create(api)
    items, metadata = ENCODED[name]
    assert api.push(api.lease(), 0, body=assemble(items, metadata)).json()["decision"] == "applied"
    said = decoded(items, metadata, SHAPES)
    assert any(tensor.any() for tensor in said.values())
    for tensor, value in api.pull("y")[0].items():
        assert torch.equal(value, -said[tensor])


@pytest.mark.parametrize("name", ["int8", "topk"])
def test_their_order_in_the_body_does_not_matter(api: Api, name: str) -> None:
    create(api)
    items, metadata = ENCODED[name]
    backwards = dict(reversed(list(items.items())))
    assert api.push(api.lease(), 0, body=assemble(backwards, metadata)).json()["decision"] == "applied"
    said = decoded(items, metadata, SHAPES)
    assert all(torch.equal(value, -said[tensor]) for tensor, value in api.pull("y")[0].items())


@pytest.mark.parametrize("name", ["int8-of-seven", "topk"])
def test_a_norm_is_that_of_what_they_say(api: Api, name: str) -> None:
    create(api, optimizer={**SGD, "max_grad_norm": 0.5})
    items, metadata = ENCODED[name]
    api.push(api.lease(), 0, body=assemble(items, metadata))
    norm = torch.cat([value.reshape(-1).double() for value in api.pull("y")[0].values()]).norm()
    torch.testing.assert_close(float(norm), 0.5, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["int8-of-seven", "topk-bf16-i64"])
def test_shards_take_theirs(api: Api, name: str) -> None:
    """Each part is encoded by itself; whoever asks no shard by name sends the whole."""
    create(api, shards=2)
    lease = api.lease()
    items, metadata = ENCODED[name]
    assert api.push(lease, 0, body=assemble(items, metadata)).json()["decision"] == "applied"
    expected = decoded(items, metadata, SHAPES)
    parts, told = [], {tensor: torch.zeros(shape).reshape(-1) for tensor, shape in SHAPES.items()}
    for shard in api.http.get(api.path("/topology")).json()["shards"]:
        slices = {
            each["name"]: GRADIENT[each["name"]].reshape(-1)[each["begin"] : each["end"]].reshape(each["shape"])
            for each in shard["slices"]
        }
        made = int8(slices, 7) if metadata["freestep.encoding"] == "int8" else topk(slices, 0.1)
        said = decoded(*made, {each["name"]: each["shape"] for each in shard["slices"]})
        for each in shard["slices"]:
            told[each["name"]][each["begin"] : each["end"]] = said[each["name"]].reshape(-1)
        parts.append(assemble(*made))
    answers = at_once(
        *(
            lambda index=index, part=part: api.http.post(
                api.path("/gradients"),
                params={"shard": index, "of": 2},
                content=part,
                headers=api.headers(lease, 1, "parts"),
            )
            for index, part in enumerate(parts)
        )
    )
    assert [answer.json()["decision"] for answer in answers] == ["applied", "applied"]
    for tensor, value in api.pull("y")[0].items():
        assert torch.equal(value, -expected[tensor] - told[tensor].reshape(SHAPES[tensor]))


def changed(name: str, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Items:
    items, metadata = dict(ENCODED[name][0]), dict(ENCODED[name][1])
    change(items, metadata)
    return items, metadata


def set_item(name: str, value: Tensor) -> Callable[[dict[str, Tensor], dict[str, str]], Any]:
    return lambda items, _: items.__setitem__(name, value)


def set_block(text: str) -> Callable[[dict[str, Tensor], dict[str, str]], Any]:
    return lambda _, metadata: metadata.__setitem__("freestep.block", text)


INDICES = ENCODED["topk"][0]["w::indices"]
MALFORMED: dict[str, Items] = {
    "no-scale": changed("int8", lambda items, _: items.pop("w::scale")),
    "too-few-scales": changed("int8", set_item("w::scale", torch.ones(5))),
    "too-many-scales": changed("int8", set_item("w::scale", torch.ones(7))),
    "a-scale-for-nothing": changed("int8", set_item("e::scale", torch.ones(1))),
    "half-scales": changed("int8", set_item("w::scale", torch.ones(6, dtype=torch.float16))),
    "scales-in-a-matrix": changed("int8", set_item("w::scale", torch.ones(6, 1))),
    "floats-as-int8": changed("int8", set_item("w", GRADIENT["w"])),
    "int8-as-dense": changed("int8", lambda _, metadata: metadata.clear()),
    "dense-as-int8": (dict(GRADIENT), {"freestep.encoding": "int8"}),
    "int8-of-another-shape": changed("int8", set_item("w", ENCODED["int8"][0]["w"].T)),
    "block-of-another-size": changed("int8", set_block("219")),
    "block-of-none": changed("int8", set_block("0")),
    "negative-block": changed("int8", set_block("-256")),
    "block-in-words": changed("int8", set_block("many")),
    "block-in-other-digits": changed("int8", set_block("\u0662\u0665\u0666")),
    "endless-block": changed("int8", set_block("9" * 400)),
    "unknown-encoding": changed("int8", lambda _, metadata: metadata.__setitem__("freestep.encoding", "int4")),
    "encoding-in-capitals": changed("int8", lambda _, metadata: metadata.__setitem__("freestep.encoding", "INT8")),
    "no-indices": changed("topk", lambda items, _: items.pop("w::indices")),
    "no-values": changed("topk", lambda items, _: items.pop("w::values")),
    "fewer-indices": changed("topk", set_item("w::indices", INDICES[1:])),
    "more-than-there-are": changed(
        "topk",
        lambda items, _: items.update({"b::values": torch.ones(8), "b::indices": torch.arange(8, dtype=torch.int32)}),
    ),
    "index-past-the-end": changed("topk", set_item("w::indices", INDICES + 1320)),
    "negative-index": changed("topk", set_item("w::indices", INDICES - 1320)),
    "index-twice": changed("topk", set_item("w::indices", torch.zeros_like(INDICES))),
    "huge-index": changed("topk", set_item("w::indices", INDICES.long() + 2**62)),
    "indices-as-floats": changed("topk", set_item("w::indices", INDICES.float())),
    "values-as-integers": changed("topk", set_item("w::values", INDICES)),
    "indices-in-a-matrix": changed("topk", set_item("w::indices", INDICES.reshape(1, -1))),
    "the-tensor-beside": changed("topk", set_item("w", GRADIENT["w"])),
}
NON_FINITE: dict[str, Items] = {
    "infinite-scale": changed("int8", set_item("w::scale", torch.full((6,), torch.inf))),
    "nan-scale": changed("int8", set_item("w::scale", torch.full((6,), torch.nan))),
    "overflowing-scale": changed("int8", set_item("w::scale", torch.full((6,), 3e38))),
    "nan-value": changed("topk", set_item("w::values", torch.full((len(INDICES),), torch.nan))),
    "infinite-value": changed("topk", set_item("w::values", torch.full((len(INDICES),), -torch.inf))),
}


@pytest.mark.parametrize("name", [*MALFORMED, *NON_FINITE])
def test_what_they_cannot_mean_is_refused(api: Api, service: ThreadService, name: str) -> None:
    create(api)
    lease = api.lease()
    before = api.state(service)
    answer = api.push(lease, 0, "key", body=assemble(*{**MALFORMED, **NON_FINITE}[name]))
    assert answer.status_code == 422
    assert slug(answer) == ("malformed-tensors" if name in MALFORMED else "non-finite-gradient")
    assert api.state(service) == before
    assert api.push(lease, 0, "key", body=assemble(*ENCODED["topk"])).json()["step"] == 1


@pytest.mark.parametrize("name", ["int8", "topk"])
def test_bytes_left_over_are_refused(api: Api, service: ThreadService, name: str) -> None:
    create(api)
    lease = api.lease()
    before = api.state(service)
    for body in (assemble(*ENCODED[name]) + b"\0", assemble(*ENCODED[name])[:-1]):
        assert slug(api.push(lease, 0, "key", body=body)) == "malformed-tensors"
    assert api.state(service) == before


@pytest.mark.parametrize("name", ["int8", "topk"])
def test_weights_come_as_they_are(api: Api, name: str) -> None:
    parameters = [{"name": each, "shape": list(shape)} for each, shape in SHAPES.items()]
    api.http.put(api.path(), json=api.spec(parameters=parameters))
    body = assemble(*ENCODED[name])
    answer = api.http.put(api.path("/parameters"), content=body, headers={"Content-Type": MEDIA_TYPE})
    assert slug(answer) == "malformed-tensors"
    assert not api.status()["initialized"]


@pytest.mark.parametrize("encode", [int8, lambda tensors: topk(tensors, 1.0)])
def test_a_name_cannot_stand_for_two_things(api: Api, encode: Callable[..., Items]) -> None:
    names = ("w", "w::scale", "w::values")
    parameters = [{"name": name, "shape": [1]} for name in names]
    weights = {name: torch.zeros(1) for name in names}
    assert api.http.put(api.path(), json=api.spec(parameters=parameters, optimizer=SGD)).status_code == 201
    assert api.initialize(weights).status_code == 201
    lease = api.lease()
    answer = api.push(lease, 0, body=assemble(*encode({name: torch.ones(1) for name in names})))
    # Top-k names nothing as the tensors are named here.
    assert answer.status_code == (422 if encode is int8 else 200)
    assert api.push(lease, 0, body=safetensors.torch.save(weights)).status_code == 200
