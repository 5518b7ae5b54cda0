"""Headers of the data path, parsed without a network; and the same fields in the OpenAPI document."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_calls import request_of
from documented import openapi
from freestep.api.models import Receipt
from freestep.errors import BodyTooLarge, LengthRequired, MalformedRequest, UnsupportedMediaType
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.domain.records import Claim
from freestep_service.web.headers import (
    LEASE_ID,
    PUSH_HEADERS,
    Preferences,
    body_length,
    claim,
    preferences,
    receipt_headers,
    upload,
)

NEEDED = {"Freestep-Lease": "l" * 32, "Freestep-Token": "7", "Freestep-Step": "12", "Idempotency-Key": "key"}


def test_a_claim_is_what_the_headers_hold() -> None:
    more = {"Freestep-Samples": "32", "Freestep-Loss": "-1e-3", "Freestep-Speed": "2.5"}
    more["Freestep-Units"] = "train=18,17;other=3"
    units = {"other": (3,), "train": (17, 18)}
    expected = Claim(lease="l" * 32, token=7, step=12, key="key", samples=32.0, loss=-0.001, speed=2.5, units=units)
    assert claim(request_of("POST", "/", NEEDED | more)) == expected
    spaced = {name: f" {value}\t" for name, value in (NEEDED | more).items()}
    assert claim(request_of("POST", "/", spaced)) == expected


def test_what_is_optional_may_be_absent() -> None:
    parsed = claim(request_of("POST", "/", NEEDED))
    assert (parsed.samples, parsed.loss, parsed.speed) == (None, None, None)


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_required_may_not_be_absent(name: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        claim(request_of("POST", "/", {key: value for key, value in NEEDED.items() if key != name}))
    assert refused.value.extensions["field"] == name


@pytest.mark.parametrize("name", [*NEEDED, "Freestep-Samples", "Freestep-Loss", "Freestep-Speed", "Freestep-Units"])
def test_a_header_stands_once(name: str) -> None:
    request = request_of("POST", "/", {**NEEDED, name: "1"})
    request.scope["headers"].append((name.lower().encode(), b"1"))
    with pytest.raises(MalformedRequest) as refused:
        claim(request)
    assert refused.value.extensions["field"] == name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Freestep-Lease", ["", "l" * 201, "two words", "ümlaut", "\x7f", "..", "a/b", "a:b"]),
        ("Freestep-Token", ["", "seven", "-1", "1.0", "0x7", "٣", "1" * 19]),
        ("Freestep-Step", ["", "first", "-1", "0.5", "1e3", "9" * 19]),
        ("Idempotency-Key", ["", "k" * 201, "a b"]),
        ("Freestep-Samples", ["", "many", "0", "-3", "inf", "nan", "1e39", "1e-320", "1_0"]),
        ("Freestep-Loss", ["", "low", "nan", "inf", "-inf", "infinity", "1_0", "1 0", "0x1", "1e", ".", "1e999"]),
        ("Freestep-Speed", ["", "fast", "0", "-1", "inf"]),
    ],
)
def test_what_a_header_may_not_hold(name: str, values: list[str]) -> None:
    for value in values:
        request = request_of("POST", "/", NEEDED)
        request.scope["headers"] = [each for each in request.scope["headers"] if each[0] != name.lower().encode()]
        request.scope["headers"].append((name.lower().encode(), value.encode("latin-1", "replace")))
        with pytest.raises(MalformedRequest) as refused:
            claim(request)
        assert refused.value.extensions["field"] == name, value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("return=representation", Preferences(representation=True)),
        ("RETURN=representation , Wait=2.5", Preferences(True, 2.5)),
        ('return="representation"; foo, wait="3"', Preferences(True, 3.0)),
        ("return=minimal", Preferences()),
        ("respond-async, handling=lenient; bar=1", Preferences()),
        ("wait=0", Preferences()),
        ("wait=1e9", Preferences(wait=600.0)),
        ("wait=1, return=representation, wait=5, return=minimal", Preferences(True, 1.0)),
        ("", Preferences()),
    ],
)
def test_preferences(text: str, expected: Preferences) -> None:
    assert preferences(request_of("GET", "/", {"Prefer": text})) == expected


def test_preferences_may_be_several_headers() -> None:
    request = request_of("GET", "/", {"Prefer": "wait=5"})
    request.scope["headers"].append((b"prefer", b"return=representation"))
    assert preferences(request) == Preferences(True, 5.0)
    assert preferences(request_of("GET", "/")) == Preferences()


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", "", "1_0", "1 0"])
def test_a_wait_is_a_number_of_seconds(wait: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        preferences(request_of("GET", "/", {"Prefer": f"wait={wait}"}))
    assert refused.value.extensions["field"] == "Prefer"


@pytest.mark.parametrize(
    ("preferred", "applied"),
    [
        (Preferences(), {}),
        (Preferences(True), {"Preference-Applied": "return=representation"}),
        (Preferences(True, 2.5), {"Preference-Applied": "return=representation, wait=2.5"}),
    ],
)
def test_what_was_honoured_is_named(preferred: Preferences, applied: dict[str, str]) -> None:
    assert preferred.applied() == applied


@pytest.mark.parametrize("media_type", [MEDIA_TYPE, MEDIA_TYPE.upper(), f"{MEDIA_TYPE}; charset=binary"])
def test_a_body_of_tensors_has_a_length(media_type: str) -> None:
    assert body_length(request_of("POST", "/", {"Content-Type": media_type, "Content-Length": "100"}), 100) == 100


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, UnsupportedMediaType),
        ({"Content-Type": "application/json", "Content-Length": "1"}, UnsupportedMediaType),
        ({"Content-Type": MEDIA_TYPE}, LengthRequired),
        ({"Content-Type": MEDIA_TYPE, "Content-Length": "1", "Transfer-Encoding": "chunked"}, LengthRequired),
        ({"Content-Type": MEDIA_TYPE, "Content-Length": "-1"}, MalformedRequest),
        ({"Content-Type": MEDIA_TYPE, "Content-Length": "ten"}, MalformedRequest),
        ({"Content-Type": MEDIA_TYPE, "Content-Length": "101"}, BodyTooLarge),
    ],
)
def test_a_body_that_is_refused_for_its_headers(headers: dict[str, str], problem: type[Exception]) -> None:
    with pytest.raises(problem):
        body_length(request_of("POST", "/", headers), 100)


def test_an_upload_of_several_parts_needs_a_key() -> None:
    assert upload(request_of("PUT", "/", {"Idempotency-Key": "one"}), required=True) == "one"
    assert upload(request_of("PUT", "/", {"Idempotency-Key": "one"}), required=False) == "one"
    assert upload(request_of("PUT", "/"), required=False) is None
    with pytest.raises(MalformedRequest):
        upload(request_of("PUT", "/"), required=True)


def test_a_receipt_as_headers() -> None:
    receipt = Receipt(decision="dropped", reason="stale", step=4, staleness=9, replayed=True)
    assert receipt_headers(receipt) == {
        "Freestep-Decision": "dropped",
        "Freestep-Reason": "stale",
        "Freestep-Receipt-Step": "4",
        "Freestep-Staleness": "9",
        "Freestep-Replayed": "true",
    }
    assert "Freestep-Reason" not in receipt_headers(Receipt(decision="applied", step=4, staleness=0, replayed=False))


def documented(method: str, path: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The parameters of an operation in the OpenAPI document, by place and name."""
    operation = openapi()["paths"][path][method]
    return {(each["in"], each["name"]): each for each in operation["parameters"]}


def test_the_openapi_document_is_of_the_fields_that_are_parsed() -> None:
    push, status = documented("post", "/v1/runs/{run}/gradients"), documented("get", "/v1/runs/{run}")
    assert {name for place, name in push if place == "header"} == {field.name for field in PUSH_HEADERS}
    for field in PUSH_HEADERS:
        assert push["header", field.name] == field.document()
        assert push["header", field.name]["required"] is (field.name in NEEDED)
    assert {name for place, name in push if place == "query"} == {"shard", "of", "dtype"}
    assert push["path", "run"]["schema"]["pattern"] == status["path", "run"]["schema"]["pattern"]
    pull = documented("get", "/v1/runs/{run}/parameters")
    assert pull["query", "point"]["schema"] == {"type": "string", "enum": ["x", "y", "z"], "default": "x"}
    assert pull["query", "min_step"]["schema"]["minimum"] == 0
    assert {name for place, name in pull if place == "query"} == {
        *("shard", "of", "point", "dtype", "min_step", "checkpoint", "cut"),
    }
    assert documented("put", "/v1/runs/{run}/leases/{lease}")["path", "lease"]["schema"]["pattern"] == f"^{LEASE_ID}$"
