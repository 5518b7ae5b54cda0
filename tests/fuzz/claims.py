"""Whatever the headers and the query of a request say, they are what their schemas say, or MalformedRequest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from freestep.errors import BodyTooLarge, LengthRequired, MalformedRequest, RangeNotSatisfiable, UnsupportedMediaType
from freestep_service.domain.events import Place
from freestep_service.web.fields import Header, Query
from freestep_service.web.headers import (
    IMPORT_HEADERS,
    PULL_HEADERS,
    PUSH_HEADERS,
    UPLOAD_HEADERS,
    Preferences,
    body_length,
    claim,
    place,
    preferences,
    upload,
)
from freestep_service.web.problems import problem_response
from freestep_service.web.responses import etag, not_modified, requested_span
from freestep_service.web.routes.data_request import CHECKPOINT, CUT, DTYPE, MIN_STEP, OF, POINT, REPLACE, SHARD
from freestep_service.web.routes.events import AFTER, FOLLOW, FROM
from freestep_service.web.routes.history import POINTS, SHOWN
from fuzz.target import Target, mutants

__all__ = ["TARGET"]

_HEADERS = tuple(
    {header.name: header for header in (*PUSH_HEADERS, *PULL_HEADERS, *UPLOAD_HEADERS, *IMPORT_HEADERS, AFTER)}.values()
)
_QUERIES = (CHECKPOINT, CUT, DTYPE, MIN_STEP, OF, POINT, REPLACE, SHARD, FOLLOW, FROM, POINTS, SHOWN)
_SIZE, _LIMIT = 1000, 10**9
_REFUSALS = (MalformedRequest, UnsupportedMediaType, LengthRequired, BodyTooLarge, RangeNotSatisfiable)


def _request(data: bytes) -> Request:
    """An input's first line is a query; the others are headers, as a parser gives them."""
    query, *lines = data.split(b"\n")
    headers = [
        (name.strip().lower(), value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines)
    ]
    return Request({"type": "http", "method": "POST", "path": "/", "query_string": query, "headers": headers})


def _fits(schema: Mapping[str, Any], value: object) -> bool:
    """Whether a value is one of a field's JSON schema."""
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "number":
        return (
            type(value) is float
            and abs(value) < float("inf")
            and schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and not value <= schema.get("exclusiveMinimum", value - 1)
        )
    if schema["type"] == "boolean":
        return type(value) is bool
    if "enum" in schema:
        return value in schema["enum"]
    if isinstance(value, Place):
        return re.search(schema["pattern"], str(value)) is not None
    return not isinstance(value, str) or re.search(schema.get("pattern", ""), value) is not None


def _fields_fit(request: Request) -> None:
    for field in (*_HEADERS, *_QUERIES):
        assert isinstance(field, Header | Query)
        try:
            value: Any = field.find(request)
        except MalformedRequest as refusal:
            assert refusal.extensions["field"] == field.name
            problem_response(refusal)
        else:
            assert value is None or _fits(field.kind.schema, value), (field.name, value)


def check(data: bytes) -> None:
    request = _request(data)
    _fields_fit(request)
    tag = etag(1, 2, "x", "F32")
    not_modified(request, {"ETag": tag})
    for read in (
        claim,
        place,
        preferences,
        lambda request: upload(request, required=True),
        lambda request: body_length(request, _LIMIT),
        lambda request: requested_span(request.headers, tag, _SIZE),
    ):
        try:
            found: Any = read(request)
        except _REFUSALS as refusal:
            problem_response(refusal)
            continue
        if isinstance(found, Preferences):
            assert 0 <= found.wait <= 600
            "".join(found.applied().values()).encode("ascii")
        elif read is not place and isinstance(found, tuple):
            assert 0 <= found[0] < found[1] <= _SIZE
        elif isinstance(found, int):
            assert 0 <= found <= _LIMIT


_CLAIM = (
    b"Freestep-Lease: abc-1\nFreestep-Token: 7\nFreestep-Step: 12\nIdempotency-Key: key-1\nFreestep-Samples: 32\n"
    b"Freestep-Loss: 0.5\nFreestep-Units: train=17,18;other=3\nFreestep-Speed: 1e3\n"
    b"Prefer: return=representation, wait=2.5\n"
    b"Content-Type: application/vnd.safetensors\nContent-Length: 1000"
)
_SEEDS = (
    b"shard=1&of=2&point=y&dtype=BF16&min_step=12&cut=word\n" + _CLAIM,
    b'replace=true&dtype=I8&point=z\nIf-Match: "e1-s2"\nIdempotency-Key: a\nContent-Type: application/vnd.safetensors',
    b'\nRange: bytes=10-20\nIf-Range: "e1-s2-x-F32"\nIf-None-Match: W/"e1-s2-x-F32", *\nPrefer: wait=600',
    b"checkpoint=12&point=x&dtype=F16&min_step=12\n",
    b"curves=loss,metrics&points=512\n",
    b"follow=false&from=12\nLast-Event-ID: 1-20.1764412800000",
    b"shard=%30\nRange: bytes=-5\nFreestep-Step: 0\nFreestep-Step: 1",
)
_WORDS = (
    b"\n", b": ", b"=", b"&", b",", b";", b'"', b"-", b"_", b"+", b".", b"%", b" ", b"\t", b"\x00", b"\xb2", b"\xff",
    b"\xc2\xb2", b"nan", b"inf", b"1e400", b"0x1", b"1_0", b"true", b"*", b"W/", b"bytes=", b"wait=", b"9" * 19,
    b"9" * 18, b"%D9%A3", b"%00", b"%zz", b"chunked", b"Transfer-Encoding",
    *(header.name.encode() for header in _HEADERS), *(query.name.encode() for query in _QUERIES),
)  # fmt: skip

TARGET = Target(check, _SEEDS, _WORDS, mutants(_SEEDS, _WORDS))
