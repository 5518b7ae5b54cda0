"""Schedule-Free over torch's optimizers, and primal averaging, against torch's classes and the package's wrapper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import schedulefree
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flats import GROUPS, Flat, step_together
from reference import OverTorch

STEPS = 500
STEADY = settings(derandomize=True, deadline=None, max_examples=3, suppress_health_check=list(HealthCheck))

decays = st.sampled_from([0.0, 0.03])
rates = st.sampled_from([0.003, 0.02])
betas = st.tuples(st.sampled_from([0.0, 0.8, 0.9]), st.sampled_from([0.95, 0.999]))
epsilons = st.sampled_from([1e-8, 1e-5])
flags = st.booleans()

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, st.SearchStrategy[Any]]]] = {
    "sgd": (
        torch.optim.SGD,
        {"momentum": st.sampled_from([0.0, 0.9]), "dampening": st.sampled_from([0.0, 0.3]), "weight_decay": decays},
    ),
    # Without weight decay: near g + λ z = 0 the root of its square makes much of what rounding leaves.
    "rmsprop": (
        torch.optim.RMSprop,
        {
            "alpha": st.sampled_from([0.9, 0.99]),
            "momentum": st.sampled_from([0.0, 0.7]),
            "centered": flags,
            "eps": epsilons,
        },
    ),
    "adagrad": (
        torch.optim.Adagrad,
        {
            "lr_decay": st.sampled_from([0.0, 0.01]),
            "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
            "weight_decay": decays,
        },
    ),
    "adam": (
        torch.optim.Adam,
        {"betas": betas, "eps": epsilons, "weight_decay": decays, "amsgrad": flags, "decoupled_weight_decay": flags},
    ),
    "adamw": (torch.optim.AdamW, {"betas": betas, "eps": epsilons, "weight_decay": decays, "amsgrad": flags}),
    "nadam": (
        torch.optim.NAdam,
        {
            "betas": betas,
            "weight_decay": decays,
            "momentum_decay": st.sampled_from([0.0, 0.004, 0.1]),
            "decoupled_weight_decay": flags,
        },
    ),
    "radam": (torch.optim.RAdam, {"betas": betas, "weight_decay": decays, "decoupled_weight_decay": flags}),
    "adamax": (torch.optim.Adamax, {"betas": betas, "eps": epsilons, "weight_decay": decays}),
    "rprop": (
        torch.optim.Rprop,
        {"etas": st.sampled_from([(0.5, 1.2), (0.3, 1.5)]), "step_sizes": st.sampled_from([(1e-6, 50.0), (1e-3, 0.1)])},
    ),
}

wrappers = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.7, 0.9, 0.98]),
        "weight_decay_at_y": decays,
        "r": st.sampled_from([0.0, 1.5]),
        "weight_lr_power": st.sampled_from([0.0, 2.0]),
        "averaging_constant": st.sampled_from([None, 5.0, 50.0]),
    }
)


def weights() -> dict[str, Tensor]:
    """Weights of 200 elements in two groups."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("matrix", (7, 17)), ("vector", (81,)))}


def references_of(
    make: Callable[..., torch.optim.Optimizer], first: dict[str, Any], second: dict[str, Any], **options: Any
) -> dict[str, OverTorch]:
    """A reference for each tensor, with the hyperparameters of its group."""
    groups = {"default": first, "second": second}
    return {
        name: OverTorch(weight, partial(make, **groups[GROUPS[name]]), **options) for name, weight in weights().items()
    }


