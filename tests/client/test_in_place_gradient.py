"""Tensors that are sent from where they lie are the tensors that a flat vector would hold."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from freestep import Flat, RemoteOptimizer, in_place_gradient
from freestep.api.models import ParameterSpec
from freestep.in_place_gradient import InPlaceGradient
from freestep.wire.manifest import Manifest
from harness import ThreadService

LARGE = in_place_gradient._LARGE
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (3,), "w": (LARGE // 64, 64), "s": (), "e": (0, 4), "m": (5, 7), "v": (LARGE,), "u": (LARGE + 1,), "n": (2,),
}  # fmt: skip
MANIFEST = Manifest([ParameterSpec(name=name, shape=shape) for name, shape in SHAPES.items()])


def drawn(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def bodies(sent: Flat | InPlaceGradient, count: int) -> list[bytes]:
    return [b"".join(part.body()) for part in sent.parts(count)]


def filled(tensors: Mapping[str, Tensor | None]) -> Flat:
    flat = Flat(MANIFEST)
    flat.gather(tensors)
    return flat


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("copy", [False, True])
def test_bodies_are_those_of_the_flat_vector(count: int, copy: bool) -> None:
    sent = InPlaceGradient(Flat(MANIFEST))
    for seed in range(3):
        tensors: dict[str, Tensor | None] = {**drawn(seed), "m": None, "v": drawn(seed)["v"] if seed != 1 else None}
        sent.gather(tensors, copy=copy)
        assert bodies(sent, count) == bodies(filled(tensors), count)


def test_only_what_is_small_is_copied() -> None:
    sent, tensors = InPlaceGradient(Flat(MANIFEST)), drawn()
    sent.gather(tensors)
    (part,) = sent.parts(1)
    # The header; a; w; s, e and m; v; u; n.
    assert len(part.body()) == 7
    assert not sent.flat.views["w"].any() and not sent.flat.views["u"].any()
    before = bodies(sent, 3)
    tensors["v"].zero_()
    assert bodies(sent, 3) != before
    sent.gather(tensors, copy=True)
    before = bodies(sent, 3)
    tensors["v"].add_(1.0)
    assert bodies(sent, 3) == before


@pytest.mark.parametrize("kind", ["transposed", "strided", "narrow", "wide", "sparse", "a subclass"])
def test_what_does_not_lie_as_it_is_sent_is_copied(kind: str) -> None:
    tensors = drawn()
    w = tensors["w"]
    tensors["w"] = {
        "transposed": lambda: w.t().contiguous().t(),
        "strided": lambda: torch.stack([w, w], -1)[..., 0],
        "narrow": lambda: w.bfloat16(),
        "wide": lambda: w.double(),
        "sparse": lambda: w.to_sparse(),
        "a subclass": lambda: nn.Parameter(w),
    }[kind]()
    sent = InPlaceGradient(Flat(MANIFEST))
    sent.gather(tensors)
    assert sent.flat.views["w"].any()
    assert bodies(sent, 2) == bodies(filled(tensors), 2)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_of_large_and_small_tensors_trains_as_its_copies_do(
    service: ThreadService, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    ended = []
    for large in (LARGE, 10**9):
        monkeypatch.setattr(in_place_gradient, "_LARGE", large)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, LARGE // 64), nn.Tanh(), nn.Linear(LARGE // 64, 64), nn.Linear(64, 3))
        run = f"run-{uuid.uuid4().hex[:8]}"
        with RemoteOptimizer(model, url=service.url, run=run, lr=0.01, shards=shards) as optimizer:
            for seed in range(5):
                optimizer.zero_grad(set_to_none=bool(seed % 2))
                inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
                model(inputs).square().sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        ended.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*ended)
