"""Bodies that a gradient push must refuse, made for one small manifest.

Each function of `BODIES` makes a body that differs from a valid one in the one way its name says. All are
`malformed-tensors`, except those named in `NON_FINITE`: they are well formed and hold NaN or infinity. `KINDS` has
their names by what is wrong with them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from typing import Any

__all__ = ["BODIES", "KINDS", "NON_FINITE", "PARAMETERS", "body", "header", "numel", "valid"]

PARAMETERS: list[dict[str, Any]] = [
    {"name": "weight", "shape": [3, 2]},
    {"name": "empty", "shape": [0, 4]},
    {"name": "bias", "shape": [3]},
    {"name": "temperature", "shape": []},
]
"""The manifest that the bodies are for, as in a run's spec."""

BODIES: dict[str, Callable[[], bytes]] = {}
"""Each hostile body by the name of its fault."""

KINDS: dict[str, list[str]] = {}
"""The names of the bodies by the kind of their fault."""

NON_FINITE = frozenset({"nan-value", "infinite-value", "negative-infinite-value", "bf16-nan-value"})

Header = dict[str, Any]

_ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


def numel() -> int:
    """The number of elements of the manifest."""
    return sum(prod(parameter["shape"]) for parameter in PARAMETERS)


def header(dtype: str = "F32") -> Header:
    """The header of a valid body, to be changed by the caller."""
    entries: Header = {}
    end = 0
    for parameter in PARAMETERS:
        begin, end = end, end + prod(parameter["shape"]) * _ITEMSIZE[dtype]
        entries[parameter["name"]] = {
            "dtype": dtype,
            "shape": parameter["shape"].copy(),
            "data_offsets": [begin, end],
        }
    return entries


def body(head: Header | str | bytes, data: bytes | None = None, *, size: int | None = None) -> bytes:
    """A body from its header and data; `size` is the header length it declares, unless the true one."""
    if isinstance(head, dict):
        head = json.dumps(head)
    if isinstance(head, str):
        head = head.encode()
    if data is None:
        data = _values()
    return (len(head) if size is None else size).to_bytes(8, "little") + head + data


def valid(dtype: str = "F32", metadata: dict[str, str] | None = None) -> bytes:
    """A body that is accepted: the values 0.5, 1.5, ... in the manifest's order."""
    head = header(dtype)
    if metadata is not None:
        head["__metadata__"] = metadata
    return body(head, _values(dtype))


def _values(dtype: str = "F32") -> bytes:
    values = [index + 0.5 for index in range(numel())]
    if dtype == "BF16":  # the upper halves of F32, exact for values this small
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{'f' if dtype == 'F32' else 'e'}", *values)


