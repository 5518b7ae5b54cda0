"""Gradients that travel as fewer bytes than their elements have: rounded, int8 with scales, or the largest alone.

What an encoding loses is not lost: it is kept, and added to the next gradient (error feedback: Seide et al. 2014;
Stich et al., arXiv 1809.07599; Karimireddy et al., arXiv 1901.09847). With g the gradients, e the residual and q what
the pushed bodies say, q = C(g + e) and e' = g + e - q, so that at any time what was pushed and the residual sum up to
the gradients, within the rounding of fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from freestep.errors import FreestepError, ManifestMismatch
from freestep.flat import DTYPES, Flat, bytes_of
from freestep.wire.encoding import INDICES, ITEMSIZE, VALUES, Encoding
from freestep.wire.header import header_of
from freestep.wire.manifest import Manifest, Slot

__all__ = ["Encoder", "Int8", "Part", "Rounded", "TopK"]

_NARROW = ("BF16", "F16")
_CHUNK = 128 * 1024
"""Elements worked on at a time: few enough for what is between two operations to stay in the cache."""
_SMALLEST = torch.finfo(torch.float32).tiny
"""Scales below it are of less precision than a quantum needs."""
_LARGEST_I32 = 2**31 - 1
_SAMPLE = 1 << 14
"""Elements of a tensor from which it is guessed how large its k-th largest is."""


class Part:
    """A shard's stretch of an encoded gradient, in buffers of its own that every push fills anew.

    items: what the body holds, by name, dtype and shape, in the order of the buffers' bytes.
    """

    def __init__(
        self,
        manifest: Manifest,
        encoding: Encoding,
        items: Sequence[tuple[str, str, Sequence[int]]],
        buffers: Sequence[Tensor],
    ) -> None:
        self.manifest = manifest
        self.buffers = buffers
        self._pieces = [memoryview(header_of(items, encoding.metadata())), *map(bytes_of, buffers)]

    def body(self) -> list[memoryview]:
        """The safetensors body in pieces."""
        return self._pieces


class Encoder(ABC):
    """Encodes the gradients of one worker, one push after the other, and keeps the residual.

    gradient: where each gradient is put, fp32. For every push, fill it, call `begin`, and give the encoder to
        `Run.push` or `Run.exchange`, which say what became of it (`settle`). Until the next `begin` the gradient
        must not be changed: its bodies are made when they are asked for, and are the same whenever that is.

    A push that was dropped or refused takes its own gradient with it and nothing else: the residual is what it was
    before. Where nobody knows whether a push counted, it is taken to have counted, so that nothing is pushed twice.

    Beside the gradient it keeps two fp32 vectors, the residual before and after the push, and the bodies' buffers.
    Raises FreestepError where the gradient is not fp32, and MalformedTensors where the encoding would have two tensors
    of one name.
    """

    def __init__(self, gradient: Flat, encoding: Encoding) -> None:
        if gradient.dtype != "F32":
            raise FreestepError(f"gradients are encoded from fp32, not from {gradient.dtype}")
        encoding.roles(gradient.manifest)
        self.gradient = gradient
        self.encoding = encoding
        self._before = torch.zeros_like(gradient.vector, pin_memory=False)
        self._after = torch.zeros_like(gradient.vector, pin_memory=False)
        self._parts: tuple[Part, ...] = ()
        self._encoded = False
        self._counts: bool | None = None

    @property
    def residual(self) -> Tensor:
        """What the pushes that counted have lost so far, [manifest.numel] fp32: a view, which later pushes change."""
        return self._after if self._counted() else self._before

    @residual.setter
    def residual(self, residual: Tensor) -> None:
        """Raises ManifestMismatch when it is not of the gradient's shape."""
        if residual.shape != self._before.shape:
            raise ManifestMismatch(f"a residual is of the shape {list(residual.shape)}, not {list(self._before.shape)}")
        self._encoded = False
        self._before.copy_(residual)

    def begin(self) -> None:
        """Takes note that there is another gradient."""
        if self._counted():
            self._before, self._after = self._after, self._before
        self._encoded, self._counts = False, None

    def settle(self, counts: bool) -> None:
        """Takes note whether the push counts: it was applied or accumulated, and neither dropped nor refused."""
        self._counts = counts

    def forget(self) -> None:
        """Drops the residual: the run went back to before the pushes that it is of."""
        self._encoded = False
        self._before.zero_()

    def _counted(self) -> bool:
        if not self._encoded or self._counts is not None:
            return self._encoded and bool(self._counts)
        # What is not finite was certainly refused, and must not stay.
        return bool(self._after.sum().isfinite())

    @torch.no_grad()
    def parts(self, count: int) -> Sequence[Part]:
        """The encoded stretches of the gradient and the residual, for the shards of a run cut into `count`.

        For another count they are made anew, and so is what they lose.
        """
        if len(self._parts) != count:
            manifest = self.gradient.manifest
            self._parts = tuple(self._part(manifest.part(index, count)) for index in range(count))
            self._encoded = False
        if not self._encoded:
            for part in self._parts:
                stretch = slice(part.manifest.begin, part.manifest.end)
                self._encode(part, self.gradient.vector[stretch], self._before[stretch], self._after[stretch])
            self._encoded = True
        return self._parts

    @abstractmethod
    def _part(self, manifest: Manifest) -> Part:
        """Buffers for a shard's part, and what the body says of them."""

    @abstractmethod
    def _encode(self, part: Part, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        """Fills a part's buffers from `gradient` + `before`, and `after` with what they do not say; all [numel]."""


class Rounded(Encoder):
    """Each element rounded to the nearest number of a narrower dtype.

    F16 says nothing of elements below 3e-8, push after push, and BF16 rounds off up to 1/256 of each; with the residual
    that is pushed once it has added up.

    dtype: BF16 or F16. The body is a dense one of that dtype, 2 bytes an element.
    """

    def __init__(self, gradient: Flat, dtype: str) -> None:
        if dtype not in _NARROW:
            raise FreestepError(f"gradients are rounded to {' or '.join(_NARROW)}, not to {dtype}")
        super().__init__(gradient, Encoding())
        self._dtype = dtype

    def _part(self, manifest: Manifest) -> Part:
        items = [(slot.name, self._dtype, slot.shape) for slot in manifest.slots]
        return Part(manifest, self.encoding, items, (torch.empty(manifest.numel, dtype=DTYPES[self._dtype]),))

    def _encode(self, part: Part, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        (values,) = part.buffers
        chunks = (torch.split(each, _CHUNK) for each in (gradient, before, values, after))
        for exact, kept, said, lost in zip(*chunks, strict=True):
            torch.add(exact, kept, out=lost)
            said.copy_(lost)
            lost.sub_(said)


class Int8(Encoder):
    """Each element rounded to one of 255 multiples of its block's scale, which is the block's largest magnitude / 127.

    block: elements of a tensor that share a scale.
    """

    def __init__(self, gradient: Flat, block: int = Encoding.block) -> None:
        if block < 1:
            raise FreestepError(f"a block has at least one element, not {block}")
        super().__init__(gradient, Encoding("int8", block))
        # Two: g + e, and what is made of it.
        self._scratch = torch.empty(2, min(max(_CHUNK, block), gradient.vector.numel()))

    def _part(self, manifest: Manifest) -> Part:
        items = list(self.encoding.int8_items(manifest))
        scales = torch.empty(sum(prod(shape) for _, dtype, shape in items if dtype == "F32"))
        return Part(manifest, self.encoding, items, (scales, torch.empty(manifest.numel, dtype=torch.int8)))

    def _encode(self, part: Part, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        scales, quanta = part.buffers
        first = 0
        for begin, end, width in self.encoding.stretches(part.manifest.slots, _CHUNK):
            numel, rows = end - begin, (end - begin) // width
            exact, made = (each[:numel].view(rows, width) for each in self._scratch)
            scale = scales[first : first + rows].view(rows, 1)
            first += rows
            torch.add(gradient[begin:end].view(rows, width), before[begin:end].view(rows, width), out=exact)
            torch.abs(exact, out=made)
            torch.amax(made, 1, keepdim=True, out=scale)
            scale.div_(127)
            # A block of zeros has the scale 0, by which nothing is to be divided.
            torch.div(exact, scale.clamp_min(_SMALLEST), out=made)
            made.round_()
            quanta[begin:end].view(rows, width).copy_(made)
            made.mul_(scale)
            torch.sub(exact, made, out=after[begin:end].view(rows, width))


class TopK(Encoder):
    """Of each tensor, and of each part of one where it lies on several shards, the elements of largest magnitude.

    It is for SGD and its like. An element that comes seldom, and then with all that was kept of it, makes AdamW's
    second moment larger than the gradients are, and its steps smaller: it learns more slowly than with all elements.

    fraction: how many of them, above 0 and at most 1; of a tensor that is not empty, at least one. dtype: F32, BF16 or
        F16, what the values are rounded to; the rounding is part of the residual.
    """

    def __init__(self, gradient: Flat, fraction: float = 0.01, dtype: str = "F32") -> None:
        if not 0 < fraction <= 1:
            raise FreestepError(f"a fraction is above 0 and at most 1, not {fraction}")
        if dtype not in ITEMSIZE:
            raise FreestepError(f"values are of {', '.join(ITEMSIZE)}, not of {dtype}")
        super().__init__(gradient, Encoding("topk"))
        self._fraction = fraction
        self._dtype = dtype

    def _count(self, slot: Slot) -> int:
        return min(max(round(self._fraction * slot.numel), 1), slot.numel)

    def _part(self, manifest: Manifest) -> Part:
        slots, counts = manifest.slots, [self._count(slot) for slot in manifest.slots]
        is_wide = any(slot.numel - 1 > _LARGEST_I32 for slot in slots)
        # The indices come first, so that they lie at multiples of their size.
        items = [
            (slot.name + role, dtype, (count,))
            for role, dtype in ((INDICES, "I64" if is_wide else "I32"), (VALUES, self._dtype))
            for slot, count in zip(slots, counts, strict=True)
        ]
        indices = torch.empty(sum(counts), dtype=torch.int64 if is_wide else torch.int32)
        return Part(manifest, self.encoding, items, (indices, torch.empty(sum(counts), dtype=DTYPES[self._dtype])))

    def _encode(self, part: Part, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        indices, values = part.buffers
        torch.add(gradient, before, out=after)
        first = 0
        for slot in part.manifest.slots:
            place = after[slot.offset : slot.offset + slot.numel]
            here = slice(first, first := first + self._count(slot))
            chosen = _largest(place, here.stop - here.start)
            exact = place[chosen]
            indices[here] = chosen
            values[here] = exact
            place[chosen] = exact - values[here].float()


def _largest(vector: Tensor, count: int) -> Tensor:
    """The indices [count], int64 and ascending, of the elements of largest magnitude; NaN is larger than any number.

    In a long vector most elements are passed over by comparing them with a bound that a sample suggests.
    """
    numel = vector.numel()
    if count == numel:
        return torch.arange(numel)
    found = torch.arange(numel) if numel <= 2 * _SAMPLE else _candidates(vector, count)
    if len(found) < count:
        # The sample was not like the rest.
        found = torch.arange(numel)
    ranks = vector[found].abs_().topk(count, sorted=False).indices
    return found[ranks.sort().values]


def _candidates(vector: Tensor, count: int) -> Tensor:
    """The indices of some more than the `count` largest elements, very likely: of all that are not below a bound."""
    # Odd, so that it is no multiple of a row in which all elements are of one column.
    sample = vector[:: (len(vector) // _SAMPLE) | 1].abs()
    expected = count * len(sample) / len(vector)
    rank = min(int(expected + 4 * expected**0.5) + 4, len(sample))
    bound = sample.topk(rank).values[-1]
    return torch.cat(
        [
            # Not `>=`, which passes over NaN.
            torch.lt(chunk.abs(), bound).logical_not_().nonzero().view(-1).add_(number * _CHUNK)
            for number, chunk in enumerate(torch.split(vector, _CHUNK))
        ]
    )
