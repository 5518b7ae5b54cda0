"""Schedule-Free under delay: the corrected rule against a plain reference, and in a shard's state."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flats import GROUPS, Flat, initial_weights, random_gradients
from freestep.api.hyperparameters import AdamWScheduleFree, SGDScheduleFree
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import Conditions
from freestep_service.optimizers.methods.averages import averaged
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.media import open_storage
from plain_calls import TENSORS, Api
from reference import OverTorch, ScheduleFree

AUTO = {"name": "auto"}
AHEAD = {"name": "ahead"}
STEADY = settings(derandomize=True, deadline=None, max_examples=5, suppress_health_check=list(HealthCheck))

staleness = st.one_of(st.just(0.0), st.floats(0.01, 300.0), st.sampled_from([1e6, 1e12]))
stretches = st.lists(st.tuples(st.integers(1, 20), staleness), min_size=1, max_size=8)
"""(steps, the staleness that is expected in them)."""
betas = st.sampled_from([0.7, 0.9, 0.98])


def each(played: list[tuple[int, float]]) -> Iterator[float]:
    """The staleness of each step."""
    return itertools.chain.from_iterable(itertools.repeat(expected, count) for count, expected in played)


SGD = {"lr": 0.05, "weight_decay": 0.02, "warmup_steps": 15}
ADAM = {"lr": 0.01, "weight_decay": 0.1, "r": 1.0}
SECOND = {"lr": 0.003, "weight_decay": 0.0}
TWINS: dict[str, dict[str, Any]] = {
    "sgd_schedule_free": SGD,
    "adamw_schedule_free": ADAM | {"adaptive": True, "inner_momentum": 0.8, "averaging_constant": 30.0},
    "radam_schedule_free": ADAM | {"rectified": True},
}
"""Algorithms, and the arguments of their references."""


def play(flat: Flat, exact: Flat, twins: dict[str, Any], played: list[tuple[int, float]]) -> None:
    """Takes the same steps by the compiled rule, by torch's evaluation of it in fp64, and by the references."""
    pushed = random_gradients(sum(count for count, _ in played))
    for count, expected in played:
        for gradients in itertools.islice(pushed, count):
            flat.step(gradients, 0.8, staleness=expected)
            exact.step({name: gradient.double() for name, gradient in gradients.items()}, 0.8, staleness=expected)
            for name, twin in twins.items():
                twin.step(gradients[name], 0.8, expected)
        for name, twin in twins.items():
            for point, wanted in (("x", twin.x), ("y", twin.y), ("z", twin.z)):
                torch.testing.assert_close(exact.point(point)[name], wanted, rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(flat.point(point)[name], wanted.float(), rtol=1e-4, atol=2e-5)


def both(optimizer: dict[str, Any], second: dict[str, Any]) -> tuple[Flat, Flat]:
    weights = initial_weights()
    return Flat(optimizer, second, weights), Flat(optimizer, second, {name: w.double() for name, w in weights.items()})


RULES = pytest.mark.parametrize("is_ahead", [False, True], ids=["auto", "ahead"])


def ruled(is_ahead: bool) -> dict[str, Any]:
    return {"delay_correction": {"name": "ahead" if is_ahead else "auto"}}


@RULES
@pytest.mark.parametrize("algorithm", TWINS)
def test_a_step_equals_the_corrected_rule(algorithm: str, is_ahead: bool) -> None:
    @STEADY
    @given(stretches, betas)
    def compared(played: list[tuple[int, float]], beta: float) -> None:
        options = TWINS[algorithm]
        hyperparameters = {key: value for key, value in options.items() if key not in ("adaptive", "rectified")}
        hyperparameters |= ruled(is_ahead)
        hyperparameters |= {"momentum": beta} if algorithm == "sgd_schedule_free" else {"betas": [beta, 0.99]}
        twins = {
            name: ScheduleFree(
                weight,
                beta=beta,
                is_ahead=is_ahead,
                beta2=0.99,
                **options | (SECOND if GROUPS[name] == "second" else {}),
            )
            for name, weight in initial_weights().items()
        }
        play(*both({"algorithm": algorithm, **hyperparameters}, SECOND), twins, played)

    compared()


@RULES
@pytest.mark.parametrize("base", ["sgd", "adam", "nadam", "rprop"])
def test_a_step_of_the_wrapper_equals_the_corrected_rule(base: str, is_ahead: bool) -> None:
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "nadam": torch.optim.NAdam, "rprop": torch.optim.Rprop}

    @STEADY
    @given(stretches, betas)
    def compared(played: list[tuple[int, float]], beta: float) -> None:
        twins = {
            name: OverTorch(
                weight,
                partial(make[base], lr=0.002 if GROUPS[name] == "second" else 0.01),
                beta=beta,
                is_ahead=is_ahead,
                decay_at_y=0.05,
            )
            for name, weight in initial_weights().items()
        }
        spec = {
            "algorithm": "schedule_free_wrapper",
            "base": {"algorithm": base, "lr": 0.01},
            "momentum": beta,
            "weight_decay_at_y": 0.05,
            **ruled(is_ahead),
        }
        play(*both(spec, {"base": {"lr": 0.002}}), twins, played)

    compared()


