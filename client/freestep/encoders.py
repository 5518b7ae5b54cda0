"""Encodings of pushed gradients in fewer bytes: rounded to BF16 or F16, int8 with scales, or the largest elements.

The encoding error is added to the next gradient (error feedback: Seide et al., Interspeech 2014; Stich et al., arXiv
1809.07599; Karimireddy et al., arXiv 1901.09847). With g the gradient, e the residual and C the encoding, a push sends
q = C(g + e), and e <- g + e - q: the sum of what was pushed and the residual is the sum of the gradients, within fp32
rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from freestep.errors import FreestepError, ManifestMismatch
from freestep.flat import DTYPES, Flat, bytes_of, is_beyond_f16, require_f16_holds
from freestep.wire.encoding import INDICES, ITEMSIZE, VALUES, Encoding
from freestep.wire.header import header_of
from freestep.wire.manifest import Manifest, Slot

__all__ = ["EncodedPart", "Encoder", "Int8", "Rounded", "TopK"]

_NARROW = ("BF16", "F16")
_CHUNK = 128 * 1024
"""Elements that are encoded at a time, few enough for intermediate results to stay in the cache."""
_SMALLEST = torch.finfo(torch.float32).tiny
"""The smallest normal number: subnormal scales have fewer significant bits than an int8 value needs."""
_LARGEST_I32 = 2**31 - 1
_SAMPLE = 1 << 14
"""Elements of a tensor by which the magnitude of its k-th largest is estimated."""


class EncodedPart:
    """A shard's part of an encoded gradient, in buffers that every push fills anew.

    items: name, dtype and shape of what the body contains, in the order of the buffers' bytes.
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
    """Encodes one gradient after another, and keeps the residual.

    For every push: fill `gradient`, call `begin`, and give the encoder to `Run.push` or `Run.exchange`, which report
    the outcome to it (`settle`). Until the next `begin` the gradient must not change: bodies are encoded when they are
    sent, and again if the number of shards changes.

    A push that was dropped or refused loses its own gradient only: the residual is what it was before. If the outcome
    is unknown, the push is assumed to have counted, so that nothing is pushed twice.

    Beside the gradient it keeps two fp32 vectors, the residual before and after the push, and the bodies' buffers. Not
    safe to use from several threads at the same time.
    """

    def __init__(self, gradient: Flat, encoding: Encoding) -> None:
        if gradient.dtype != "F32":
            raise FreestepError(f"gradients must be encoded from fp32, not from {gradient.dtype}")
        encoding.roles(gradient.manifest)
        self.gradient = gradient
        self.encoding = encoding
        self._before = torch.zeros_like(gradient.vector, pin_memory=False)
        self._after = torch.zeros_like(gradient.vector, pin_memory=False)
        self._parts: tuple[EncodedPart, ...] = ()
        self._encoded = False
        self._counts: bool | None = None

    @property
    def residual(self) -> Tensor:
        """What the pushes that counted have left out so far, fp32 [manifest.numel]; a view that later pushes change.

        Setting it copies a residual in; raises ManifestMismatch if its shape is another.
        """
        return self._after if self._counted() else self._before

    @residual.setter
    def residual(self, residual: Tensor) -> None:
        if residual.shape != self._before.shape:
            raise ManifestMismatch(
                f"the residual has shape {list(residual.shape)}, but the gradient has {list(self._before.shape)}"
            )
        self._encoded = False
        self._before.copy_(residual)

    def begin(self) -> None:
        """Starts the push of a new gradient, which `gradient` now contains."""
        if self._counted():
            self._before, self._after = self._after, self._before
        self._encoded, self._counts = False, None

    def settle(self, counts: bool) -> None:
        """Sets the outcome of the push.

        Args:
            counts: True if it was applied or accumulated, False if it was dropped or refused.
        """
        self._counts = counts

    def forget(self) -> None:
        """Sets the residual to zero, after the run went back to a step before the pushes that left it."""
        self._encoded = False
        self._before.zero_()

    def _counted(self) -> bool:
        if not self._encoded or self._counts is not None:
            return self._encoded and bool(self._counts)
        # A gradient that is not finite was refused, and must not remain in the residual.
        return bool(self._after.sum().isfinite())

    @torch.no_grad()
    def parts(self, count: int) -> Sequence[EncodedPart]:
        """The encoded parts of gradient + residual, one for each shard.

        Args:
            count: The run's number of shards; if it changes, parts and residual are computed anew.

        Raises:
            DtypeOverflow: A finite value is too large for F16; the residual is what it was.
        """
        if len(self._parts) != count:
            manifest = self.gradient.manifest
            self._parts = tuple(self._part(manifest.part(index, count)) for index in range(count))
            self._encoded = False
        if not self._encoded:
            for part in self._parts:
                own = slice(part.manifest.begin, part.manifest.end)
                self._encode(part, self.gradient.vector[own], self._before[own], self._after[own])
            self._encoded = True
        return self._parts

    @abstractmethod
    def _part(self, manifest: Manifest) -> EncodedPart:
        """Allocates the buffers of a shard's part."""

    @abstractmethod
    def _encode(self, part: EncodedPart, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        """Encodes `gradient` + `before` into the part's buffers, and puts the error into `after`; all fp32 [numel]."""


class Rounded(Encoder):
    """Rounds each element to BF16 or F16, 2 bytes an element.

    Without a residual, F16 would lose elements below 3e-8 in every push, and BF16 up to 1/256 of each element; with it,
    these are pushed once they have added up.

    Example:
        >>> encoder = freestep.Rounded(freestep.Flat(run.manifest), "BF16")
        >>> encoder.gradient.fill(gradients)
        >>> encoder.begin()
        >>> receipt = run.push(encoder, lease.claim(step))

    Args:
        gradient: Contains each gradient, fp32.
        dtype: "BF16" or "F16".

    Raises:
        FreestepError: The gradient is not fp32, or the dtype is another.
    """

    def __init__(self, gradient: Flat, dtype: str) -> None:
        if dtype not in _NARROW:
            raise FreestepError(f"gradients can be rounded to {' or '.join(_NARROW)}, not to {dtype}")
        super().__init__(gradient, Encoding())
        self._dtype = dtype

    def _part(self, manifest: Manifest) -> EncodedPart:
        items = [(slot.name, self._dtype, slot.shape) for slot in manifest.slots]
        values = torch.empty(manifest.numel, dtype=DTYPES[self._dtype], device="cpu")
        return EncodedPart(manifest, self.encoding, items, (values,))

    def _encode(self, part: EncodedPart, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        (values,) = part.buffers
        chunks = (torch.split(each, _CHUNK) for each in (gradient, before, values, after))
        for exact, kept, rounded, lost in zip(*chunks, strict=True):
            torch.add(exact, kept, out=lost)
            rounded.copy_(lost)
            lost.sub_(rounded)
        if self._dtype == "F16" and is_beyond_f16(values):
            for slot in part.manifest.slots:
                own = slice(slot.offset, slot.offset + slot.numel)
                require_f16_holds(slot.name, gradient[own] + before[own], values[own])


class Int8(Encoder):
    """Rounds each element to an int8 multiple of its block's scale, which is the block's largest magnitude / 127.

    A push takes 1 + 4 / block bytes an element.

    Args:
        gradient: Contains each gradient, fp32.
        block: How many consecutive elements of a tensor share a scale, at least 1.

    Raises:
        FreestepError: The gradient is not fp32, or the block is smaller.
        MalformedTensors: Two tensors would have the same name, such as `w::scale` beside the scales of `w`.
    """

    def __init__(self, gradient: Flat, block: int = Encoding.block) -> None:
        if block < 1:
            raise FreestepError(f"a block must have at least one element, not {block}")
        super().__init__(gradient, Encoding("int8", block))
        # g + e, and its multiples of the scale.
        width = min(max(_CHUNK, block), gradient.vector.numel())
        self._scratch = torch.empty(2, width, dtype=torch.float32, device="cpu")

    def _part(self, manifest: Manifest) -> EncodedPart:
        items = list(self.encoding.int8_items(manifest))
        count = sum(prod(shape) for _, dtype, shape in items if dtype == "F32")
        scales = torch.empty(count, dtype=torch.float32, device="cpu")
        quanta = torch.empty(manifest.numel, dtype=torch.int8, device="cpu")
        return EncodedPart(manifest, self.encoding, items, (scales, quanta))

    def _encode(self, part: EncodedPart, gradient: Tensor, before: Tensor, after: Tensor) -> None:
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
            # A block of zeros has the scale 0.
            torch.div(exact, scale.clamp_min(_SMALLEST), out=made)
            made.round_()
            quanta[begin:end].view(rows, width).copy_(made)
            made.mul_(scale)
            torch.sub(exact, made, out=after[begin:end].view(rows, width))


class TopK(Encoder):
    """Sends the elements of largest magnitude in each tensor, with their indices; the others stay in the residual.

    A tensor that is divided between shards counts as one tensor on each. Suited to SGD: an element that is sent rarely,
    with all that has added up, makes AdamW's second moment larger than the gradients are, and so its steps smaller.

    Args:
        gradient: Contains each gradient, fp32.
        fraction: The fraction of each tensor's elements that is sent, above 0 and at most 1; at least one element.
        dtype: "F32", "BF16" or "F16", the dtype of the values; the rounding error stays in the residual.

    Raises:
        FreestepError: The gradient is not fp32, or fraction or dtype are others.
        MalformedTensors: Two tensors would have the same name, such as `w::values` beside the values of `w`.
    """

    def __init__(self, gradient: Flat, fraction: float = 0.01, dtype: str = "F32") -> None:
        if not 0 < fraction <= 1:
            raise FreestepError(f"fraction must be above 0 and at most 1, not {fraction}")
        if dtype not in ITEMSIZE:
            raise FreestepError(f"values can be of {', '.join(ITEMSIZE)}, not of {dtype}")
        super().__init__(gradient, Encoding("topk"))
        self._fraction = fraction
        self._dtype = dtype

    def _count(self, slot: Slot) -> int:
        return min(max(round(self._fraction * slot.numel), 1), slot.numel)

    def _part(self, manifest: Manifest) -> EncodedPart:
        slots, counts = manifest.slots, [self._count(slot) for slot in manifest.slots]
        is_wide = any(slot.numel - 1 > _LARGEST_I32 for slot in slots)
        # The indices come first, so that they are aligned.
        items = [
            (slot.name + role, dtype, (count,))
            for role, dtype in ((INDICES, "I64" if is_wide else "I32"), (VALUES, self._dtype))
            for slot, count in zip(slots, counts, strict=True)
        ]
        indices = torch.empty(sum(counts), dtype=torch.int64 if is_wide else torch.int32, device="cpu")
        values = torch.empty(sum(counts), dtype=DTYPES[self._dtype], device="cpu")
        return EncodedPart(manifest, self.encoding, items, (indices, values))

    def _encode(self, part: EncodedPart, gradient: Tensor, before: Tensor, after: Tensor) -> None:
        indices, values = part.buffers
        torch.add(gradient, before, out=after)
        first = 0
        for slot in part.manifest.slots:
            rest = after[slot.offset : slot.offset + slot.numel]
            here = slice(first, first := first + self._count(slot))
            chosen = _largest(rest, here.stop - here.start)
            exact = rest[chosen]
            indices[here] = chosen
            values[here] = exact
            if self._dtype == "F16":
                require_f16_holds(slot.name, exact, values[here])
            rest[chosen] = exact - values[here].float()


def _largest(vector: Tensor, count: int) -> Tensor:
    """The indices of the elements of largest magnitude, int64 [count], ascending; NaN counts as the largest.

    In a long vector most elements are ruled out by a bound that is estimated from a sample.
    """
    numel = vector.numel()
    if count == numel:
        return _indices(numel)
    found = _indices(numel) if numel <= 2 * _SAMPLE else _candidates(vector, count)
    if len(found) < count:
        # The estimate was too high.
        found = _indices(numel)
    ranks = vector[found].abs_().topk(count, sorted=False).indices
    return found[ranks.sort().values]


def _indices(numel: int) -> Tensor:
    return torch.arange(numel, dtype=torch.int64, device="cpu")


def _candidates(vector: Tensor, count: int) -> Tensor:
    """The indices of all elements above an estimated bound, very likely the `count` largest among them."""
    # An odd stride, so that the sample is not from a single column of a matrix.
    sample = vector[:: (len(vector) // _SAMPLE) | 1].abs()
    expected = count * len(sample) / len(vector)
    rank = min(int(expected + 4 * expected**0.5) + 4, len(sample))
    bound = sample.topk(rank).values[-1]
    return torch.cat(
        [
            # Not `>=`, which is false for NaN.
            torch.lt(chunk.abs(), bound).logical_not_().nonzero().view(-1).add_(number * _CHUNK)
            for number, chunk in enumerate(torch.split(vector, _CHUNK))
        ]
    )