def _case(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        BODIES[name] = make
        return make

    return register


def _spoilt(name: str, spoil: Callable[[Header], object], data: bytes | None = None) -> None:
    """Registers a body whose header was changed by `spoil`."""

    @_case(name)
    def make() -> bytes:
        head = header()
        spoil(head)
        return body(head, data)


def _end_of_kind(kind: str) -> None:
    """Assigns the bodies registered since the last call to a kind."""
    known = {name for names in KINDS.values() for name in names}
    KINDS[kind] = [name for name in BODIES if name not in known]


def _text(name: str, text: str | bytes) -> None:
    """Registers a body with any text as its header."""
    BODIES[name] = lambda: body(text)


def _replaced(name: str, old: str, new: str, count: int = 1) -> None:
    """Registers a body whose header's JSON has `new` in place of `old`."""

    @_case(name)
    def make() -> bytes:
        text = json.dumps(header())
        assert old in text
        return body(text.replace(old, new, count))


# The frame: the header's length against the body's.

BODIES["nothing"] = lambda: b""
BODIES["truncated-length"] = lambda: valid()[:7]
BODIES["length-alone"] = lambda: valid()[:8]
BODIES["truncated-header"] = lambda: valid()[:60]
BODIES["header-length-cuts-the-header"] = lambda: body(header(), size=40)
BODIES["header-length-takes-in-data"] = lambda: body(header(), size=len(json.dumps(header())) + 4)
BODIES["header-length-past-body"] = lambda: body(header(), size=len(valid()) - 7)
BODIES["header-length-0"] = lambda: body(header(), size=0)
BODIES["header-length-1"] = lambda: body(header(), size=1)
BODIES["header-length-2**40"] = lambda: body(header(), size=2**40)
BODIES["header-length-2**63"] = lambda: body(header(), size=2**63)
BODIES["header-length-2**64-1"] = lambda: body(header(), size=2**64 - 1)
BODIES["header-length-big-endian"] = lambda: valid()[7::-1] + valid()[8:]
BODIES["trailing-bytes"] = lambda: valid() + b"\0"
BODIES["two-bodies"] = lambda: valid() * 2
BODIES["shorter-than-tensors"] = lambda: valid()[:-1]
BODIES["no-tensor-data"] = lambda: body(header(), b"")
BODIES["header-padded-past-the-limit"] = lambda: body(json.dumps(header()) + " " * 200_000)

_end_of_kind("frame")

# The text: JSON and no more than JSON.

_text("not-json", b"weights=0.5&bias=1.5")
_text("pickle", b"\x80\x04}\x94\x8c\x06weight\x94K\x01s.")
_text("null", "null")
_text("list", "[]")
_text("string", '"weight"')
_text("empty-header-object", "{}")
_text("leading-space", " " + json.dumps(header()))
_text("byte-order-mark", json.dumps(header()).encode("utf-8-sig"))
_text("utf-16", json.dumps(header()).encode("utf-16-le"))
_text("utf-32", json.dumps(header()).encode("utf-32-le"))
_text("nul-padding", json.dumps(header()) + "\0\0\0\0")
_text("second-document", json.dumps(header()) + "{}")
_text("trailing-comma", json.dumps(header())[:-1] + ",}")
_text("comment", json.dumps(header()) + "/* weights */")
_text("single-quotes", json.dumps(header()).replace('"', "'"))
_text("nested-lists", '{"weight": ' + "[" * 30_000 + "]" * 30_000 + "}")
_text("nested-objects", '{"a": ' * 10_000 + "0" + "}" * 10_000)
_text("nested-unclosed", '{"weight": ' + "[" * 60_000)
_text("invalid-utf-8", json.dumps(header()).encode().replace(b"weight", b"we\xffght"))
_text("encoded-surrogate", json.dumps(header()).encode().replace(b"weight", b"we\xed\xa0\x80ght"))
_replaced("nan-offset", "[0, 24]", "[NaN, 24]")
_replaced("infinite-offset", "[0, 24]", "[0, Infinity]")
_replaced("overflowing-offset", "[0, 24]", "[0, 1e999]")
_replaced("large-integer", "[0, 24]", f"[0, {'9' * 4000}]")
_replaced("very-large-integer", "[0, 24]", f"[0, {'9' * 50_000}]")
_replaced("very-large-dimension", "[3, 2]", f"[3, 1{'0' * 4000}]")

_end_of_kind("text")

# Names.

_replaced("duplicate-name", '"empty"', '"weight"')
_text("same-entry-twice", json.dumps(header())[:-1] + "," + json.dumps(header())[1:])
_replaced("duplicate-dtype", '"dtype": "F32"', '"dtype": "F32", "dtype": "F32"')
_replaced("duplicate-offsets", '"shape"', '"data_offsets": [0, 24], "shape"')
_replaced("escaped-duplicate-name", '"empty"', '"\\u0077eight"')
_spoilt("missing-tensor", lambda head: head.pop("temperature"), _values()[:-4])
_spoilt("missing-empty-tensor", lambda head: head.pop("empty"))
_spoilt("misspelt-name", lambda head: head.update(Weight=head.pop("weight")))
_spoilt("nameless-tensor", lambda head: head.update({"": head.pop("weight")}))
_spoilt(
    "extra-tensor",
    lambda head: head.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [40, 44]}),
    _values() + b"\0\0\0\0",
)
_spoilt(
    "extra-empty-tensor",
    lambda head: head.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [40, 40]}),
)

_end_of_kind("names")

# Entries.

_spoilt("null-entry", lambda head: head.update(bias=None))
_spoilt("list-entry", lambda head: head.update(bias=["F32", [3], [24, 36]]))
_spoilt("no-dtype", lambda head: head["bias"].pop("dtype"))
_spoilt("no-shape", lambda head: head["bias"].pop("shape"))
_spoilt("no-offsets", lambda head: head["bias"].pop("data_offsets"))
_spoilt("extra-key", lambda head: head["bias"].update(stride=[1]))

_end_of_kind("entries")

_spoilt("f64", lambda head: head["bias"].update(dtype="F64"))
_spoilt("i32", lambda head: head["bias"].update(dtype="I32"))
_spoilt("unknown-dtype", lambda head: head["bias"].update(dtype="F31"))
_spoilt("lower-case-dtype", lambda head: head["bias"].update(dtype="f32"))
_spoilt("null-dtype", lambda head: head["bias"].update(dtype=None))
_spoilt("list-dtype", lambda head: head["bias"].update(dtype=["F32"]))
_spoilt("narrower-dtype-than-data", lambda head: head["bias"].update(dtype="F16"))

_end_of_kind("dtypes")

