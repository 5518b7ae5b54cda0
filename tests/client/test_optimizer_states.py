"""States of runs from local optimizers and into them: training that goes on elsewhere ends where it would have."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from freestep import InvalidSpec, ManifestMismatch, Run, RunState, export_state, import_state
from trained import network

FIRST, THEN = 6, 6
"""Steps before and after the move."""
BOUNDS = {"rtol": 1e-5, "atol": 1e-7}


@dataclass
class Kind:
    """A class of optimizers: how one is made of param groups, with an argument for each group."""

    make: Callable[[list[dict[str, Any]]], Any]
    own: dict[str, Any] = field(default_factory=lambda: {"lr": 0.02, "weight_decay": 0.1})
    """Of the second param group."""
    has_closure: bool = False


def schedule_free(name: str, **options: Any) -> Kind:
    def make(groups: list[dict[str, Any]]) -> Any:
        return getattr(schedulefree, name)(groups, **options)

    return Kind(make, has_closure=name.endswith("Closure"))


def wrapped(name: str, base: Callable[..., Any], **options: Any) -> Kind:
    def make(groups: list[dict[str, Any]]) -> Any:
        return getattr(schedulefree, name)(base(groups), momentum=0.8, weight_decay_at_y=0.05, **options)

    return Kind(make)


def torchs(name: str, *, own: dict[str, Any] | None = None, **options: Any) -> Kind:
    made = Kind(lambda groups: getattr(torch.optim, name)(groups, **options))
    return made if own is None else Kind(made.make, own)


AVERAGE = {"weight_decay": 0.05, "r": 1.0, "weight_lr_power": 1.5}
KINDS = {
    **{
        name: schedule_free(name, lr=0.05, momentum=0.8, warmup_steps=9, **AVERAGE)
        for name in ("SGDScheduleFree", "SGDScheduleFreeClosure", "SGDScheduleFreeReference")
    },
    **{
        name: schedule_free(name, lr=0.01, betas=(0.95, 0.99), warmup_steps=9, **AVERAGE)
        for name in ("AdamWScheduleFree", "AdamWScheduleFreeClosure")
    },
    "AdamWScheduleFreeReference": schedule_free(
        "AdamWScheduleFreeReference", lr=0.01, betas=(0.95, 0.99), decay_at_z=True, **AVERAGE
    ),
    **{
        name: schedule_free(name, lr=0.01, betas=(0.9, 0.9), silent_sgd_phase=silent, **AVERAGE)
        for name, silent in (("RAdamScheduleFree", True), ("RAdamScheduleFreeClosure", False))
    },
    "ScheduleFreeWrapper-SGD": wrapped(
        "ScheduleFreeWrapper", lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, dampening=0.3), r=1.0
    ),
    "ScheduleFreeWrapper-plain-SGD": wrapped("ScheduleFreeWrapper", lambda groups: torch.optim.SGD(groups, lr=0.05)),
    "ScheduleFreeWrapper-Adagrad": wrapped(
        "ScheduleFreeWrapper",
        lambda groups: torch.optim.Adagrad(groups, lr=0.05, lr_decay=0.01, initial_accumulator_value=0.2),
    ),
    "ScheduleFreeWrapperReference-SGD": wrapped(
        "ScheduleFreeWrapperReference", lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    ),
    "SGD": torchs("SGD", lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.05),
    "plain-SGD": torchs("SGD", lr=0.05),
    "nesterov-SGD": torchs("SGD", lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": torchs("AdamW", lr=0.01, weight_decay=0.2),
    "fused-AdamW": torchs("AdamW", lr=0.01, fused=True),
    "Adam": torchs("Adam", own={"lr": 0.02}, lr=0.01, betas=(0.8, 0.99)),
}


def optimizer_of(kind: str, model: nn.Module) -> Any:
    """An optimizer of a kind, in train mode, with the model's weights and biases in groups of their own."""
    weights = [each for each in model.parameters() if each.ndim == 2]
    biases = [each for each in model.parameters() if each.ndim == 1]
    made = KINDS[kind].make([{"params": weights}, {"params": biases, **KINDS[kind].own}])
    if hasattr(made, "train"):
        made.train()
    return made


def gradients(model: nn.Module, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}


