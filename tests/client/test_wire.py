"""Bodies against the safetensors library, the format's own implementation."""

from __future__ import annotations

import gc
import json
import weakref
from math import prod

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freestep import Flat
from freestep.api.models import ParameterSpec
from freestep.errors import MalformedTensors, ManifestMismatch
from freestep.wire.encoding import ITEMSIZE
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = {"first": (3, 4), "scalar": (), "empty": (0, 2), "last": (5,), "naïve.名": (2, 1, 2)}
MANIFEST = Manifest(ParameterSpec(name=name, shape=shape) for name, shape in SHAPES.items())
STEADY = settings(derandomize=True, deadline=None)


def tensors(dtype: str = "F32") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in SHAPES.items()}


def joined(made: dict[str, Tensor]) -> Tensor:
    return torch.cat([made[slot.name].reshape(-1) for slot in MANIFEST.slots])


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_what_is_encoded_is_what_the_library_reads(dtype: str) -> None:
    flat = Flat(MANIFEST, dtype)
    flat.fill(tensors())
    read = safetensors.torch.load(b"".join(flat.body()))
    assert read.keys() == SHAPES.keys()
    for name, tensor in tensors(dtype).items():
        assert torch.equal(read[name], tensor)


def test_tensors_begin_at_multiples_of_eight_bytes() -> None:
    for length in range(16):
        header = encode_header(MANIFEST, "F32", {"note": "x" * length})
        assert len(header) % 8 == 0
        assert int.from_bytes(header[:8], "little") == len(header) - 8


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_what_the_library_writes_is_received(dtype: str) -> None:
    made = tensors(dtype)
    body = safetensors.torch.save(dict(reversed(made.items())), metadata={"some": "thing"})
    flat = Flat(MANIFEST, dtype)
    receiver = flat.receiver(len(body))
    lay(receiver, body)
    assert receiver.complete
    assert receiver.metadata == {"some": "thing"}
    assert torch.equal(flat.vector, joined(made))


@STEADY
@given(cuts=st.lists(st.integers(1, 300)), mixed=st.booleans())
def test_a_body_may_come_in_any_pieces(cuts: list[int], mixed: bool) -> None:
    made = tensors()
    if mixed:
        made |= {"first": made["first"].bfloat16(), "last": made["last"].half()}
    body = safetensors.torch.save(made)
    target = bytearray(4 * MANIFEST.numel)
    receiver = Receiver(MANIFEST, memoryview(target), len(body))
    rest = memoryview(body)
    for cut in [*cuts, len(body)]:
        lay(receiver, rest[:cut])
        rest = rest[cut:]
    assert receiver.complete
    assert receiver.missing == 0
    assert receiver.dtypes == {
        name: next(key for key, dtype in DTYPES.items() if dtype == tensor.dtype) for name, tensor in made.items()
    }
    vector = torch.frombuffer(target, dtype=torch.float32)
    for slot in MANIFEST.slots:
        place = vector[slot.offset : slot.offset + slot.numel]
        narrow = place.view(made[slot.name].dtype)[-slot.numel :] if slot.numel else place
        assert torch.equal(narrow.view(slot.shape), made[slot.name].to(narrow.dtype))


@STEADY
@given(
    pieces=st.lists(
        st.sampled_from(
            [b"{", b"}", b'"a"', b'"__metadata__"', b":", b",", b" ", b"1", b"\xff", b'"a":"b"', b'"first":', b"{}"]
        )
    )
)
@example([b"{", b'"__metadata__"', b":", b"{", b'"a":"b"', b"}", b","])
@example([b"{", b'"__metadata__"', b":", b"{", b'"a":"b"', b",", b'"a":"b"', b"}", b","])
@example([b"{", b'"__metadata__"', b":", b"{", b'"a"', b":", b"{}", b"}", b","])
@example([b"{", b'"__metadata__"', b":", b"{}", b",", b'"a"', b":", b"{}", b","])
@example([b"{", b'"__metadata__"', b":", b"{", b'"a"', b":", b"{}", b","])
@example([b"{", b" ", b'"__metadata__"', b":", b"{}", b","])
@example([b"{", b","])
@example([b"{"])
def test_what_stands_before_a_plain_header_is_read_as_json(pieces: list[bytes]) -> None:
    """The rest of such a header is known, and is not parsed; this has to make no difference."""
    plain = encode_header(MANIFEST, "F32")
    text = b"".join(pieces) + plain[9:].rstrip(b" ")
    body = len(text).to_bytes(8, "little") + text + bytes(4 * MANIFEST.numel)
    receiver = Flat(MANIFEST).receiver(len(body))
    try:
        read = json.loads(text)
        metadata = read.pop("__metadata__", {})
        is_fine = read == json.loads(plain[8:]) and all(isinstance(each, str) for each in metadata.values())
        # Names that stand twice are lost when read.
        is_fine &= text.count(b'"a"') == len(metadata) and text.count(b'"__metadata__"') <= 1
    except (ValueError, AttributeError):
        is_fine = False
    if is_fine:
        lay(receiver, body)
        assert receiver.complete
        assert receiver.metadata == metadata
        assert receiver.dtypes == dict.fromkeys(SHAPES, "F32")
    else:
        with pytest.raises(MalformedTensors):
            lay(receiver, body)


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("target", ITEMSIZE)
def test_a_plain_header_is_received_as_any_other(dtype: str, target: str) -> None:
    """The same tensors in a header that has to be parsed land in the same places."""
    sent = Flat(MANIFEST, dtype)
    sent.fill(tensors())
    header, data = encode_header(MANIFEST, dtype, {"note": "plain"}), sent.bytes
    text = bytes(header[8:])
    assert text.startswith(b'{"__metadata__":')
    parsed = b"{ " + text[1:]
    received = []
    for each in (text, parsed):
        flat = Flat(MANIFEST, target)
        receiver = flat.receiver(8 + len(each) + len(data))
        try:
            lay(receiver, len(each).to_bytes(8, "little") + each + data)
            received.append((receiver.dtypes, receiver.metadata, bytes(flat.bytes)))
        except MalformedTensors as error:
            received.append(str(error))
    assert received[0] == received[1]