_spoilt("transposed-shape", lambda head: head["weight"].update(shape=[2, 3]))
_spoilt("flattened-shape", lambda head: head["weight"].update(shape=[6]))
_spoilt("shape-of-one-more-dimension", lambda head: head["weight"].update(shape=[1, 3, 2]))
_spoilt("scalar-as-vector", lambda head: head["temperature"].update(shape=[1]))
_spoilt("empty-of-another-shape", lambda head: head["empty"].update(shape=[4, 0]))
_spoilt("negative-dimensions", lambda head: head["weight"].update(shape=[-3, -2]))
_spoilt("float-dimension", lambda head: head["weight"].update(shape=[3.0, 2]))
_spoilt("string-dimension", lambda head: head["weight"].update(shape=["3", 2]))
_spoilt("boolean-dimension", lambda head: head["empty"].update(shape=[False, 4]))
_spoilt("number-for-shape", lambda head: head["bias"].update(shape=3))
_spoilt("object-for-shape", lambda head: head["temperature"].update(shape={}))

_end_of_kind("shapes")

# Offsets, counted in bytes: weight 0 to 24, empty 24 to 24, bias 24 to 36, temperature 36 to 40.

_spoilt("negative-offset", lambda head: head["weight"].update(data_offsets=[-24, 0]))
_spoilt("negative-begin", lambda head: head["weight"].update(data_offsets=[-4, 20]))
_spoilt("float-offset", lambda head: head["weight"].update(data_offsets=[0, 24.0]))
_spoilt("boolean-offset", lambda head: head["weight"].update(data_offsets=[False, 24]))
_spoilt("string-offset", lambda head: head["weight"].update(data_offsets=["0", "24"]))
_spoilt("null-offset", lambda head: head["weight"].update(data_offsets=[None, 24]))
_spoilt("one-offset", lambda head: head["weight"].update(data_offsets=[24]))
_spoilt("three-offsets", lambda head: head["weight"].update(data_offsets=[0, 24, 24]))
_spoilt("number-for-offsets", lambda head: head["weight"].update(data_offsets=24))
_spoilt("inverted-offsets", lambda head: head["weight"].update(data_offsets=[24, 0]))
_spoilt("span-too-short", lambda head: head["weight"].update(data_offsets=[0, 20]))
_spoilt("span-too-long", lambda head: head["weight"].update(data_offsets=[0, 28]))
_spoilt("overlap", lambda head: head["bias"].update(data_offsets=[20, 32]))
_spoilt("same-bytes-twice", lambda head: head["temperature"].update(data_offsets=[24, 28]), _values()[:-4])
_spoilt("gap", lambda head: head["temperature"].update(data_offsets=[40, 44]), _values() + b"\0\0\0\0")
_spoilt("past-the-end", lambda head: head["temperature"].update(data_offsets=[2**40, 2**40 + 4]))
_spoilt("past-64-bits", lambda head: head["temperature"].update(data_offsets=[2**64, 2**64 + 4]))
_spoilt("empty-tensor-inside-another", lambda head: head["empty"].update(data_offsets=[4, 4]))
_spoilt("empty-tensor-past-the-end", lambda head: head["empty"].update(data_offsets=[44, 44]))


@_case("first-bytes-unclaimed")
def _first_bytes_unclaimed() -> bytes:
    head = header()
    for entry in head.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return body(head, bytes(8) + _values())


_end_of_kind("offsets")

# Metadata.

_spoilt("null-metadata", lambda head: head.update(__metadata__=None))
_spoilt("list-metadata", lambda head: head.update(__metadata__=["freestep"]))
_spoilt("number-in-metadata", lambda head: head.update(__metadata__={"step": 3}))
_spoilt("object-in-metadata", lambda head: head.update(__metadata__={"freestep.encoding": {}}))
_spoilt("null-encoding", lambda head: head.update(__metadata__={"freestep.encoding": None}))
_spoilt("unknown-encoding", lambda head: head.update(__metadata__={"freestep.encoding": "morse"}))
_spoilt("surrogate-in-metadata", lambda head: head.update(__metadata__={"freestep.encoding": "\ud800"}))
_spoilt("surrogate-in-metadata-name", lambda head: head.update(__metadata__={"\udfff": ""}))
_replaced("metadata-twice", "{", '{"__metadata__": {}, "__metadata__": {}, ')


_end_of_kind("metadata")

# Values, which are checked with the gradient's norm.

BODIES["nan-value"] = lambda: valid()[:-4] + struct.pack("<f", float("nan"))
BODIES["infinite-value"] = lambda: valid()[:-4] + struct.pack("<f", float("inf"))
BODIES["negative-infinite-value"] = lambda: body(header(), struct.pack("<f", float("-inf")) + _values()[4:])
BODIES["bf16-nan-value"] = lambda: valid("BF16")[:-2] + b"\xc0\x7f"

_end_of_kind("values")