def train(kind: str, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for number in range(first, last):

        def closure(number: int = number) -> float:
            for name, gradient in gradients(model, number).items():
                # A copy, since the package changes it.
                model.get_parameter(name).grad = gradient.clone()
            return 0.0

        if KINDS[kind].has_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def push(run: Run, model: nn.Module, first: int, last: int) -> None:
    step = run.status().step
    with run.lease() as lease:
        for number in range(first, last):
            step = run.push(gradients(model, number), lease.claim(step)).step


def x_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The average, after which the optimizer is in train mode again."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    x = {name: each.detach().clone() for name, each in model.named_parameters()}
    if hasattr(optimizer, "train"):
        optimizer.train()
    return x


def assert_same(run: Run, model: nn.Module, optimizer: Any) -> None:
    torch.testing.assert_close(run.pull("x")[0], x_of(model, optimizer), **BOUNDS)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_in_a_run(run: Run, kind: str, mode: str) -> None:
    model = network()
    optimizer = optimizer_of(kind, model)
    train(kind, model, optimizer, 0, FIRST)
    if mode == "eval" and hasattr(optimizer, "eval"):
        optimizer.eval()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    state = import_state(optimizer, model)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    run.import_state(state)
    if mode == "eval" and hasattr(optimizer, "train"):
        optimizer.train()
    assert_same(run, model, optimizer)
    train(kind, model, optimizer, FIRST, FIRST + THEN)
    push(run, model, FIRST, FIRST + THEN)
    assert_same(run, model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_in_a_local_optimizer(run: Run, kind: str) -> None:
    model = network()
    optimizer = optimizer_of(kind, model)
    run.import_state(import_state(optimizer, model))
    push(run, model, 0, FIRST)
    # What it did before is gone.
    train(kind, model, optimizer, 100, 103)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    export_state(run.export_state(), optimizer, model)
    assert_same(run, model, optimizer)
    push(run, model, FIRST, FIRST + THEN)
    train(kind, model, optimizer, FIRST, FIRST + THEN)
    assert_same(run, model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_no_step_is_that_of_a_new_optimizer(run: Run, kind: str) -> None:
    model, other = network(), network(1)
    state = import_state(optimizer_of(kind, model), model)
    assert state.step == 0
    optimizer = optimizer_of(kind, other)
    train(kind, other, optimizer, 50, 53)
    export_state(state, optimizer, other)
    run.import_state(state)
    train(kind, other, optimizer, 0, THEN)
    push(run, model, 0, THEN)
    assert_same(run, other, optimizer)


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "ScheduleFreeWrapper-SGD", "AdamW"])
def test_what_goes_out_and_in_again_is_the_same_to_the_bit(kind: str) -> None:
    model, other = network(), network(1)
    optimizer, again = optimizer_of(kind, model), optimizer_of(kind, other)
    train(kind, model, optimizer, 0, FIRST)
    export_state(import_state(optimizer, model), again, other)
    for each, one in ((model, optimizer), (other, again)):
        train(kind, each, one, FIRST, FIRST + THEN)
    assert all(torch.equal(model.get_parameter(name), each) for name, each in other.named_parameters())


def test_parameters_are_named_by_the_model_their_groups_or_numbers() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    assert list(import_state(torch.optim.SGD(model.parameters()), model).buffers["y"]) == names
    assert list(import_state(torch.optim.SGD(model.named_parameters())).buffers["y"]) == names
    numbered = import_state(torch.optim.SGD(model.parameters()))
    assert list(numbered.buffers["y"]) == [f"group0.{number}" for number in range(len(names))]
    with pytest.raises(ManifestMismatch, match="none of the model's"):
        import_state(torch.optim.SGD(model.parameters()), network())
    with pytest.raises(ManifestMismatch, match=r"has no parameter 'group0\.0' of the run"):
        export_state(numbered, torch.optim.SGD(model.parameters()), model)


def test_frozen_parameters_are_left_out_and_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    state = import_state(optimizer, model)
    assert "0.weight" not in state.buffers["z"]
    before = model[0].weight.clone()
    export_state(state, optimizer, model)
    assert torch.equal(model[0].weight, before)


def test_dynamic_subclasses_are_what_they_wrap() -> None:
    """As Lightning and Accelerate make them."""
    model = network()
    optimizer = optimizer_of("AdamW", model)
    optimizer.__class__ = type("Wrapped", (torch.optim.AdamW,), {"__module__": "lightning"})
    train("AdamW", model, optimizer, 0, 2)
    assert import_state(optimizer, model).step == 2


def test_narrow_parameters_are_widened() -> None:
    model = network().bfloat16()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = import_state(optimizer, model)
    assert {tensor.dtype for tensors in state.buffers.values() for tensor in tensors.values()} == {torch.float32}
    export_state(state, optimizer, model)
    assert optimizer.state[model[0].weight]["z"].dtype == torch.bfloat16


@pytest.mark.parametrize("rule", ["constant", "ahead"])
def test_y_that_was_formed_with_another_beta_is_formed_anew(run: Run, rule: str) -> None:
    """A run corrects for stale gradients by its β; the package's is constant."""
    model = network()
    correction = {"name": rule, "expected_staleness": 4.0}
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    state = import_state(optimizer, model)
    document = state.spec.model_dump(mode="json")
    document["optimizer"]["delay_correction"] = correction
    run.create(document)
    run.initialize(state.buffers["y"])
    push(run, model, 0, FIRST)
    exported = run.export_state()
    assert exported.scalars["default"]["beta"] != 0.9
    with pytest.raises(ManifestMismatch, match="constant staleness"):
        export_state(exported, optimizer, model)
    exported.spec = state.spec
    export_state(exported, optimizer, model)
    z = {name: optimizer.state[each]["z"] for name, each in model.named_parameters()}
    torch.testing.assert_close(z, run.pull("z")[0], **BOUNDS)
    assert_same(run, model, optimizer)


def refused(optimizer: Any, match: str, error: type[Exception] = ManifestMismatch, model: Any = None) -> None:
    with pytest.raises(error, match=match):
        import_state(optimizer, model)


def test_optimizers_that_a_run_has_no_place_for_are_refused() -> None:
    model = network()
    parameters = list(model.parameters())
    refused(torch.optim.RMSprop(parameters), r"no place for the state of RMSprop.*schedulefree's SGDScheduleFree")
    refused(schedulefree.AdamWScheduleFreePaper(parameters), "AdamWScheduleFreePaper")
    refused(object(), "no place for the state of object")
    refused(schedulefree.ScheduleFreeWrapper(torch.optim.RAdam(parameters)), "no place for the state of RAdam")
    refused(torch.optim.SGD(parameters, maximize=True), "negate the loss")
    refused(torch.optim.AdamW(parameters, amsgrad=True), "amsgrad")
    refused(torch.optim.Adam(parameters, weight_decay=0.1), "decoupled")
    refused(torch.optim.SGD(parameters, lr=1e13), "lr", InvalidSpec)
    adapting = schedulefree.ScheduleFreeWrapper(torch.optim.SGD([{"params": parameters, "d": 0.5}]))
    refused(adapting, "adapts its learning rate")
    uneven = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones_like(parameters[0])
    uneven.step()
    refused(uneven, "'0.bias' has taken 0 steps, and others of its group 1", model=model)
    refused(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex")
    assert import_state(torch.optim.Adam(parameters, decoupled_weight_decay=True, weight_decay=0.1)).step == 0


OTHERS: dict[str, tuple[Callable[[list[nn.Parameter]], Any], str]] = {
    "algorithm": (lambda each: schedulefree.RAdamScheduleFree(each), "the algorithm is adamw_schedule_free in the run"),
    "rate": (lambda each: schedulefree.AdamWScheduleFree(each, lr=0.5), "lr is 0.01 in the run, and 0.5"),
    "decay": (lambda each: schedulefree.AdamWScheduleFree(each, lr=0.01, weight_decay=0.3), "weight_decay is 0.0"),
    "betas": (lambda each: schedulefree.AdamWScheduleFree(each, lr=0.01, betas=(0.8, 0.999)), "betas"),
    "point-of-decay": (
        lambda each: schedulefree.AdamWScheduleFreeReference(each, lr=0.01, decay_at_z=True),
        "decay_at_z is False in the run",
    ),
}


def snapshot(model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}, optimizer.state_dict()


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_other_steps_is_refused_and_changes_nothing(other: str) -> None:
    model, elsewhere = network(), network(1)
    state = import_state(schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01), model)
    make, match = OTHERS[other]
    optimizer = make(list(elsewhere.parameters()))
    before = snapshot(elsewhere, optimizer)
    with pytest.raises(ManifestMismatch, match=match):
        export_state(state, optimizer, elsewhere)
    torch.testing.assert_close(snapshot(elsewhere, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"inner_momentum": 0.9}, "inner_momentum is 0.9 in the run"),
        ({"averaging_constant": 10.0}, "averaging_constant is 10.0 in the run"),
        ({"warmup_steps": 5}, "warmup_steps is 5 in the run"),
    ],
)
def test_what_the_package_does_not_have_is_refused(change: dict[str, Any], match: str) -> None:
    model = network()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    state = import_state(optimizer, model)
    state.spec = state.spec.model_copy(update={"optimizer": state.spec.optimizer.model_copy(update=change)})
    with pytest.raises(ManifestMismatch, match=match):
        export_state(state, optimizer, model)


