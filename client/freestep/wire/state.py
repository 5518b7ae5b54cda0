"""A run's whole state as a safetensors body: every state vector of its optimizer, and all scalars.

    __metadata__      freestep.state: a StateDocument, as JSON
    NAME::BUFFER      tensor NAME's part of the state vector BUFFER (y, z, exp_avg_sq, ...), F32, of the tensor's shape

It is written vector after vector, each in the manifest's order, and read in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import ValidationError

from freestep.api.models import ParameterSpec
from freestep.api.run_state import StateDocument
from freestep.api.validation import first_fault
from freestep.errors import InvalidSpec, MalformedTensors
from freestep.wire.encoding import SIZES, Encoding
from freestep.wire.header import encode_header, parse_entries, parse_header
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import FramedReceiver

__all__ = ["StateReceiver", "encode_state_header", "parse_document"]

_METADATA = "freestep.state"
_MARK = "::"
"""Between a tensor's name and that of a buffer, the last one in a name."""
_LONGEST_HEADER = 64 * 1024**2
"""Bytes: room for some hundred thousand tensors, and for the spec that names them."""


def encode_state_header(manifest: Manifest, document: StateDocument) -> bytes:
    """The length prefix and header of a state's body, whose vectors follow in the order of `document.buffers`.

    manifest: of the run, or of a shard's part of it.
    """
    return encode_header(_layout(manifest, document.buffers), "F32", {_METADATA: document.model_dump_json()})


def parse_document(metadata: Mapping[str, str]) -> StateDocument:
    """The document in a header's metadata. Raises MalformedTensors, and InvalidSpec if it is the spec that is wrong."""
    try:
        document = StateDocument.model_validate_json(metadata[_METADATA])
    except KeyError:
        raise MalformedTensors(f"the header's metadata lack {_METADATA}: the body is no run's state") from None
    except ValidationError as error:
        place, why = first_fault(error)
        field = ".".join(map(str, place))
        if field.startswith("spec."):
            field = field.removeprefix("spec.")
            raise InvalidSpec(f"{field}: {why}", field=field) from None
        raise MalformedTensors(": ".join(filter(None, (_METADATA, field, why)))) from None
    if len(set(document.buffers)) != len(document.buffers) or any(_MARK in name for name in document.buffers):
        raise MalformedTensors(f"{_METADATA}: buffers: the names must differ, and not contain {_MARK!r}")
    return document


def _layout(manifest: Manifest, buffers: Iterable[str]) -> Manifest:
    """The tensors of a state's body as slots of its vectors, one vector after another."""
    # Not validated: with a buffer's name, a name may be longer than a parameter's.
    return Manifest(
        ParameterSpec.model_construct(name=f"{slot.name}{_MARK}{buffer}", shape=slot.shape, group=slot.group)
        for buffer in buffers
        for slot in manifest.slots
    )


class StateReceiver(FramedReceiver):
    """Receives a state's body of `length` bytes; a Sink until `complete`.

    accept: called with the document once the header was found to fit the body; returns writable memory for each of the
    document's buffers, 4 bytes an element. It may raise, which refuses the body.
    manifest: of the tensors; None for those of the document's spec.
    """

    def __init__(
        self,
        length: int,
        accept: Callable[[StateDocument], Sequence[memoryview]],
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(length, _LONGEST_HEADER)
        self._accept = accept
        self._manifest = manifest

    def _places(self, raw: bytes, data_length: int) -> Iterable[memoryview]:
        header, metadata = parse_header(raw)
        document = parse_document(metadata)
        manifest = self._manifest or Manifest.of(document.spec)
        entries = parse_entries(header, _layout(manifest, document.buffers), Encoding(), data_length)
        for entry in entries:
            if entry.dtype != "F32":
                raise MalformedTensors(f"the dtype of {entry.name!r} is {entry.dtype}, and that of a state is F32")
        memory = self._accept(document)
        places = []
        for entry in entries:
            number, offset = divmod(entry.slot.offset, max(manifest.numel, 1))
            places.append(memory[number][SIZES["F32"] * offset :][: entry.size] if entry.size else memoryview(b""))
        return places
