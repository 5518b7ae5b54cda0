"""Encoders: their bodies are those of the plain ones, and what they lose is pushed later."""

from __future__ import annotations

import pytest
import torch

import encoded
from every_encoder import MAKERS, MANIFEST, filled, read, said, whole
from freestep import Flat, FreestepError, Int8, MalformedTensors, ManifestMismatch, Rounded, TopK, encoders
from freestep.api.models import ParameterSpec
from freestep.flat import DTYPES
from freestep.wire.manifest import Manifest


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("count", [1, 3])
def test_rounded_is_the_plain_one(dtype: str, count: int) -> None:
    """The body is what the same gradient and residual, added up by hand, make as a flat vector of that dtype."""
    encoder, residual = Rounded(Flat(MANIFEST), dtype), torch.zeros(MANIFEST.numel)
    for seed in range(5):
        encoder.gradient.vector.copy_(filled(seed).vector)
        encoder.begin()
        exact = encoder.gradient.vector + residual
        plain = Flat(MANIFEST, dtype)
        plain.vector.copy_(exact)
        residual = exact - plain.vector.float()
        assert whole(encoder, count) == [b"".join(part.body()) for part in plain.parts(count)]
        encoder.settle(True)
        assert torch.equal(encoder.residual, residual)


def test_what_f16_cannot_say_is_said_once_it_has_added_up() -> None:
    encoder, total = Rounded(Flat(MANIFEST), "F16"), torch.zeros(MANIFEST.numel)
    encoder.gradient.vector.fill_(1e-8)
    for _ in range(100):
        encoder.begin()
        total += said(encoder)
        encoder.settle(True)
    torch.testing.assert_close(total, torch.full_like(total, 1e-6), rtol=0.05, atol=0)


@pytest.mark.parametrize("block", [1, 7, 256, 300, 2**31])
def test_int8_is_the_plain_one(block: int) -> None:
    flat = filled()
    items, metadata = read(*whole(Int8(flat, block)), MANIFEST)
    expected, said_of_it = encoded.int8(flat.views, block)
    assert metadata == said_of_it
    assert items.keys() == expected.keys()
    for name, item in items.items():
        torch.testing.assert_close(item, expected[name].reshape(item.shape), rtol=0, atol=0)


def test_a_block_of_zeros_has_the_scale_0() -> None:
    flat = Flat(MANIFEST)
    flat.views["n"][300] = -5.0
    flat.views["b"].fill_(1e-42)
    encoder = Int8(flat)
    items, _ = read(*whole(encoder), MANIFEST)
    assert items["n::scale"].tolist() == [0.0, pytest.approx(5 / 127)]
    assert items["n"][300] == -127
    assert all(not items[name].any() for name in ("w", "b", "m"))
    torch.testing.assert_close(said(encoder) + encoder._after, flat.vector)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("fraction", [1e-6, 0.05, 1.0])
def test_topk_is_the_plain_one(dtype: str, fraction: float) -> None:
    flat = filled()
    items, metadata = read(*whole(TopK(flat, fraction, dtype)), MANIFEST)
    assert metadata == {"freestep.encoding": "topk"}
    for name, view in flat.views.items():
        numel = view.numel()
        indices = view.reshape(-1).abs().topk(min(max(round(fraction * numel), 1), numel)).indices.sort().values
        assert items[f"{name}::indices"].dtype == torch.int32
        assert torch.equal(items[f"{name}::indices"].long(), indices)
        assert torch.equal(items[f"{name}::values"], view.reshape(-1)[indices].to(DTYPES[dtype]))


def test_indices_that_do_not_fit_are_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_LARGEST_I32", 40 * 33 - 2)
    encoder = TopK(filled(), 0.05, "BF16")
    items, _ = read(*whole(encoder), MANIFEST)
    assert {item.dtype for name, item in items.items() if name.endswith("::indices")} == {torch.int64}
    torch.testing.assert_close(said(encoder) + encoder._after, encoder.gradient.vector)


LONG = 1_000_003


