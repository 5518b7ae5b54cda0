"""Whatever a receiver is fed, in whatever pieces, it ends with the manifest's tensors or with MalformedTensors."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hypothesis import strategies as st
from safetensors import deserialize

from freestep.errors import MalformedTensors
from freestep.wire.receiver import Receiver, lay
from fuzz.bodies import MANIFEST, WORDS, framed, pieces, seed
from fuzz.target import Target, mutants
from malformed.bodies import BODIES, header, numel, valid
from malformed.bodies import body as body_with

__all__ = ["TARGET"]

_UNTOUCHED = b"\xaa" * 4 * MANIFEST.numel


def _received(body: bytes, size: int) -> str | tuple[Mapping[str, str], Mapping[str, str], bytes]:
    """What a body is refused with, or the dtypes, the metadata and the memory that it becomes."""
    target = bytearray(_UNTOUCHED)
    try:
        receiver = Receiver(MANIFEST, memoryview(target), len(body))
        for piece in pieces(body, size):
            lay(receiver, piece)
    except MalformedTensors as refusal:
        assert target == _UNTOUCHED
        # The service puts the refusal into a document of UTF-8.
        json.dumps(refusal.to_document(422), ensure_ascii=False, allow_nan=False).encode()
        return str(refusal)
    assert receiver.complete and not receiver.missing
    return receiver.dtypes, receiver.metadata, bytes(target)


def check(data: bytes) -> None:
    body, size = framed(data)
    found = _received(body, len(body))
    assert _received(body, size) == found
    if not isinstance(found, str):
        # What is accepted is a body to everyone else too.
        theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in deserialize(body)}
        assert theirs == {slot.name: (found[0][slot.name], slot.shape) for slot in MANIFEST.slots}


_SEEDS = [
    *(seed(valid(dtype, metadata), width * numel(), size)
      for dtype, width in (("F32", 4), ("BF16", 2), ("F16", 2))
      for metadata in (None, {"a": "b"})
      for size in (0, 1, 7)),
    *(seed(make()) for make in BODIES.values() if len(make()) < 1000),
]  # fmt: skip

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def _other_values(draw: st.DrawFn) -> bytes:
    """A valid body in whose header one place holds any JSON."""
    head = header()
    name = draw(st.sampled_from([*head, "__metadata__", "other"]))
    if name in head and draw(st.booleans()):
        head[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))] = draw(_JSON)
    else:
        head[name] = draw(_JSON)
    return seed(body_with(head))


TARGET = Target(check, _SEEDS, WORDS, mutants(_SEEDS, WORDS) | _other_values())
