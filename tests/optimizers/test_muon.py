"""Schedule-Free over Muon and NorMuon: orthogonal steps for matrices, AdamW's for other parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import freestep
import reference
from flats import Flat, step_together
from freestep.api.bases import BaseMuon
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import method_of, step
from freestep_service.optimizers.kernels import sweep
from freestep_service.optimizers.kernels.gradient import Gradient
from freestep_service.optimizers.methods.muon import polar
from freestep_service.optimizers.readiness import DTYPES, compile_rule
from harness import ThreadService
from plain_calls import Api
from reference import OverTorch

STEPS = 100
STEADY = settings(derandomize=True, deadline=None, max_examples=3, suppress_health_check=list(HealthCheck))
SHAPES = {"wide": (5, 12), "tall": (11, 3), "square": (6, 6), "vector": (13,)}
"""`vector` is of the group `second`."""

common = {
    "lr": st.sampled_from([0.002, 0.02]),
    "momentum": st.sampled_from([0.0, 0.9, 0.95]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
}
muon = st.fixed_dictionaries(
    {
        **common,
        "algorithm": st.just("muon"),
        "nesterov": st.booleans(),
        "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
    }
)
normuon = st.fixed_dictionaries({**common, "algorithm": st.just("normuon"), "beta2": st.sampled_from([0.9, 0.99])})
ADAMW = {"algorithm": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.03}


def random(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def without(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != name}


@pytest.mark.parametrize("bases", [muon, normuon], ids=["muon", "normuon"])
def test_a_step_is_schedule_free_over_the_papers(bases: st.SearchStrategy[dict[str, Any]]) -> None:
    """The compiled rule, and its evaluation in fp64, against references that work on singular values."""

    @STEADY
    @given(bases, st.booleans())
    def compared(base: dict[str, Any], damped: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = random(SHAPES, generator)
        spec = {"algorithm": "schedule_free_wrapper", "base": base, "weight_decay_at_y": 0.02, "r": 0.5}
        second = {"base": ADAMW}
        flat = Flat(spec, second, weights)
        exact = Flat(spec, second, {name: weight.double() for name, weight in weights.items()})
        ours: Callable[..., Any] = partial(reference.Muon, **without(base, "algorithm"))
        theirs: Callable[..., Any] = partial(torch.optim.AdamW, **without(ADAMW, "algorithm"))
        references = {
            name: OverTorch(weight, ours if weight.dim() == 2 else theirs, beta=0.9, decay_at_y=0.02, r=0.5)
            for name, weight in weights.items()
        }
        step_together(flat, exact, references, (random(SHAPES, generator) for _ in range(STEPS)), damped)
        for name, each in references.items():
            for point, expected in (("x", each.x), ("y", each.y), ("z", each.z)):
                torch.testing.assert_close(exact.point(point)[name], expected, rtol=1e-8, atol=1e-9)
                torch.testing.assert_close(flat.point(point)[name], expected.float(), rtol=1e-4, atol=2e-5)

    compared()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (11, 3)])
def test_the_reference_equals_torchs_muon_but_for_its_bfloat16(shape: tuple[int, int], nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    mine, torchs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizers = (
        reference.Muon([mine], lr=0.1, nesterov=nesterov),
        torch.optim.Muon([torchs], lr=0.1, nesterov=nesterov),
    )
    for _ in range(4):
        mine.grad = torchs.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    # Of four steps whose elements are about 0.1 · 0.3 · sqrt(11 / 3) at most.
    torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-2)


def test_the_default_hyperparameters_are_torchs() -> None:
    theirs = inspect.signature(torch.optim.Muon).parameters
    assert BaseMuon().model_dump(exclude={"algorithm"}) == {
        name: theirs[name].default for name in theirs if name != "params"
    }


def test_the_iterations_bring_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in ((40, 40), (8, 64), (64, 8), (1, 5)):
        values = torch.linalg.svdvals(polar(torch.randn(shape, generator=generator), BaseMuon()))
        assert 0.5 < values.median() < 1.3
        assert values.max() < 1.3
    assert torch.equal(polar(torch.zeros(3, 4), BaseMuon()), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize(
    "base", [{"algorithm": "muon"}, {"algorithm": "muon", "adjust_lr_fn": "match_rms_adamw"}, {"algorithm": "normuon"}]
)
def test_a_matrix_without_elements_has_no_step(base: dict[str, Any], shape: tuple[int, int]) -> None:
    spec, weight = {"algorithm": "schedule_free_wrapper", "base": base}, torch.eye(3, 4)
    flat = Flat(spec, {}, {"empty": torch.ones(shape), "w": weight, "none": torch.ones(shape)})
    alone = Flat(spec, {}, {"w": weight})
    for each in (flat, alone):
        each.step({"empty": torch.ones(shape), "w": torch.ones(3, 4), "none": torch.ones(shape)})
    assert torch.equal(flat.point("y")["w"], alone.point("y")["w"])
    assert not torch.equal(flat.point("y")["w"], weight)


def spec(base: dict[str, Any], *, shape: list[int], second: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "optimizer": {"algorithm": "schedule_free_wrapper", "base": base},
        "parameters": [{"name": "w", "shape": [4, 4]}, {"name": "v", "shape": shape, "group": "second"}],
        "groups": {"second": {} if second is None else {"base": second}},
    }


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (spec({"algorithm": "muon"}, shape=[3]), "parameters.1.shape"),
        (spec({"algorithm": "normuon"}, shape=[]), "parameters.1.shape"),
        (spec({"algorithm": "normuon"}, shape=[2, 2, 2], second={"algorithm": "muon"}), "parameters.1.shape"),
        (spec({"algorithm": "muon"}, shape=[3], second={"algorithm": "sgd"}), "groups.second.base"),
        (spec({"algorithm": "muon"}, shape=[3], second={"algorithm": "adamw", "amsgrad": True}), "groups.second.base"),
        (spec({"algorithm": "adamw"}, shape=[3, 3], second={"algorithm": "muon"}), "groups.second.base.algorithm"),
        (spec({"algorithm": "muon", "ns_steps": 0}, shape=[3, 3]), "optimizer.base.ns_steps"),
        (
            spec({"algorithm": "muon", "ns_coefficients": (4.0, 1, 1)}, shape=[3]),
            "optimizer.base.ns_coefficients",
        ),
        (spec({"algorithm": "muon", "beta2": 0.9}, shape=[3, 3]), "optimizer.base.beta2"),
    ],
)
def test_parameters_that_are_no_matrices_need_a_group_of_their_own(document: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate(document)
    assert field in [".".join(map(str, error["loc"])) for error in caught.value.errors()]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_matrix_is_on_one_shard(count: int) -> None:
    document = spec({"algorithm": "muon"}, shape=[600], second={"algorithm": "adamw"})
    document["parameters"] += [{"name": f"m{number}", "shape": [20, 10 + number]} for number in range(3)]
    manifest = Manifest.of(RunSpec.model_validate(document))
    parts = [manifest.part(index, count) for index in range(count)]
    assert [parts[0].begin, *(part.end for part in parts)] == [*(part.begin for part in parts), manifest.numel]
    held = [slot for part in parts for slot in part.slots if slot.group == "default"]
    assert [(slot.name, slot.shape) for slot in held] == [
        (slot.name, slot.shape) for slot in manifest.slots if slot.group == "default"
    ]


def test_loops_are_compiled_before_a_push_needs_them() -> None:
    document = RunSpec.model_validate(spec({"algorithm": "muon"}, shape=[3], second={"algorithm": "adamw"}))
    method = method_of(document.optimizer)
    sweep._loop.cache_clear()
    compile_rule(document.optimizer, gathers=True)
    loops = [(method.rule, len(method.buffers), dtype, gathered) for gathered in (False, True) for dtype in DTYPES]
    before = [len(sweep._loop(*loop).signatures) for loop in loops]  # type: ignore[attr-defined]
    assert before == [1] * len(loops)
    flat = Flat(document.optimizer.model_dump(), {"base": ADAMW}, random(SHAPES, torch.Generator().manual_seed(0)))
    for dtype in DTYPES:
        pushed = torch.ones_like(flat.buffers["y"]).to(dtype)
        for gathered in (None, torch.ones_like(flat.buffers["y"])):
            gradient = Gradient(pushed, gathered=gathered)
            step(flat.method, flat.layout, flat.hyperparameters, flat.scalars, flat.buffers, gradient)
    assert [len(sweep._loop(*loop).signatures) for loop in loops] == before  # type: ignore[attr-defined]


def gradients_of(run: str, service: ThreadService, shards: int) -> dict[str, Tensor]:
    """x after pushes to a run that is checkpointed, goes back, and is resharded on the way."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 4), nn.Linear(4, 5))
    matrices = [(name, each) for name, each in model.named_parameters() if each.dim() == 2]
    vectors = [(name, each) for name, each in model.named_parameters() if each.dim() == 1]
    with (
        freestep.RemoteOptimizer(
            [{"params": matrices}, {"params": vectors, "base": {"algorithm": "adamw", "lr": 0.01}}],
            url=service.url,
            run=run,
            algorithm="schedule_free_wrapper",
            base={"algorithm": "normuon", "lr": 0.02, "weight_decay": 0.1},
            warmup_steps=5,
            shards=shards,
        ) as opt,
        freestep.Client(service.url) as client,
    ):

        def push() -> None:
            """Until it counts: the first one in a new epoch does not."""
            for _, parameter in (*matrices, *vectors):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            opt.step()
            while opt.receipt is None or opt.receipt.decision != "applied":
                opt.step()

        for _ in range(6):
            push()
        kept = client.run(run).checkpoint()
        push()
        client.run(run).restore(kept.step)
        for _ in range(5):
            push()
        if shards > 1:
            client.run(run).reshard(shards - 1)
        for _ in range(5):
            push()
        x, at = client.run(run).pull("x")
        assert at == 16
        return x


@pytest.mark.slow
def test_shards_and_checkpoints_do_not_change_a_run(service: ThreadService) -> None:
    alone, spread = (gradients_of(f"muon-{shards}", service, shards) for shards in (1, 3))
    for name, tensor in alone.items():
        assert torch.equal(tensor, spread[name]), name


def test_a_plain_http_client_can_create_it(api: Api) -> None:
    document = spec({"algorithm": "muon", "lr": 0.1}, shape=[3], second={"algorithm": "adamw"})
    refused = api.http.put(api.path(), json=spec({"algorithm": "muon"}, shape=[3]))
    assert refused.status_code == 422
    assert refused.json()["type"] == "urn:freestep:problem:invalid-spec"
    assert api.http.get(api.path()).status_code == 404
    assert api.http.put(api.path(), json=document).status_code == 201