@pytest.mark.parametrize("count", [1, 100, 10_000, 500_000, LONG])
@pytest.mark.parametrize(
    "kind", ["normal", "few", "equal", "all in one place", "where no sample is", "only where a sample is", "nan"]
)
def test_the_largest_of_a_long_vector_are_the_largest(kind: str, count: int) -> None:
    vector = torch.randn(LONG, generator=torch.Generator().manual_seed(3))
    stride = LONG // encoders._SAMPLE | 1
    if kind == "few":
        vector[torch.arange(LONG) % 1000 != 7] = 0
    elif kind == "equal":
        vector = vector.sign()
    elif kind == "all in one place":
        vector[: LONG // 2] *= 1e-6
    elif kind == "where no sample is":
        vector[::stride] = 0
    elif kind == "only where a sample is":
        vector[torch.arange(LONG) % stride != 0] = 0
    elif kind == "nan":
        vector[LONG // 2] = float("nan")
    found = encoders._largest(vector, count)
    assert (found.diff() > 0).all()
    expected = vector.abs().topk(count).values
    torch.testing.assert_close(vector[found].abs().sort(descending=True).values, expected, equal_nan=True)


# Error feedback


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [1, 3])
def test_what_was_pushed_and_the_residual_are_the_gradients(name: str, count: int) -> None:
    encoder = MAKERS[name](Flat(MANIFEST))
    gradients, pushed = torch.zeros(2, MANIFEST.numel, dtype=torch.float64)
    for seed in range(30):
        encoder.gradient.vector.copy_(filled(seed).vector)
        encoder.begin()
        gradients += encoder.gradient.vector
        pushed += said(encoder, count)
        encoder.settle(True)
    torch.testing.assert_close(pushed + encoder.residual, gradients, rtol=0, atol=1e-5)
    assert encoder.residual.any() == (name != "topk-of-all")


@pytest.mark.parametrize("name", MAKERS)
def test_parts_are_the_stretches_that_the_service_cuts(name: str) -> None:
    one, two = (MAKERS[name](filled()) for _ in range(2))
    for count in (1, 2, 7, 64):
        manifests = [MANIFEST.part(index, count) for index in range(count)]
        assert [part.manifest.numel for part in one.parts(count)] == [each.numel for each in manifests]
        # Made anew, and what is lost with it.
        torch.testing.assert_close(said(one, count) + one.residual, one.gradient.vector)
    assert whole(one) == whole(two)
    assert torch.equal(one.residual, two.residual)


@pytest.mark.parametrize("name", ["int8", "topk-bf16", "bf16"])
def test_the_same_push_is_the_same_bytes_whatever_happens_to_it(name: str) -> None:
    encoder = MAKERS[name](filled())
    encoder.begin()
    whole(encoder)
    encoder.settle(True)
    encoder.gradient.vector.copy_(filled(1).vector)
    encoder.begin()
    first = whole(encoder)
    assert whole(encoder, 3) != first
    for counts in (False, True):
        encoder.settle(counts)
        assert whole(encoder, 2) != first
        assert whole(encoder) == first


@pytest.mark.parametrize("name", ["f16", "int8", "topk"])
def test_a_push_that_does_not_count_leaves_the_residual_as_it_was(name: str) -> None:
    encoder = MAKERS[name](filled())
    encoder.begin()
    whole(encoder)
    encoder.settle(True)
    kept = encoder.residual.clone()
    for value in (1.0, float("nan")):
        encoder.gradient.vector.fill_(value)
        encoder.begin()
        whole(encoder)
        encoder.settle(False)
        assert torch.equal(encoder.residual, kept)


def test_where_nobody_knows_what_became_of_a_push_it_counts_if_it_can() -> None:
    encoder = MAKERS["topk"](filled())
    lost = encoder.gradient.vector - said(encoder)
    encoder.gradient.vector.fill_(float("inf"))
    encoder.begin()
    assert torch.equal(encoder.residual, lost)
    whole(encoder)
    encoder.gradient.vector.zero_()
    encoder.begin()
    assert torch.equal(encoder.residual, lost)
    encoder.forget()
    assert not encoder.residual.any()


def test_what_cannot_be_is_refused() -> None:
    flat = Flat(MANIFEST)
    with pytest.raises(FreestepError, match="fp32, not from BF16"):
        Int8(Flat(MANIFEST, "BF16"))
    with pytest.raises(FreestepError, match="at least one element, not 0"):
        Int8(flat, 0)
    for fraction in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(FreestepError, match="above 0 and at most 1"):
            TopK(flat, fraction)
    with pytest.raises(FreestepError, match="rounded to BF16 or F16, not to F32"):
        Rounded(flat, "F32")
    with pytest.raises(FreestepError, match="not of I8"):
        TopK(flat, dtype="I8")
    with pytest.raises(ManifestMismatch, match="residual"):
        TopK(flat).residual = torch.zeros(3)
    twice = Manifest([ParameterSpec(name=name, shape=(2,)) for name in ("w", "w::scale")])
    with pytest.raises(MalformedTensors, match="names"):
        Int8(Flat(twice))
    nothing = Flat(Manifest([ParameterSpec(name="e", shape=(0,))]))
    for make in MAKERS.values():
        assert len(whole(make(nothing))) == 1