def compare(spec: dict[str, Any], second: dict[str, Any], references: dict[str, OverTorch], damped: bool) -> None:
    """Takes the same steps by the compiled rule, by torch's evaluation of it in fp64, and by the references."""
    flat = Flat(spec, second, weights())
    exact = Flat(spec, second, {name: weight.double() for name, weight in weights().items()})
    generator = torch.Generator().manual_seed(1)
    shapes = {name: each.x.shape for name, each in references.items()}
    gradients = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(STEPS)
    )
    step_together(flat, exact, references, gradients, damped)
    for name, each in references.items():
        for point, expected in (("x", each.x), ("y", each.y), ("z", each.z)):
            torch.testing.assert_close(exact.point(point)[name], expected, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(flat.point(point)[name], expected.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("algorithm", BASES)
def test_the_wrapper_is_schedule_free_over_torchs_optimizer(algorithm: str) -> None:
    make, strategies = BASES[algorithm]

    @STEADY
    @given(st.fixed_dictionaries(strategies), wrappers, rates, flags)
    def compared(base: dict[str, Any], wrapper: dict[str, Any], lr: float, damped: bool) -> None:
        spec = {"algorithm": "schedule_free_wrapper", "base": {"algorithm": algorithm, "lr": lr, **base}, **wrapper}
        options = {"beta" if name == "momentum" else name: value for name, value in wrapper.items()}
        options["decay_at_y"] = options.pop("weight_decay_at_y")
        first, second = {"lr": lr, **base}, {"lr": lr / 2, **base}
        compare(spec, {"base": {"lr": lr / 2}}, references_of(make, first, second, **options), damped)

    compared()


def test_a_nesterov_base_equals_torchs() -> None:
    base = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
    spec = {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "sgd", **base}}
    compare(spec, {}, references_of(torch.optim.SGD, base, base, beta=0.9), damped=True)


def test_primal_averaging_equals_the_papers() -> None:
    @STEADY
    @given(
        st.fixed_dictionaries({"lr": rates, "betas": betas, "eps": epsilons, "weight_decay": decays}),
        st.sampled_from([0.3, 0.7, 0.95]),
        st.sampled_from([0.0, 0.9, 0.9967]),
        flags,
    )
    def compared(adamw: dict[str, Any], mu_y: float, mu_x: float, damped: bool) -> None:
        spec = {"algorithm": "gpa_adamw", "mu_y": mu_y, "mu_x": mu_x, **adamw}
        second = {"lr": 0.001, "weight_decay": 0.0}
        references = references_of(torch.optim.AdamW, adamw, {**adamw, **second}, beta=mu_y, mu_x=mu_x)
        compare(spec, second, references, damped)

    compared()


def test_primal_averaging_over_sgd_equals_the_papers() -> None:
    @STEADY
    @given(
        st.fixed_dictionaries({"lr": rates, "weight_decay": decays}),
        st.sampled_from([0.3, 0.7, 0.95]),
        st.sampled_from([0.0, 0.9, 0.9967]),
        flags,
    )
    def compared(sgd: dict[str, Any], mu_y: float, mu_x: float, damped: bool) -> None:
        spec = {"algorithm": "gpa_sgd", "mu_y": mu_y, "mu_x": mu_x, **sgd}
        second = {"lr": 0.001, "weight_decay": 0.0}
        references = references_of(torch.optim.SGD, sgd, {**sgd, **second}, beta=mu_y, mu_x=mu_x)
        compare(spec, second, references, damped)

    compared()


def test_primal_averaging_with_one_weight_is_nesterov_momentum() -> None:
    """With the defaults of both, it equals DiLoCo's outer optimizer."""
    primal, nesterov = (Flat({"algorithm": name}, {}, weights()) for name in ("gpa_sgd", "diloco"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        gradients = {name: 0.1 * torch.randn(each.shape, generator=generator) for name, each in weights().items()}
        primal.step(gradients)
        nesterov.step(gradients)
        for name, y in nesterov.point("y").items():
            torch.testing.assert_close(primal.point("y")[name], y, rtol=1e-4, atol=2e-4)


PACKAGE = [
    ("sgd", torch.optim.SGD, {"lr": 0.02}),
    ("sgd", torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    ("adagrad", torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.01}),
]


@pytest.mark.parametrize("decay_at_y", [0.0, 0.1])
@pytest.mark.parametrize(("algorithm", "make", "base"), PACKAGE)
def test_x_and_y_equal_the_packages_wrappers(
    algorithm: str, make: type[torch.optim.Optimizer], base: dict[str, Any], decay_at_y: float
) -> None:
    """In fp64, for the bases that the package works with."""
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(200, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(initial.clone())
    options = {"momentum": 0.8, "weight_decay_at_y": decay_at_y, "r": 0.5, "weight_lr_power": 1.0}
    peer = schedulefree.ScheduleFreeWrapper(make([parameter], **base), **options)
    peer.train()
    spec = {"algorithm": "schedule_free_wrapper", "base": {"algorithm": algorithm, **base}, **options}
    flat = Flat(spec, {}, {"vector": initial})
    for number in range(1, STEPS + 1):
        gradient = torch.randn(200, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        peer.step()
        flat.step({"vector": gradient})
        if number in (1, 7, STEPS):
            torch.testing.assert_close(flat.point("y")["vector"], parameter.detach(), rtol=1e-9, atol=1e-11)
            peer.eval()
            torch.testing.assert_close(flat.point("x")["vector"], parameter.detach(), rtol=1e-9, atol=1e-11)
            peer.train()