@RULES
@settings(STEADY, max_examples=200)
@given(stretches, betas, st.sampled_from([0, 10]), st.sampled_from([0.0, 2.0]), st.sampled_from([None, 5.0]))
def test_coefficients_stay_in_their_bounds(
    is_ahead: bool, played: list[tuple[int, float]], beta: float, warmup_steps: int, r: float, constant: float | None
) -> None:
    """For any staleness, y is between x and z, nearer to x, and no learning rate is larger than the user's."""
    h = SGDScheduleFree(momentum=beta, warmup_steps=warmup_steps, r=r, averaging_constant=constant, **ruled(is_ahead))
    scalars: Any = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
    for expected in each(played):
        made = averaged(h, scalars, h.lr, Conditions(0.5, expected_staleness=expected))
        assert 0.7 <= made.scalars["beta"] < 1
        assert not is_ahead or made.scalars["beta"] <= beta
        assert 0 < made.conditions.damping <= 0.5
        moved = made.conditions.damping * (1 - made.scalars["beta"]) * (1 + expected)
        most = 0.5 * (0.3 if is_ahead else max(0.2, 1 - beta))
        assert moved < most * (1 + 1e-12)
        assert made.conditions.damping == 0.5 or moved == pytest.approx(most)
        assert -1 <= made.y_share < 0
        scalars = made.scalars


def test_without_staleness_the_coefficients_are_the_papers_to_the_bit() -> None:
    for h in (SGDScheduleFree(momentum=0.83), AdamWScheduleFree(betas=(0.71, 0.9), averaging_constant=3.0)):
        scalars: Any = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
        weight_sum = 0.0
        for k in range(100):
            made = averaged(h, scalars, h.lr, Conditions())
            weight_sum += h.lr**2
            c = h.lr**2 / weight_sum
            if h.averaging_constant is not None:
                c = min(c * (1 - h.beta) * h.averaging_constant, 1.0)
            assert made[1:] == (Conditions(), c, h.beta * (1 - c) - 1, 0.0), k
            scalars = made.scalars


@pytest.mark.parametrize("beta", [0.7, 0.9, 0.98])
@pytest.mark.parametrize("expected", [0.5, 1.9, 2.1, 13.9, 14.1, 1000.0])
def test_ahead_comes_to_the_users_beta(beta: float, expected: float) -> None:
    """And to the user's learning rate up to a staleness of 0.3 / (1 - β) - 1, when x moves slowly."""
    h = SGDScheduleFree(momentum=beta, **ruled(is_ahead=True))
    late: Any = {"k": 10**9, "weight_sum": 1e9 * h.lr**2, "lr_max": h.lr, "c": 1e-9}
    made = averaged(h, late, h.lr, Conditions(expected_staleness=expected))
    assert made.scalars["beta"] == pytest.approx(beta, abs=1e-5)
    is_short = expected < 0.3 / (1 - beta) - 1
    assert made.conditions.damping == pytest.approx(1 if is_short else 0.3 / (1 - beta) / (1 + expected), rel=1e-3)