def test_what_was_changed_while_the_run_trained_is_in_force(run: Run) -> None:
    """An optimizer with the rates that the run was created with would take other steps."""
    kind, model = "AdamWScheduleFree", network()
    optimizer = optimizer_of(kind, model)
    run.import_state(import_state(optimizer, model))
    push(run, model, 0, FIRST)
    groups = [parameter.group for parameter in run.status().spec.parameters]
    run.set(lr=0.2, groups={groups[-1]: {"weight_decay": 0.3}}, aggregation={"policy": "buffered", "batch": 1})
    push(run, model, FIRST, FIRST + 1)
    exported, before = run.export_state(), snapshot(model, optimizer)
    with pytest.raises(ManifestMismatch, match=r"lr is 0\.2 in the run, and 0\.01"):
        export_state(exported, optimizer, model)
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["weight_decay"] = 0.2, 0.3
    export_state(exported, optimizer, model)
    push(run, model, FIRST + 1, FIRST + THEN)
    train(kind, model, optimizer, FIRST + 1, FIRST + THEN)
    assert_same(run, model, optimizer)


def test_parameters_of_other_names_or_shapes_are_refused() -> None:
    model = network()
    state = import_state(schedulefree.SGDScheduleFree(model.parameters()), model)
    larger = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = schedulefree.SGDScheduleFree(larger.parameters())
    with pytest.raises(ManifestMismatch, match=r"the run has no parameter '3\.weight'"):
        export_state(state, optimizer, larger)
    wider = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(ManifestMismatch, match=r"'0.weight' has shape \[7, 6\], but the run's has \[5, 6\]"):
        export_state(state, schedulefree.SGDScheduleFree(wider.parameters()), wider)
    lacking = RunState(state.spec, 0, {"y": state.buffers["y"]}, state.scalars)
    with pytest.raises(ManifestMismatch, match="lacks the vectors z"):
        export_state(lacking, schedulefree.SGDScheduleFree(model.parameters()), model)


def test_a_run_that_clips_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = schedulefree.SGDScheduleFree(model.parameters())
    state = import_state(optimizer, model)
    clipping = state.spec.optimizer.model_copy(update={"max_grad_norm": 2.0})
    state.spec = state.spec.model_copy(update={"optimizer": clipping})
    with caplog.at_level(logging.WARNING, "freestep"):
        export_state(state, optimizer, model)
    assert "clip_grad_norm_" in caplog.text


def test_param_groups_may_be_cut_otherwise_where_they_step_alike() -> None:
    model = network()
    optimizer = schedulefree.SGDScheduleFree(
        [{"params": [each]} for each in model.parameters()], lr=0.1, weight_decay=0.2
    )
    one = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1, weight_decay=0.2)
    optimizer.train()
    train("SGDScheduleFree", model, optimizer, 0, 2)
    state = import_state(optimizer, model)
    export_state(state, one, model)
    assert one.param_groups[0]["k"] == 2
    state.scalars["group0"]["weight_sum"] = 5.0
    with pytest.raises(ManifestMismatch, match="several groups of the run, which differ"):
        export_state(state, one, model)
