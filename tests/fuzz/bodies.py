"""Safetensors bodies of the manifest of `malformed.bodies` as inputs of targets: how one comes, and the body."""

from __future__ import annotations

from collections.abc import Iterator

from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from malformed.bodies import PARAMETERS

__all__ = ["MANIFEST", "WORDS", "framed", "pieces", "seed"]

MANIFEST = Manifest(ParameterSpec.model_validate(parameter) for parameter in PARAMETERS)

_AS_IT_IS = 255
_PREFIX = 8

WORDS = (
    b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"-", b"0", b"24", b"1e9", b"1.0", b"null", b"true", b"NaN",
    b"F16", b"BF16", b"F64", b"I8", b"I64", b"__metadata__", b"freestep.encoding", b"freestep.block", b"int8", b"topk",
    b"weight", b"bias", b"::scale", b"::values", b"::indices", b"\\ud800", b"\xff", b"\x00", b" ",
    b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f",
)  # fmt: skip


def seed(body: bytes, data_length: int | None = None, size: int = 0) -> bytes:
    """An input: a body that comes in pieces of `size` bytes, 0 for all at once.

    data_length: bytes of its tensors, up to 254, where the header's length is to be that of what stands before them,
    however it is changed; None leaves it as it is.
    """
    return bytes([size, _AS_IT_IS if data_length is None else data_length]) + body


def framed(data: bytes) -> tuple[bytes, int]:
    """The body that an input stands for, and the size of the pieces that it comes in."""
    if len(data) < 2:
        return data, len(data)
    size, data_length, body = data[0], data[1], data[2:]
    if data_length != _AS_IT_IS:
        header_length = max(len(body) - _PREFIX - data_length, 0)
        body = header_length.to_bytes(_PREFIX, "little") + body[_PREFIX:]
    return body, size or len(body)


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    """A body in pieces of `size` bytes."""
    for begin in range(0, len(body), max(size, 1)):
        yield body[begin : begin + size]