@RULES
@pytest.mark.parametrize("algorithm", ["sgd_schedule_free", "adamw_schedule_free"])
def test_a_run_converges_while_the_staleness_rises_and_falls_tenfold(algorithm: str, is_ahead: bool) -> None:
    """On least squares, with gradients of the expected staleness, beside the reference."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 20, generator=generator).double() * torch.linspace(0.1, 1.5, 20)
    targets = inputs @ torch.randn(20, generator=generator).double() + 0.1 * torch.randn(400, generator=generator)
    adaptive = algorithm == "adamw_schedule_free"
    lr = 0.2 if adaptive else 0.3
    twin = ScheduleFree(torch.zeros(20), lr=lr, beta=0.9, adaptive=adaptive, is_ahead=is_ahead)
    flat = Flat({"algorithm": algorithm, "lr": lr, **ruled(is_ahead)}, {}, {"vector": torch.zeros(20)})

    def loss(point: Tensor) -> float:
        return float((inputs @ point.double() - targets).square().mean())

    seen, points = [], deque([flat.point("y")["vector"]], maxlen=200)
    for delay in each([(600, 10), (600, 100), (600, 10), (600, 0), (600, 100)]):
        rows = torch.randint(0, 400, (16,), generator=generator)
        taken_at = points[max(0, len(points) - 1 - int(delay))].double()
        gradient = inputs[rows].T @ (inputs[rows] @ taken_at - targets[rows]) / 16
        flat.step({"vector": gradient.float()}, staleness=delay)
        twin.step(gradient.float(), staleness=delay)
        points.append(flat.point("y")["vector"])
        seen.append((loss(flat.point("x")["vector"]), loss(points[-1])))
    torch.testing.assert_close(flat.point("x")["vector"], twin.x.float(), rtol=1e-3, atol=1e-3)
    # Neither x nor y is ever worse than before the first change.
    assert max(itertools.chain.from_iterable(seen[600:])) < 1.1 * max(seen[599])
    assert seen[-1][0] < loss(torch.zeros(20)) / 1000


# In a shard's state

NUMEL = 37


def shard(algorithm: str, policy: dict[str, Any], count: int = 1, index: int = 0, **hyperparameters: Any) -> Shard:
    base = {"base": {"algorithm": "adam", "lr": 0.05}} if algorithm == "schedule_free_wrapper" else {"lr": 0.05}
    other = {"base": {"lr": 0.5}} if "base" in base else {"lr": 0.5}
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": algorithm, "delay_correction": AUTO, **base, **hyperparameters},
            "aggregation": policy,
            "parameters": [{"name": "w", "shape": [31]}, {"name": "v", "shape": [2, 3], "group": "other"}],
            "groups": {"other": other},
        }
    )
    manifest = Manifest(spec.parameters).part(index, count)
    made = Shard(spec, manifest, torch.device("cpu"))
    weights = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    made.initialize(weights[manifest.begin : manifest.end], epoch=1)
    return made


def advance(made: Shard, entries: int, batch: int) -> None:
    """Applies entries that depend only on their place in the log, of workers that join and leave."""
    for seq in range(made.seq + 1, made.seq + 1 + entries):
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seq))
        part = gradient[made.manifest.begin : made.manifest.end].clone()
        old, live = seq * seq % 19, 1 + (60 if seq % 23 > 17 else seq % 5)
        made.apply(Entry(seq, 1, advance=seq % batch == 0, gradient=part, worker="w", staleness=old, live=live))


def vectors(*shards: Shard) -> list[Tensor]:
    outs = [torch.empty(NUMEL) for _ in "xyz"]
    for (point, out), made in itertools.product(zip("xyz", outs, strict=True), shards):
        made.copy_point(point, out[made.manifest.begin : made.manifest.end])  # type: ignore[arg-type]
    return outs


ALGORITHMS = ["sgd_schedule_free", "adamw_schedule_free", "radam_schedule_free", "schedule_free_wrapper"]
POLICIES = [({"policy": "async"}, 1), ({"policy": "buffered", "batch": 3}, 3)]


@RULES
@pytest.mark.parametrize(("policy", "batch"), POLICIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shards_apply_the_same_correction(algorithm: str, policy: dict[str, Any], batch: int, is_ahead: bool) -> None:
    rule = ruled(is_ahead)
    whole, parts = shard(algorithm, policy, **rule), [shard(algorithm, policy, 3, index, **rule) for index in range(3)]
    for made in (whole, *parts):
        advance(made, 100, batch)
    for one, many in zip(vectors(whole), vectors(*parts), strict=True):
        assert torch.equal(one, many)
    assert {json.dumps(made.copy_state().scalars, sort_keys=True) for made in parts} == {
        json.dumps(whole.copy_state().scalars, sort_keys=True)
    }


@RULES
@pytest.mark.parametrize(("policy", "batch"), POLICIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checkpoint_in_the_middle_changes_nothing(
    algorithm: str, policy: dict[str, Any], batch: int, is_ahead: bool, tmp_path: Path
) -> None:
    rule = ruled(is_ahead)
    through, first = shard(algorithm, policy, **rule), shard(algorithm, policy, **rule)
    advance(through, 61, batch)
    advance(first, 40, batch)
    checkpoints = Checkpoints(open_storage(tmp_path), "run", keep=1)
    copy = first.copy_state()
    checkpoints.write(copy, 0, NUMEL, NUMEL, {})
    parts = [shard(algorithm, policy, 2, index, **rule) for index in range(2)]
    for made in parts:
        at = id_of(copy)
        made.load(checkpoints.load(at, made.manifest.begin, made.manifest.end)[0], 1)
    for one, many in zip(vectors(first), vectors(*parts), strict=True):
        assert torch.equal(one, many)
    for made in parts:
        advance(made, 21, batch)
    for one, many in zip(vectors(through), vectors(*parts), strict=True):
        assert torch.equal(one, many)


def test_a_checkpoint_of_an_older_version_continues_without_correction(tmp_path: Path) -> None:
    """Their steps had the user's β and no staleness."""
    plain = shard("sgd_schedule_free", {"policy": "async"}, delay_correction={"name": "none"})
    advance(plain, 30, 1)
    copy, checkpoints = plain.copy_state(), Checkpoints(open_storage(tmp_path), "run", keep=1)
    checkpoints.write(copy, 0, NUMEL, NUMEL, {})
    (file,) = tmp_path.rglob(f"{0:015d}-{NUMEL:015d}.json")
    document = json.loads(file.read_bytes())
    del document["checksum"], document["expected_staleness"]
    for scalars in document["scalars"].values():
        del scalars["beta"], scalars["c"], scalars["staleness"]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
    file.write_text(json.dumps(document | {"checksum": checksum}))
    old, _ = checkpoints.load(id_of(copy), 0, NUMEL)
    again = shard("sgd_schedule_free", {"policy": "async"}, delay_correction={"name": "none"})
    again.load(old, 1)
    for made in (plain, again):
        advance(made, 30, 1)
    for one, other in zip(vectors(plain), vectors(again), strict=True):
        assert torch.equal(one, other)
    corrected = shard("sgd_schedule_free", {"policy": "async"})
    corrected.load(checkpoints.load(id_of(copy), 0, NUMEL)[0], 1)
    advance(corrected, 30, 1)
    assert all(point.isfinite().all() for point in vectors(corrected))


