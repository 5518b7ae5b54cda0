"""Notices weights that somebody else has changed: the next y would replace them without a word."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from freestep.flat import Flat

__all__ = ["WeightsGuard"]

_SAMPLE, _TENSORS = 16_384, 2
"""Elements, and tensors, that one call looks at beside the counts of changes: little beside the step that follows."""


class WeightsGuard:
    """Compares a model's parameters with what was loaded into them.

    torch counts the changes of a tensor, but not those through `.data`: so every call also compares a few elements,
    of another place each time.

    tensors: the parameters. received: what was loaded, of the same names.
    """

    def __init__(self, tensors: Mapping[str, Tensor], received: Flat) -> None:
        self._tensors = tensors
        self._received = received
        self._versions: list[int] | None = None
        """Of each parameter; None while it is not known what the received vector contains."""
        self._names = [name for name, tensor in tensors.items() if tensor.numel()]
        self._next = 0
        self._begin = 0

    def suspend(self) -> None:
        """Notes that the vector is about to be received into: what it contains is not known until `note_loaded`."""
        self._versions = None

    def note_loaded(self) -> None:
        """Notes that the parameters now contain what was received."""
        self._versions = [tensor._version for tensor in self._tensors.values()]

    def changed(self) -> str | None:
        """The name of a parameter that has been changed since, or None, also where it is not known what was loaded."""
        if self._versions is None:
            return None
        for number, (name, tensor) in enumerate(self._tensors.items()):
            if tensor._version != self._versions[number]:
                if self._differs(name, 0, tensor.numel()):
                    return name
                self._versions[number] = tensor._version
        return self._sampled()

    def _sampled(self) -> str | None:
        left = _SAMPLE
        for _ in range(min(_TENSORS, len(self._names))):
            name, begin = self._names[self._next], self._begin
            numel = self._tensors[name].numel()
            end = min(begin + left, numel)
            if self._differs(name, begin, end):
                return name
            left -= end - begin
            if end < numel:
                self._begin = end
                break
            self._next, self._begin = (self._next + 1) % len(self._names), 0
            if not left:
                break
        return None

    def _differs(self, name: str, begin: int, end: int) -> bool:
        tensor = self._tensors[name].detach()
        here = (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1)[begin:end]
        there = self._received.views[name].view(-1)[begin:end]
        return not here.equal(there.to(here.device, here.dtype))
