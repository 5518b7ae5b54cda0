"""A worker's gradients, gathered for its pushes in the format that they are sent in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from freestep.api.models import Dtype
from freestep.encoders import Encoder, Int8, Rounded, TopK
from freestep.errors import FreestepError, ManifestMismatch, NoGradients
from freestep.flat import DTYPES, Flat, require_f16_holds
from freestep.in_place_gradient import InPlaceGradient
from freestep.wire.encoding import ENCODINGS, Encoding
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch, WorkerGroup

__all__ = ["Gradients", "PushFormat", "push_body"]


_COMPARED_EVERY = 16


class PushFormat:
    """The dtype and encoding of pushed gradients: `push_dtype`, `push_encoding` and their options of RemoteOptimizer.

    Raises FreestepError if they do not go together.
    """

    def __init__(
        self,
        dtype: str | None = None,
        encoding: str = "dense",
        *,
        topk_fraction: float = 0.01,
        int8_block: int = Encoding.block,
        error_feedback: bool = True,
    ) -> None:
        if dtype is not None and dtype not in get_args(Dtype):
            choices = ", ".join(get_args(Dtype))
            raise FreestepError(
                f"push_dtype must be one of {choices}, not {dtype!r}; for int8 set push_encoding='int8'"
            )
        if encoding not in ENCODINGS:
            raise FreestepError(f"push_encoding must be one of {', '.join(ENCODINGS)}, not {encoding!r}")
        if encoding == "int8" and dtype is not None:
            raise FreestepError(f"push_encoding='int8' excludes push_dtype, which is {dtype!r}: leave it out")
        if encoding != "dense" and not error_feedback:
            raise FreestepError(
                f"push_encoding={encoding!r} requires error_feedback: without it most of each gradient would be lost"
            )
        self.dtype = dtype or "F32"
        self.encoding = encoding
        self.topk_fraction = topk_fraction
        self.int8_block = int8_block
        self.error_feedback = error_feedback

    @property
    def text(self) -> str:
        """All of it, as a text that differs where bodies may."""
        options = f"fraction {self.topk_fraction:g}, block {self.int8_block}, feedback {self.error_feedback}"
        return f"{self.dtype} {self.encoding}, {options}"

    def is_lossy(self, tensors: Mapping[str, Tensor], worker_group: WorkerGroup) -> bool:
        """True if bodies contain less than the gradients of these parameters; a mean over ranks is always fp32."""
        same_dtype = worker_group.size == 1 and all(tensor.dtype == DTYPES[self.dtype] for tensor in tensors.values())
        return self.encoding != "dense" or not (self.dtype == "F32" or same_dtype)


class Gradients:
    """The gradients of a model's parameters, gathered for one push after another.

    frozen: the parameters that the run does not have, with names for messages. module: the model, if it is known.
    encoder: encodes the gradients and keeps
    their residual, or None.

    Gradients are gathered when a step is taken, not by hooks during backward: `clip_grad_norm_`, a GradScaler's
    unscaling and a second backward change `.grad` after a hook has run, and leave no trace that would show it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        frozen: Sequence[tuple[str, Tensor]],
        manifest: Manifest,
        push_format: PushFormat,
        worker_group: WorkerGroup,
        *,
        module: nn.Module | None,
        pinned: bool,
    ) -> None:
        self._tensors = tensors
        self._module = None if module is None else weakref.ref(module)
        self._done: tuple[weakref.ref[Tensor], int] | None = None
        """The first of the gradients that a push has, and its version; None if they were removed."""
        self._absent = -1
        """How many parameters had no gradient when the model was last compared."""
        self._compared = 0
        """How many steps ago that was."""
        self._frozen = frozen
        self._worker_group = worker_group
        self.encoder: Encoder | None = None
        self._in_place: InPlaceGradient | None = None
        if push_format.error_feedback and push_format.is_lossy(tensors, worker_group):
            self.flat = Flat(manifest, pinned=pinned)
            self.encoder = _encoder(self.flat, push_format)
        else:
            self.flat = Flat(manifest, push_format.dtype, pinned=pinned)
            if push_format.dtype == "F32" and worker_group.size == 1:
                self._in_place = InPlaceGradient(self.flat)

    @property
    def body(self) -> Flat | InPlaceGradient | Encoder:
        """The gathered gradients, in the form that a push takes."""
        return self.encoder or self._in_place or self.flat

    def gather(self, *, copy: bool) -> None:
        """Takes the current gradients; zeros for parameters without one.

        Raises ManifestMismatch as `check` does, and if the model has other parameters by now; DtypeOverflow where the
        vector is F16 and cannot hold a gradient.

        copy: True if gradients may change before the push has been answered.
        """
        self.check()
        self._require_the_models()
        gradients = {name: tensor.grad for name, tensor in self._tensors.items()}
        if self._in_place is not None:
            self._in_place.gather(gradients, copy=copy)
        else:
            self.flat.gather(gradients)

    def has_any(self) -> bool:
        """True if a parameter has a gradient."""
        return any(tensor.grad is not None for tensor in self._tensors.values())

    def versions(self) -> list[tuple[int, int]]:
        """Identity and version of each gradient, which change when one is taken or added to."""
        return [(id(tensor.grad), tensor.grad._version) for tensor in self._tensors.values() if tensor.grad is not None]

    def note_done(self) -> None:
        """Notes that a push has the gradients that there are now, or that these are zeros."""
        first = self._first()
        # Not its identity: another one may come to lie where it was.
        self._done = None if first is None else (weakref.ref(first), first._version)

    def are_left(self) -> bool:
        """Whether there are gradients that no push has, other than zeros.

        Only the first one is looked at for changes, since every step notes it.
        """
        first = self._first()
        if first is None:
            return False
        if self._done is not None:
            done, version = self._done
            if done() is first and version == first._version:
                return False
        return any(map(_is_any, self._given()))

    def _first(self) -> Tensor | None:
        return next(self._given(), None)

    def _given(self) -> Iterator[Tensor]:
        return (each.grad for each in self._tensors.values() if each.grad is not None)

    def discard_if_changed(self, versions: list[tuple[int, int]]) -> bool:
        """Removes all gradients if one was taken or added to since; whether that was so."""
        if set(self.versions()) <= set(versions):
            return False
        for tensor in self._tensors.values():
            tensor.grad = None
        return True

    def require_any(self) -> None:
        """Raises NoGradients where no parameter has a gradient."""
        if not self.has_any():
            raise NoGradients(
                "no parameter has a gradient: call backward() before step(), or step(allow_empty=True) to push zeros"
            )

    def _require_the_models(self) -> None:
        """Raises ManifestMismatch if the model has other parameters by now, which nobody would train.

        It costs a pass over the model, so it is done when parameters have begun or ceased to be without a gradient, and
        at every 16th step.
        """
        absent = sum(tensor.grad is None for tensor in self._tensors.values())
        module = None if self._module is None else self._module()
        self._compared += 1
        if module is None or (absent == self._absent and self._compared < _COMPARED_EVERY):
            return
        known = {id(tensor) for tensor in (*self._tensors.values(), *(tensor for _, tensor in self._frozen))}
        here = {id(tensor): name for name, tensor in module.named_parameters() if tensor.requires_grad}
        lost = [name for name, tensor in self._tensors.items() if id(tensor) not in here]
        new = [name for number, name in here.items() if number not in known]
        if lost or new:
            raise ManifestMismatch(
                f"the model's parameter {(new or lost)[0]!r} was replaced or added after the optimizer was made, as "
                "resizing an embedding does, and would not be trained: make the optimizer when the model is complete"
            )
        self._absent, self._compared = absent, 0

    def gather_difference(self, start: Flat) -> None:
        """Takes `start` minus the current parameters, the gradient by which SGD with lr 1 would have come from start.

        Raises ManifestMismatch as `check` does, and DtypeOverflow as `gather` does.
        """
        self.check()
        for name, tensor in self._tensors.items():
            now, view = tensor.to("cpu", torch.float32), self.flat.views[name]
            torch.sub(start.views[name], now, out=view)
            if self.flat.dtype == "F16":
                require_f16_holds(name, start.views[name] - now, view)

    def check(self) -> None:
        """Raises ManifestMismatch if a parameter has been frozen since, or a frozen one has a gradient."""
        for name, tensor in self._tensors.items():
            if not tensor.requires_grad:
                raise ManifestMismatch(
                    f"the parameter {name!r} no longer requires a gradient, but the run would go on averaging and "
                    "decaying it: create an optimizer with another run for the parameters that are trained now"
                )
        for name, tensor in self._frozen:
            if tensor.requires_grad and tensor.grad is not None:
                raise ManifestMismatch(
                    f"{name} has a gradient, but was frozen when the optimizer was created, so the run does not have "
                    "it: create an optimizer with another run for the parameters that are trained now"
                )

    def average(self, batches: Sequence[Batch]) -> Batch:
        """Replaces the gathered gradients by the mean over ranks; returns the combined batch."""
        batch = self._worker_group.average(self.flat, batches)
        if self.encoder is not None:
            self.encoder.begin()
        return batch


def _is_any(gradient: Tensor) -> bool:
    """Whether it has an element that is not 0."""
    return bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())


def push_body(manifest: Manifest, push_format: PushFormat) -> tuple[Flat, Flat | Encoder]:
    """For gradients that are computed as fp32: the vector to compute them in, and what is then pushed.

    Both are one where bodies are that vector. Raises FreestepError without error feedback.
    """
    gradient = Flat(manifest)
    if (push_format.dtype, push_format.encoding) == ("F32", "dense"):
        return gradient, gradient
    if not push_format.error_feedback:
        raise FreestepError("differences of a region are pushed as BF16 or F16 with error_feedback only")
    return gradient, _encoder(gradient, push_format)


def _encoder(gradient: Flat, push_format: PushFormat) -> Encoder:
    if push_format.encoding == "int8":
        return Int8(gradient, push_format.int8_block)
    if push_format.encoding == "topk":
        return TopK(gradient, push_format.topk_fraction, push_format.dtype)
    return Rounded(gradient, push_format.dtype)