@STEADY
@given(order=st.permutations(list(SHAPES)))
def test_tensors_may_come_in_any_order(order: list[str]) -> None:
    made = tensors()
    header, data = {}, b""
    for name in order:
        values = made[name].numpy().tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": offsets}
        data += values
    text = json.dumps(header, ensure_ascii=False).encode()
    flat = Flat(MANIFEST)
    receiver = flat.receiver(8 + len(text) + len(data))
    lay(receiver, len(text).to_bytes(8, "little") + text + data)
    assert receiver.complete
    assert torch.equal(flat.vector, joined(made))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_vector_of_halves_takes_nothing_wider(dtype: str) -> None:
    body = safetensors.torch.save(tensors())
    with pytest.raises(MalformedTensors, match="wider"):
        lay(Flat(MANIFEST, dtype).receiver(len(body)), body)


@STEADY
@given(sizes=st.lists(st.integers(1, 64), min_size=1))
def test_a_socket_may_fill_the_buffers_itself(sizes: list[int]) -> None:
    body = safetensors.torch.save(tensors())
    flat = Flat(MANIFEST)
    receiver = flat.receiver(len(body))
    sent = 0
    while not receiver.complete:
        buffer = receiver.get_buffer()
        size = min(len(buffer), sizes[sent % len(sizes)])
        buffer[:size] = body[sent : sent + size]
        sent += size
        receiver.buffer_updated(size)
    assert sent == len(body)
    assert not receiver.get_buffer()
    assert torch.equal(flat.vector, joined(tensors()))


def test_tensors_are_gathered_and_scattered() -> None:
    flat = Flat(MANIFEST, "BF16")
    flat.vector.fill_(7)
    some = tensors()
    sparse = torch.sparse_coo_tensor([[0, 2], [1, 3]], [1.0, 2.0], (3, 4), check_invariants=True)
    flat.gather({**some, "first": sparse, "last": None, "naïve.名": some["naïve.名"].mT.contiguous().mT})
    made = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    flat.scatter(made)
    expected = {**some, "first": sparse.to_dense(), "last": torch.zeros(5)}
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name].bfloat16().float())


def test_bytes_keep_the_vector_alive() -> None:
    flat = Flat(MANIFEST)
    vector, data = weakref.ref(flat.vector), flat.body()[1]
    del flat
    gc.collect()
    assert vector() is not None
    del data
    gc.collect()
    assert vector() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_tensors_come_from_a_device_and_go_there(dtype: str) -> None:
    flat = Flat(MANIFEST, dtype, pinned=True)
    some = tensors(dtype)
    flat.gather({name: tensor.cuda().float() for name, tensor in some.items()})
    assert torch.equal(flat.vector, joined(some))
    made = {name: torch.zeros(shape, device="cuda") for name, shape in SHAPES.items()}
    flat.scatter(made)
    for name, tensor in made.items():
        assert torch.equal(tensor.cpu(), some[name].float())


