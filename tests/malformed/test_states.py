"""Malformed states over HTTP: each is refused with its slug, makes no run, and changes none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import ThreadService
from malformed.bodies import BODIES, KINDS
from plain_calls import Api, slug
from states import body_of, document_of, export, free_memory, import_, points, tensors_of, train

Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture
def state(api: Api) -> bytes:
    """A good state, which the bodies differ from in one way each."""
    api.create(optimizer={"algorithm": "adamw_schedule_free"}, groups={"g": {"lr": 0.1}})
    train(api, 0, 2)
    return export(api)


@pytest.fixture
def refused(api: Api, service: ThreadService, connect: Callable[..., Api]) -> Callable[[bytes, str], None]:
    """Puts a state, to a run that there is not and to one that has weights, and sees it refused."""
    blank = connect(service.url)

    def put(body: bytes, expected: str) -> None:
        before, free = points(api), api.status()
        for each in (blank, api):
            answer = import_(each, body, replace="true")
            assert (answer.status_code, slug(answer)) == (422, expected), answer.text
        assert slug(blank.http.get(blank.path())) == "run-not-found"
        assert (points(api), api.status()["epoch"]) == (before, free["epoch"])

    return put


@pytest.mark.parametrize("kind", KINDS)
def test_bodies_of_gradients_are_no_states(state: bytes, refused: Callable[[bytes, str], None], kind: str) -> None:
    for name in KINDS[kind]:
        refused(BODIES[name](), "malformed-tensors")


def _scalar(name: str, value: Any) -> Callable[[Parts], object]:
    return lambda parts: parts[1]["scalars"]["default"].update({name: value})


def _value(name: str, value: float) -> Callable[[Parts], object]:
    return lambda parts: parts[0][name].fill_(value)


def _data(*names: str, **state: Any) -> Callable[[Parts], object]:
    return lambda parts: parts[1].update(data=dict.fromkeys(names or ("train",), state))


TENSORS: dict[str, Callable[[Parts], object]] = {
    "missing": lambda parts: parts[0].pop("w::z"),
    "missing-empty": lambda parts: parts[0].pop("e::z"),
    "extra": lambda parts: parts[0].update({"v::y": torch.ones(2)}),
    "extra-vector": lambda parts: parts[0].update({"w::exp_avg": torch.ones(2, 3)}),
    "plain-name": lambda parts: parts[0].update(w=parts[0].pop("w::y")),
    "other-mark": lambda parts: parts[0].update({"w:y": parts[0].pop("w::y")}),
    "transposed": lambda parts: parts[0].update({"w::z": torch.ones(3, 2)}),
    "bf16": lambda parts: parts[0].update({"w::z": torch.ones(2, 3, dtype=torch.bfloat16)}),
    "f64": lambda parts: parts[0].update({"w::z": torch.ones(2, 3, dtype=torch.float64)}),
    "all-bf16": lambda parts: parts[0].update({name: each.bfloat16() for name, each in parts[0].items()}),
    "nan": _value("w::y", float("nan")),
    "infinite-second-moment": _value("w::exp_avg_sq", float("inf")),
    "infinite-scalar-tensor": _value("b::z", float("-inf")),
    "negative-second-moment": _value("b::exp_avg_sq", -1e-9),
}
DOCUMENTS: dict[str, Callable[[Parts], object]] = {
    "no-step": lambda parts: parts[1].pop("step"),
    "negative-step": lambda parts: parts[1].update(step=-1),
    "fractional-step": lambda parts: parts[1].update(step=1.5),
    "large-step": lambda parts: parts[1].update(step=2**60),
    "step-of-fifteen-digits": lambda parts: parts[1].update(step=10**14),
    "unknown-member": lambda parts: parts[1].update(receipts={}),
    "no-buffers": lambda parts: parts[1].pop("buffers"),
    "empty-buffers": lambda parts: parts[1].update(buffers=[]),
    "a-buffer-twice": lambda parts: parts[1].update(buffers=["y", "z", "z"]),
    "a-buffer-too-few": lambda parts: (
        parts[1].update(buffers=["y", "z"]),
        [parts[0].pop(name) for name in list(parts[0]) if name.endswith("exp_avg_sq")],
    ),
    "another-buffer": lambda parts: (
        parts[1].update(buffers=["y", "z", "momentum"]),
        [parts[0].update({f"{name}::momentum": parts[0].pop(f"{name}::exp_avg_sq")}) for name in "wbe"],
    ),
    "a-buffer-with-the-mark": lambda parts: parts[1].update(buffers=["y", "z", "a::b"]),
    "no-scalars": lambda parts: parts[1].update(scalars={}),
    "scalars-of-an-unused-group": lambda parts: parts[1]["scalars"].update(g=parts[1]["scalars"]["default"]),
    "scalar-missing": lambda parts: parts[1]["scalars"]["default"].pop("weight_sum"),
    "scalar-unknown": _scalar("momentum", 0.5),
    "scalar-text": _scalar("weight_sum", "1"),
    "scalar-null": _scalar("weight_sum", None),
    "scalar-true": _scalar("k", True),
    "scalar-nan": _scalar("weight_sum", float("nan")),
    "scalar-infinite": _scalar("lr_max", float("inf")),
    "k-negative": _scalar("k", -1),
    "k-fractional": _scalar("k", 1.5),
    "k-beyond-doubles": _scalar("k", 10**400),
    "weight-sum-negative": _scalar("weight_sum", -1.0),
    "lr-max-overflows": _scalar("lr_max", 1e300),
    # These overflow in steps to come.
    "lr-max-large": _scalar("lr_max", 1e150),
    "weight-sum-large": _scalar("weight_sum", 1e305),
    "k-beyond-json": _scalar("k", 2**53),
    # These make no sense of a stale gradient.
    "c-negative": _scalar("c", -1.0),
    "c-above-1": _scalar("c", 1.5),
    "staleness-negative": _scalar("staleness", -0.5),
    "beta-0": _scalar("beta", 0.0),
    "beta-tiny": _scalar("beta", 1e-300),
    "beta-above-1": _scalar("beta", 1.5),
    "beta-negative": _scalar("beta", -0.9),
    "staleness-of-minus-1": _scalar("staleness", -1.0),
    "expected-staleness-negative": lambda parts: parts[1].update(expected_staleness=-1.0),
    "metric-not-a-number": lambda parts: parts[1].update(metrics={"loss": {"1": "low"}}),
    "metric-infinite": lambda parts: parts[1].update(metrics={"loss": {"1": float("inf")}}),
    "metric-of-a-later-step": lambda parts: parts[1].update(metrics={"loss": {"3": 1.0}}),
    "metric-without-a-name": lambda parts: parts[1].update(metrics={"": {"1": 1.0}}),
    "metric-step-of-words": lambda parts: parts[1].update(metrics={"loss": {"one": 1.0}}),
    "too-many-metrics": lambda parts: parts[1].update(metrics={f"m{number}": {"1": 1.0} for number in range(65)}),
    "units-beyond-doubles": _data(spec={"length": 1, "unit": 1, "passes": None}, reached=2**53 - 1),
    "too-many-open-units": _data("one", "two", spec={"length": 2**20, "unit": 1}, reached=2**20, open=[[0, 2**19 + 1]]),
}
SPECS: dict[str, Callable[[Parts], object]] = {
    "no-spec": lambda parts: parts[1].pop("spec"),
    "spec-null": lambda parts: parts[1].update(spec=None),
    "unknown-algorithm": lambda parts: parts[1]["spec"]["optimizer"].update(algorithm="magic"),
    "bad-rate": lambda parts: parts[1]["spec"]["optimizer"].update(lr=-1),
    "no-parameters": lambda parts: parts[1]["spec"].update(parameters=[]),
    "unknown-group": lambda parts: parts[1]["spec"]["parameters"][0].update(group="none"),
    "many-shards": lambda parts: parts[1]["spec"].update(shards=1000),
    "name-twice": lambda parts: parts[1]["spec"]["parameters"][0].update(name="b"),
}


def spoilt(state: bytes, spoil: Callable[[Parts], object]) -> bytes:
    parts = tensors_of(state), document_of(state)
    spoil(parts)
    return body_of(*parts)


@pytest.mark.parametrize("cases", [TENSORS, DOCUMENTS], ids=["tensors", "documents"])
def test_states_that_are_spoilt_in_one_way(
    state: bytes, refused: Callable[[bytes, str], None], cases: dict[str, Callable[[Parts], object]]
) -> None:
    for name, spoil in cases.items():
        try:
            refused(spoilt(state, spoil), "malformed-tensors")
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("algorithm", ["sgd", "gpa_sgd"])
def test_a_k_beyond_doubles_of_a_method_that_does_not_reckon_with_it(
    connect: Callable[..., Api], service: ThreadService, algorithm: str
) -> None:
    api = connect(service.url)
    api.create(optimizer={"algorithm": algorithm})
    train(api, 0, 2)
    answer = import_(api, spoilt(export(api), DOCUMENTS["k-beyond-doubles"]), replace="true")
    assert (answer.status_code, slug(answer)) == (422, "malformed-tensors"), answer.text


def test_specs_that_are_wrong(state: bytes, refused: Callable[[bytes, str], None]) -> None:
    for name, spoil in SPECS.items():
        expected = "malformed-tensors" if name in ("no-spec", "spec-null") else "invalid-spec"
        try:
            refused(spoilt(state, spoil), expected)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_a_wrong_spec_is_told_by_its_field(state: bytes, connect: Callable[..., Api], service: ThreadService) -> None:
    answer = import_(connect(service.url), spoilt(state, SPECS["bad-rate"]))
    assert answer.json()["field"] == "optimizer.lr"


def test_metadata_that_is_no_document(state: bytes, refused: Callable[[bytes, str], None]) -> None:
    for text in ("", "null", "[]", "{", "{}", "1", '"y"', "NaN", '{"a": ' * 5000):
        length = int.from_bytes(state[:8], "little")
        whole = body_of(tensors_of(state), None).replace(b'"freestep.state":"null"', b'"freestep.state":"@"')
        header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip(b" ")
        escaped = text.replace('"', '\\"').encode()
        header = header.replace(b'"@"', b'"' + escaped + b'"')
        refused(struct.pack("<Q", len(header)) + header + state[8 + length :], "malformed-tensors")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_states_that_are_cut_short_or_too_long(state: bytes, refused: Callable[[bytes, str], None], size: int) -> None:
    refused(state[:size], "malformed-tensors")
    refused(state + bytes(4), "malformed-tensors")


def test_shapes_that_are_only_claimed_cost_no_memory(
    state: bytes, refused: Callable[[bytes, str], None], service: ThreadService, api: Api
) -> None:
    def enlarge(parts: Parts) -> None:
        parts[1]["spec"]["parameters"][0]["shape"] = [2**40, 2**20]

    memory = service.registry.get(api.run)._context.resources.memory
    free = free_memory(memory)
    refused(spoilt(state, enlarge), "malformed-tensors")
    assert free_memory(memory) == free
