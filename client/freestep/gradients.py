"""A worker's gradients, as its pushes take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from freestep.api.models import Dtype
from freestep.encoders import Encoder, Int8, Rounded, TopK
from freestep.errors import FreestepError, ManifestMismatch
from freestep.flat import DTYPES, Flat
from freestep.in_place_gradient import Loose
from freestep.wire.encoding import ENCODINGS, Encoding
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch, Ranks

__all__ = ["Gradients", "Wire"]


class Wire:
    """How gradients travel: `push_dtype`, `push_encoding` and their options, as RemoteOptimizer has them.

    Raises FreestepError where they do not go together.
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
            raise FreestepError(f"push_dtype is one of {choices}, not {dtype!r}; push_encoding may be 'int8'")
        if encoding not in ENCODINGS:
            raise FreestepError(f"push_encoding is one of {', '.join(ENCODINGS)}, not {encoding!r}")
        if encoding == "int8" and dtype is not None:
            raise FreestepError(f"push_encoding='int8' leaves no choice of push_dtype, which is {dtype!r}")
        if encoding != "dense" and not error_feedback:
            raise FreestepError(f"push_encoding={encoding!r} needs error_feedback: most of a gradient would be lost")
        self.dtype = dtype or "F32"
        self.encoding = encoding
        self.topk_fraction = topk_fraction
        self.int8_block = int8_block
        self.error_feedback = error_feedback

    def loses(self, tensors: Mapping[str, Tensor], ranks: Ranks) -> bool:
        """Whether a gradient may be more than what is said of it; a mean over ranks is fp32 whatever they are."""
        narrow = ranks.size == 1 and all(tensor.dtype == DTYPES[self.dtype] for tensor in tensors.values())
        return self.encoding != "dense" or not (self.dtype == "F32" or narrow)


class Gradients:
    """The gradients of some parameters, gathered for one push after the other.

    frozen: the parameters that were left out, by what they are called. encoder: what encodes the gradients and keeps a
    residual, if anything does.

    They are gathered when a step is made, and not by hooks while backward runs: `clip_grad_norm_`, the unscaling of
    mixed precision, a second backward that adds to the first and whatever else the caller does to `.grad` come after
    a hook has run, and leave no trace from which it could be seen that what the hook took is no longer the gradient.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        frozen: Sequence[tuple[str, Tensor]],
        manifest: Manifest,
        wire: Wire,
        ranks: Ranks,
        *,
        pinned: bool,
    ) -> None:
        self._tensors = tensors
        self._frozen = frozen
        self._ranks = ranks
        self.encoder: Encoder | None = None
        self._loose: Loose | None = None
        if wire.error_feedback and wire.loses(tensors, ranks):
            self.flat = Flat(manifest, pinned=pinned)
            self.encoder = _encoder(self.flat, wire)
        else:
            self.flat = Flat(manifest, wire.dtype, pinned=pinned)
            if wire.dtype == "F32" and ranks.size == 1:
                self._loose = Loose(self.flat)

    @property
    def body(self) -> Flat | Loose | Encoder:
        """What was gathered last, as a push takes it."""
        return self.encoder or self._loose or self.flat

    def gather(self, *, copy: bool) -> None:
        """Takes the gradients as they are now; zeros for parameters without one.

        copy: they may be changed before they are pushed. Raises ManifestMismatch when others are trained than the
        run's.
        """
        self.check()
        gradients = {name: tensor.grad for name, tensor in self._tensors.items()}
        if self._loose is not None:
            self._loose.gather(gradients, copy=copy)
        else:
            self.flat.gather(gradients)

    def gather_since(self, start: Flat) -> None:
        """Takes `start` - the parameters as they are now, which a step along it of learning rate 1 makes of `start`.

        Raises as `gather`.
        """
        self.check()
        for name, tensor in self._tensors.items():
            torch.sub(start.views[name], tensor.to("cpu", torch.float32), out=self.flat.views[name])

    def check(self) -> None:
        """Raises ManifestMismatch when other parameters are trained than the run's."""
        for name, tensor in self._tensors.items():
            if not tensor.requires_grad:
                raise ManifestMismatch(
                    f"the parameter {name!r} no longer requires a gradient, but the run goes on averaging and decaying "
                    "it: for other parameters, make an optimizer of another run"
                )
        for name, tensor in self._frozen:
            if tensor.requires_grad and tensor.grad is not None:
                raise ManifestMismatch(
                    f"{name} has a gradient, but was frozen when the optimizer was made, so that the run does not have "
                    "it: for other parameters, make an optimizer of another run"
                )

    def mean(self, batches: Sequence[Batch]) -> Batch:
        """Makes the gathered gradients the mean over all ranks' batches, the batch that is returned."""
        batch = self._ranks.mean(self.flat, batches)
        if self.encoder is not None:
            self.encoder.begin()
        return batch


def _encoder(gradient: Flat, wire: Wire) -> Encoder:
    if wire.encoding == "int8":
        return Int8(gradient, wire.int8_block)
    if wire.encoding == "topk":
        return TopK(gradient, wire.topk_fraction, wire.dtype)
    return Rounded(gradient, wire.dtype)