def test_views_are_the_vector() -> None:
    flat = Flat(MANIFEST)
    flat.views["scalar"].fill_(3.0)
    assert flat.vector[MANIFEST.by_name["scalar"].offset] == 3.0
    assert {name: tuple(view.shape) for name, view in flat.views.items()} == SHAPES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other": torch.zeros(1)}, "no tensor 'other'"),
        ({"first": None}, "'first' is missing"),
        ({"last": torch.zeros(6)}, "'last' has shape \\[6\\]"),
    ],
)
def test_other_tensors_do_not_fit(changes: dict[str, Tensor | None], message: str) -> None:
    wrong = {name: tensor for name, tensor in {**tensors(), **changes}.items() if tensor is not None}
    with pytest.raises(ManifestMismatch, match=message):
        Flat(MANIFEST).fill(wrong)


# Manifests in parts

shapes = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 2), st.integers(500, 3000)),
    st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6)),
)
manifests = st.lists(shapes, min_size=1, max_size=8).map(
    lambda made: Manifest(ParameterSpec(name=f"t{number}", shape=shape) for number, shape in enumerate(made))
)


@STEADY
@given(manifest=manifests, count=st.integers(1, 40))
def test_parts_cover_the_vector_once_and_in_order(manifest: Manifest, count: int) -> None:
    parts = [manifest.part(index, count) for index in range(count)]
    assert [parts[0].begin, *(part.end for part in parts)] == [*(part.begin for part in parts), manifest.numel]
    covered: dict[str, int] = dict.fromkeys(manifest.by_name, 0)
    for part in parts:
        assert part.numel == part.end - part.begin == sum(slot.numel for slot in part.slots) >= 0
        offset = 0
        for slot in part.slots:
            whole = manifest.by_name[slot.name]
            assert (slot.offset, slot.group) == (offset, whole.group)
            assert prod(slot.shape) == slot.numel
            assert slot.start == covered[slot.name]
            assert part.begin + slot.offset == whole.offset + slot.start
            covered[slot.name] += slot.numel
            offset += slot.numel
    assert covered == {slot.name: slot.numel for slot in manifest.slots}
    # An empty tensor is in one part, where there is anything to part, and any other in those with elements of it.
    for slot in manifest.slots:
        holders = [part for part in parts if slot.name in part.by_name]
        if slot.numel:
            assert all(part.by_name[slot.name].numel for part in holders)
        else:
            assert len(holders) == (1 if manifest.numel else count)


@STEADY
@given(manifest=manifests, count=st.integers(1, 8))
def test_parts_are_of_equal_size_within_five_percent(manifest: Manifest, count: int) -> None:
    share = manifest.numel / count
    for index in range(count):
        assert abs(manifest.part(index, count).numel - share) <= max(0.05 * share, 1)


@STEADY
@given(manifest=manifests, count=st.integers(1, 8))
def test_cuts_fall_between_rows_where_one_ends_nearby(manifest: Manifest, count: int) -> None:
    ends = {0, manifest.numel}
    for slot in manifest.slots:
        if slot.numel:
            row = prod(slot.shape[1:])
            ends |= set(range(slot.offset, slot.offset + slot.numel + 1, row))
    for index in range(1, count):
        ideal, place = manifest.numel * index // count, manifest.part(index, count).begin
        nearest = min(abs(end - ideal) for end in ends)
        assert place in ends if nearest <= 0.02 * manifest.numel / count else place == ideal
    for index in range(count):
        for slot in manifest.part(index, count).slots:
            whole = manifest.by_name[slot.name]
            row = prod(whole.shape[1:])
            if slot.numel == whole.numel:
                assert slot.shape == whole.shape
            elif slot.start % row == 0 and slot.numel % row == 0:
                assert slot.shape == (slot.numel // row, *whole.shape[1:])
            else:
                assert slot.shape == (slot.numel,)


def test_there_may_be_more_shards_than_elements() -> None:
    manifest = Manifest([ParameterSpec(name="w", shape=(3,)), ParameterSpec(name="e", shape=(0,))])
    parts = [manifest.part(index, 8) for index in range(8)]
    assert sum(part.numel for part in parts) == 3
    assert {part.numel for part in parts} == {0, 1}
    assert [part.by_name.keys() for part in parts if part.numel == 0 and part.slots] == []


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=12), st.integers(1, 9))
def test_the_parts_of_shards_are_those_of_a_search_through_all_tensors(shapes: list[list[int]], count: int) -> None:
    manifest = Manifest(ParameterSpec(name=str(index), shape=tuple(shape)) for index, shape in enumerate(shapes))
    parts = [manifest.part(index, count) for index in range(count)]
    assert [part.begin for part in parts[1:]] == [part.end for part in parts[:-1]]
    for part in parts:
        held = [slot.name for slot in part.slots if slot.numel]
        reached = [
            slot.name
            for slot in manifest.slots
            if max(slot.offset, part.begin) < min(slot.offset + slot.numel, part.end)
        ]
        assert held == reached
    empty = {slot.name for part in parts for slot in part.slots if slot.numel == 0}
    assert empty == {slot.name for slot in manifest.slots if slot.numel == 0}
