"""Specs: what is refused, and that it is named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import schedulefree
import torch
from pydantic import ValidationError

from forms import FORMS, own
from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.models import LeaseRequest, RunSpec
from freestep.api.validation import first_fault
from freestep.errors import PROBLEMS, ProblemError


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "optimizer": {"algorithm": "adamw_schedule_free"},
        "parameters": [{"name": "w", "shape": [2, 3]}, {"name": "b", "shape": []}],
        **changes,
    }


def optimizer(algorithm: str, **hyperparameters: Any) -> dict[str, Any]:
    return spec(optimizer={"algorithm": algorithm, **hyperparameters})


WRAPPED = optimizer("schedule_free_wrapper", base={"algorithm": "adam", "lr": 0.1, "betas": [0.8, 0.9]})

INVALID = [
    ("optimizer.algorithm", optimizer("adam_schedule_free")),
    ("optimizer.algorithm", spec(optimizer={"lr": 0.1})),
    ("optimizer.algorithm", spec(optimizer={"algorithm": ["sgd"]})),
    ("optimizer", spec(optimizer="sgd")),
    ("optimizer.lr", optimizer("adamw_schedule_free", lr=-0.1)),
    ("optimizer.lr", optimizer("adamw_schedule_free", lr="0.1")),
    ("optimizer.lr", optimizer("adamw_schedule_free", lr=True)),
    ("optimizer.lr", optimizer("sgd", lr=float("nan"))),
    ("optimizer.lr", optimizer("sgd", lr=float("inf"))),
    ("optimizer.learning_rate", optimizer("adamw_schedule_free", learning_rate=0.1)),
    ("optimizer.betas.0", optimizer("adamw_schedule_free", betas=[0.0, 0.999])),
    ("optimizer.betas.0", optimizer("adamw_schedule_free", betas=[1.0, 0.999])),
    ("optimizer.betas.1", optimizer("adamw_schedule_free", betas=[0.9, 1.0])),
    ("optimizer.betas.1", optimizer("adamw_schedule_free", betas=[0.9])),
    ("optimizer.betas.1", optimizer("radam_schedule_free", betas=[0.9, 0.0])),
    ("optimizer.lr", optimizer("sgd", lr=1.1e12)),
    ("optimizer.eps", optimizer("adamw", eps=0)),
    ("optimizer.eps", optimizer("adamw_schedule_free", eps=1e-31)),
    ("optimizer.betas.0", optimizer("adamw", betas=[float("nan"), 0.9])),
    ("optimizer.dampening", optimizer("sgd", dampening=-0.1)),
    ("optimizer.nesterov", optimizer("sgd", momentum=0.9, dampening=0.1, nesterov=True)),
    ("optimizer.nesterov", optimizer("sgd", momentum=0.9, nesterov=1)),
    ("optimizer.weight_decay", optimizer("sgd_schedule_free", weight_decay=-1)),
    ("optimizer.warmup_steps", optimizer("sgd_schedule_free", warmup_steps=1.5)),
    ("optimizer.warmup_steps", optimizer("radam_schedule_free", warmup_steps=5)),
    ("optimizer.warmup_steps", optimizer("sgd_schedule_free", warmup_steps=2**53)),
    ("optimizer.r", optimizer("sgd_schedule_free", r=-1)),
    ("optimizer.r", optimizer("adamw_schedule_free", r=10.5)),
    ("optimizer.weight_lr_power", optimizer("sgd_schedule_free", weight_lr_power=-1)),
    ("optimizer.weight_lr_power", optimizer("radam_schedule_free", weight_lr_power=11)),
    ("optimizer.momentum", optimizer("sgd_schedule_free", momentum=0)),
    ("optimizer.momentum", optimizer("sgd_schedule_free", momentum=1)),
    ("optimizer.momentum", optimizer("sgd", momentum=1)),
    ("optimizer.nesterov", optimizer("sgd", nesterov=True)),
    ("optimizer.silent_sgd_phase", optimizer("radam_schedule_free", silent_sgd_phase="no")),
    ("optimizer.averaging_constant", optimizer("sgd_schedule_free", averaging_constant=0)),
    (
        "optimizer.averaging_constant",
        optimizer("schedule_free_wrapper", base={"algorithm": "sgd"}, averaging_constant=-1),
    ),
    ("optimizer.inner_momentum", optimizer("adamw_schedule_free", inner_momentum=1)),
    ("optimizer.inner_momentum", optimizer("adamw_schedule_free", inner_momentum=-0.1)),
    ("optimizer.decay_at_z", optimizer("adamw_schedule_free", decay_at_z="yes")),
    ("optimizer.decay_at_z", optimizer("radam_schedule_free", decay_at_z=True)),
    ("optimizer.mu_x", optimizer("gpa_adamw", mu_x=1)),
    ("optimizer.mu_y", optimizer("gpa_adamw", mu_y=0)),
    ("optimizer.averaging", optimizer("gpa_adamw", averaging={"name": "ema"})),
    ("optimizer.schedule", optimizer("sgd", schedule="cosine")),
    ("optimizer.schedule.name", optimizer("sgd", schedule={"name": "exponential"})),
    ("optimizer.schedule.total_steps", optimizer("sgd", schedule={"name": "cosine"})),
    ("optimizer.schedule.total_steps", optimizer("sgd", schedule={"name": "linear", "total_steps": 0})),
    (
        "optimizer.schedule.total_steps",
        optimizer("adamw", schedule={"name": "linear", "warmup_steps": 5, "total_steps": 5}),
    ),
    ("optimizer.schedule.total_steps", optimizer("gpa_adamw", schedule={"name": "cosine", "total_steps": 1.5})),
    ("optimizer.schedule.end_factor", optimizer("sgd", schedule={"name": "cosine", "total_steps": 5, "end_factor": 2})),
    ("optimizer.schedule.cycle_steps", optimizer("sgd", schedule={"name": "cosine_restarts", "cycle_steps": 0})),
    (
        "optimizer.schedule.cycle_growth",
        optimizer("sgd", schedule={"name": "cosine_restarts", "cycle_steps": 9, "cycle_growth": 0}),
    ),
    ("optimizer.schedule.step_size", optimizer("sgd", schedule={"name": "step"})),
    ("optimizer.schedule.gamma", optimizer("sgd", schedule={"name": "step", "step_size": 9, "gamma": 1.1})),
    ("optimizer.schedule.total_steps", optimizer("sgd", schedule={"total_steps": 9})),
    ("optimizer.schedule.warmup_steps", optimizer("adamw", schedule={"warmup_steps": -1})),
    ("optimizer.averaging.name", optimizer("sgd", averaging={"name": "swa"})),
    ("optimizer.averaging.decay", optimizer("sgd", averaging={"name": "ema", "decay": 1})),
    ("optimizer.averaging.decay", optimizer("adamw", averaging={"name": "polyak", "decay": 0.9})),
    ("optimizer.averaging.start_step", optimizer("adamw", averaging={"name": "polyak", "start_step": -1})),
    ("optimizer.base", optimizer("schedule_free_wrapper")),
    ("optimizer.base", optimizer("schedule_free_wrapper", base="adam")),
    ("optimizer.base.algorithm", optimizer("schedule_free_wrapper", base={})),
    ("optimizer.base.algorithm", optimizer("schedule_free_wrapper", base={"algorithm": "lbfgs"})),
    ("optimizer.lr", optimizer("schedule_free_wrapper", base={"algorithm": "adam"}, lr=0.1)),
    ("optimizer.momentum", optimizer("schedule_free_wrapper", base={"algorithm": "adam"}, momentum=1)),
    (
        "optimizer.weight_decay_at_y",
        optimizer("schedule_free_wrapper", base={"algorithm": "adam"}, weight_decay_at_y=-1),
    ),
    *(
        (f"optimizer.base.{field}", optimizer("schedule_free_wrapper", base={"algorithm": algorithm, **members}))
        for algorithm, field, members in [
            ("sgd", "nesterov", {"nesterov": True}),
            ("sgd", "lr", {"lr": -1}),
            ("sgd", "maximize", {"maximize": True}),
            ("rmsprop", "alpha", {"alpha": 1}),
            ("rmsprop", "centered", {"centered": 1}),
            ("adagrad", "initial_accumulator_value", {"initial_accumulator_value": -1}),
            ("adagrad", "lr_decay", {"lr_decay": -1}),
            ("adam", "betas.1", {"betas": [0.9, 1]}),
            ("adam", "eps", {"eps": 0}),
            ("adamw", "decoupled_weight_decay", {"decoupled_weight_decay": True}),
            ("nadam", "momentum_decay", {"momentum_decay": -1}),
            ("radam", "betas.0", {"betas": [1, 0.9]}),
            ("adamax", "amsgrad", {"amsgrad": True}),
            ("rprop", "etas.0", {"etas": [1, 1.2]}),
            ("rprop", "etas.1", {"etas": [0.5, 1]}),
            ("rprop", "step_sizes", {"step_sizes": [2, 1]}),
            ("rprop", "weight_decay", {"weight_decay": 0.1}),
        ]
    ),
    ("optimizer.delay_correction.name", optimizer("sgd_schedule_free", delay_correction={"name": "some"})),
    ("optimizer.delay_correction.name", optimizer("sgd_schedule_free", delay_correction={})),
    ("optimizer.delay_correction", optimizer("sgd_schedule_free", delay_correction="auto")),
    *(
        (
            "optimizer.delay_correction.expected_staleness",
            optimizer("radam_schedule_free", delay_correction={"name": name, **staleness}),
        )
        for name, staleness in [
            ("constant", {}),
            ("constant", {"expected_staleness": -1}),
            ("constant", {"expected_staleness": float("nan")}),
            ("auto", {"expected_staleness": 3}),
            *(("ahead", {"expected_staleness": value}) for value in (-1, float("nan"), float("inf"), 2e12, "4", True)),
        ]
    ),
    (
        "optimizer.delay_correction",
        optimizer("sgd_schedule_free", momentum=0.69, delay_correction={"name": "auto"}),
    ),
    (
        "optimizer.delay_correction",
        optimizer("sgd_schedule_free", momentum=0.69, delay_correction={"name": "ahead"}),
    ),
    (
        "groups.slow.delay_correction",
        optimizer("adamw_schedule_free", delay_correction={"name": "auto"})
        | {"groups": {"slow": {"betas": [0.5, 0.9]}}},
    ),
    (
        "groups.slow.delay_correction",
        optimizer("adamw_schedule_free", delay_correction={"name": "ahead"})
        | {"groups": {"slow": {"betas": [0.5, 0.9]}}},
    ),
    (
        "optimizer.delay_correction.lookahead",
        optimizer("sgd_schedule_free", delay_correction={"name": "ahead", "lookahead": 2}),
    ),
    ("groups.slow.delay_correction", spec(groups={"slow": {"delay_correction": {"name": "auto"}}})),
    ("optimizer.delay_correction", optimizer("gpa_adamw", delay_correction={"name": "auto"})),
    ("optimizer.max_grad_norm", optimizer("adamw_schedule_free", max_grad_norm=0)),
    ("optimizer.max_grad_norm", optimizer("adamw_schedule_free", max_grad_norm=float("inf"))),
    ("aggregation.policy", spec(aggregation={"policy": "median"})),
    ("aggregation.batch", spec(aggregation={"policy": "quorum"})),
    ("aggregation.batch", spec(aggregation={"policy": "async", "batch": 0})),
    ("aggregation.max_staleness", spec(aggregation={"policy": "async", "max_staleness": -1})),
    ("aggregation.max_staleness", spec(aggregation={"policy": "async", "max_staleness": 2**53})),
    ("aggregation.staleness_damping", spec(aggregation={"policy": "async", "staleness_damping": "log"})),
    ("parameters", spec(parameters=[])),
    ("parameters.1.name", spec(parameters=[{"name": "w", "shape": [1]}, {"name": "w", "shape": [2]}])),
    ("parameters.0.name", spec(parameters=[{"name": "__metadata__", "shape": [1]}])),
    ("parameters.0.name", spec(parameters=[{"name": "", "shape": [1]}])),
    ("parameters.0.shape.0", spec(parameters=[{"name": "w", "shape": [-1]}])),
    ("parameters.0.shape.0", spec(parameters=[{"name": "w", "shape": [1.0]}])),
    ("parameters.0.group", spec(parameters=[{"name": "w", "shape": [1], "group": "other"}])),
    ("groups.slow.lr", spec(groups={"slow": {"lr": -1}})),
    ("groups.slow.momentum", spec(groups={"slow": {"momentum": 0.9}})),
    ("groups.slow.algorithm", spec(groups={"slow": {"algorithm": "sgd"}})),
    ("groups.slow.max_grad_norm", spec(groups={"slow": {"max_grad_norm": 1.0}})),
    ("groups.slow.inner_momentum", spec(groups={"slow": {"inner_momentum": 0.9}})),
    ("groups.slow.averaging", optimizer("sgd") | {"groups": {"slow": {"averaging": {"name": "ema"}}}}),
    ("groups.base.base.lr", WRAPPED | {"groups": {"base": {"base": {"lr": -1}}}}),
    ("groups.slow.base.algorithm", WRAPPED | {"groups": {"slow": {"base": {"algorithm": "sgd"}}}}),
    ("groups.slow.base", WRAPPED | {"groups": {"slow": {"base": {"amsgrad": True}}}}),
    ("groups.slow.base", WRAPPED | {"groups": {"slow": {"base": 3}}}),
    ("lease_ttl_ms", spec(lease_ttl_ms=1)),
    ("durability", spec(durability="disk")),
    ("shards", spec(shards=257)),
    ("optimiser", spec(optimiser={})),
]


@pytest.mark.parametrize(("field", "document"), INVALID)
def test_a_wrong_spec_names_its_field(field: str, document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate(document)
    assert field in [".".join(map(str, error["loc"])) for error in caught.value.errors()]


@pytest.mark.parametrize("form", FORMS)
def test_a_spec_survives_json(form: str) -> None:
    made = RunSpec.model_validate(spec(optimizer=FORMS[form], groups={"slow": own(form, lr=0.001, weight_decay=0.5)}))
    assert RunSpec.model_validate_json(made.model_dump_json()) == made


PACKAGES = {
    "sgd_schedule_free": schedulefree.SGDScheduleFree,
    # Which has decay_at_z too.
    "adamw_schedule_free": schedulefree.AdamWScheduleFreeReference,
    "radam_schedule_free": schedulefree.RAdamScheduleFree,
    "schedule_free_wrapper": schedulefree.ScheduleFreeWrapper,
    "gpa_adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}


OURS_ALONE = {
    *("algorithm", "max_grad_norm", "schedule", "averaging"),
    *("averaging_constant", "delay_correction", "inner_momentum", "mu_x", "mu_y"),
}


@pytest.mark.parametrize("algorithm", PACKAGES)
def test_defaults_are_the_packages(algorithm: str) -> None:
    package = inspect.signature(PACKAGES[algorithm]).parameters
    # The package's wrapper leaves warmup to whoever sets the base's learning rate.
    wrapped = {"base", "warmup_steps"} if algorithm == "schedule_free_wrapper" else set()
    base = {"base": {"algorithm": "sgd"}} if wrapped else {}
    ours = ALGORITHMS[algorithm].model_validate(base).model_dump(exclude=OURS_ALONE | wrapped)
    assert ours == {name: package[name].default for name in ours}


BASES = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "rprop": torch.optim.Rprop,
}
HOW = {"params", "foreach", "fused", "capturable", "differentiable", "maximize"}


@pytest.mark.parametrize("algorithm", BASES)
def test_a_bases_hyperparameters_are_torchs(algorithm: str) -> None:
    document = optimizer("schedule_free_wrapper", base={"algorithm": algorithm})
    ours = RunSpec.model_validate(document).optimizer.model_dump()["base"]
    theirs = inspect.signature(BASES[algorithm]).parameters
    assert ours == {"algorithm": algorithm, **{name: theirs[name].default for name in theirs if name not in HOW}}


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (spec(groups={"layer.0": {"betas": [0.9, 2]}}), ("groups", "layer.0", "betas", 1)),
        (spec(parameters=[{"name": "w", "shape": [1], "group": "layer.0"}]), ("parameters", 0, "group")),
    ],
)
def test_a_field_is_named_by_its_parts(document: dict[str, Any], place: tuple[str | int, ...]) -> None:
    """A dot in a group's name is no separator."""
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate(document)
    assert [error["loc"] for error in caught.value.errors()] == [place]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_bounds_belong_to_the_range(algorithm: str) -> None:
    bounds = {"lr": 1e12, "weight_decay": 0, "r": 10, "weight_lr_power": 10, "eps": 1e-30, "warmup_steps": 2**53 - 1}
    allowed = {name: value for name, value in bounds.items() if name in ALGORITHMS[algorithm].model_fields}
    base = {"base": {"algorithm": "adam", "lr": 1e12, "eps": 1e-30}} if algorithm == "schedule_free_wrapper" else {}
    made = RunSpec.model_validate(optimizer(algorithm, **allowed, **base)).optimizer.model_dump()
    assert {name: made[name] for name in allowed} == allowed