@pytest.mark.parametrize("correction", [{"name": "constant", "expected_staleness": 0.0}, AUTO, AHEAD])
def test_fresh_gradients_are_not_corrected(correction: dict[str, Any]) -> None:
    plain, other = (
        shard("adamw_schedule_free", {"policy": "async"}, delay_correction=each_)
        for each_ in ({"name": "none"}, correction)
    )
    for made in (plain, other):
        for seq in range(1, 40):
            gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seq))
            made.apply(Entry(seq, 1, advance=True, gradient=gradient))
    for one, many in zip(vectors(plain), vectors(other), strict=True):
        assert torch.equal(one, many)


# Over HTTP


@pytest.mark.parametrize("correction", [AUTO, AHEAD, {"name": "constant", "expected_staleness": 3}])
def test_the_service_corrects_for_the_staleness_of_its_leases(api: Api, correction: dict[str, Any]) -> None:
    api.create(
        optimizer={"algorithm": "sgd_schedule_free", "lr": 0.1, "delay_correction": correction},
        aggregation={"policy": "async"},
    )
    leases = [api.lease(f"worker-{number}") for number in range(3)]
    twin, expected = ScheduleFree(TENSORS["w"], lr=0.1, beta=0.9, is_ahead=correction == AHEAD), 0.0
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        if step == 20:
            assert api.http.delete(api.path(f"/leases/{leases.pop()['lease']}")).status_code == 204
        taken_at = max(0, step - 7) if step % 4 == 0 else max(0, step - 2)
        pushed = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in TENSORS.items()}
        receipt = api.push(leases[step % len(leases)], taken_at, tensors=pushed).json()
        assert receipt["staleness"] == step - taken_at
        expected = max(len(leases) - 1, expected + (receipt["staleness"] - expected) / (2 * (1 + expected)))
        twin.step(pushed["w"], staleness=3 if correction["name"] == "constant" else expected)
        for point in "xyz":
            torch.testing.assert_close(api.pull(point)[0]["w"], getattr(twin, point).float(), rtol=1e-4, atol=1e-5)