def test_a_group_has_the_runs_hyperparameters_and_its_own() -> None:
    made = RunSpec.model_validate(
        optimizer("adamw_schedule_free", lr=0.1, eps=1e-6) | {"groups": {"slow": {"lr": 0.01, "betas": [0.8, 0.9]}}}
    )
    slow = made.hyperparameters("slow").model_dump()
    assert (slow["lr"], slow["eps"], slow["betas"]) == (0.01, 1e-6, (0.8, 0.9))
    assert made.hyperparameters("default") == made.optimizer


def test_a_group_overrules_its_base_member_by_member() -> None:
    made = RunSpec.model_validate(WRAPPED | {"groups": {"slow": {"momentum": 0.5, "base": {"lr": 0.01}}}})
    slow = made.hyperparameters("slow").model_dump()
    assert (slow["momentum"], slow["base"]["lr"], slow["base"]["betas"]) == (0.5, 0.01, (0.8, 0.9))


def test_a_groups_schedule_takes_the_place_of_the_runs() -> None:
    document = optimizer("sgd", schedule={"name": "cosine", "total_steps": 9}) | {
        "groups": {"slow": {"schedule": {"warmup_steps": 3}}}
    }
    slow = RunSpec.model_validate(document).hyperparameters("slow").model_dump()
    assert slow["schedule"] == {"name": "constant", "warmup_steps": 3}


def test_a_name_that_a_document_has_no_field_of_is_told_in_plain_words() -> None:
    with pytest.raises(ValidationError) as refusal:
        LeaseRequest.model_validate({"worker": "w", "ttl": 3})
    assert first_fault(refusal.value) == (("ttl",), "there is no such field")


@pytest.mark.parametrize("wish", [{}, {"worker": ""}, {"worker": "w" * 201}, {"worker": "w", "ttl_ms": 1}])
def test_a_wrong_lease_request_is_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LeaseRequest.model_validate(wish)


@pytest.mark.parametrize("slug", PROBLEMS)
def test_a_problem_survives_its_document(slug: str) -> None:
    problem = PROBLEMS[slug]("what was wrong", field="lr", step=7)
    document = problem.to_document(499)
    assert document["type"] == f"urn:freestep:problem:{slug}"
    assert document["title"] == problem.title
    read = ProblemError.from_document(document)
    assert type(read) is PROBLEMS[slug]
    assert (read.detail, read.extensions) == ("what was wrong", {"field": "lr", "step": 7})


def test_a_strangers_problem_is_none_of_ours() -> None:
    assert ProblemError.from_document({"type": "about:blank", "title": "Not Found"}) is None
    assert ProblemError.from_document({}) is None
