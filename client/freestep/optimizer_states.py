"""States of runs from optimizers that run in the process, and into them.

The optimizers are those of `schedulefree` (SGD, AdamW and RAdam, their closure and reference forms, and the wrapper
over SGD or Adagrad) and SGD, Adam and AdamW of `torch.optim`. Both keep what a run keeps, under the same names; a run's
y is where the package's parameters are in train mode.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freestep.api.control import in_force
from freestep.api.delay import Ahead, Steady
from freestep.api.hyperparameters import OptimizerSpec, ScheduleFree
from freestep.errors import ManifestMismatch
from freestep.local_optimizers import LocalOptimizer, Member
from freestep.run_state import RunState

__all__ = ["export_state", "import_state"]

logger = logging.getLogger("freestep")

_OF_RUNS = {"max_grad_norm", "delay_correction"}
"""Hyperparameters that no local optimizer has; `_require_same_steps` looks at them."""


@torch.no_grad()
def import_state(optimizer: Any, model: nn.Module | None = None) -> RunState:
    """Makes a run's state from a local optimizer, which stays as it is.

    Frozen parameters are left out, and so are buffers of the model. torch's SGD does not count its steps: the state is
    then of step 1, or of step 0 before the first step and without momentum. The spec has the defaults of aggregation,
    durability and shards; replace `state.spec` for others.

    Example:
        >>> optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.0025)
        >>> client.run("mnist").import_state(freestep.import_state(optimizer, model))

    Args:
        optimizer: Of `schedulefree`, in train or eval mode, or of `torch.optim`: see the module's documentation.
        model: Names the parameters, as `RemoteOptimizer` does. None takes the names in the param groups, or numbers.

    Raises:
        ManifestMismatch: The optimizer's class, an option or its state has no counterpart in a run.
        InvalidSpec: A hyperparameter is out of the range that runs accept.
    """
    local = LocalOptimizer(optimizer, model)
    names = ("y", "z", *local.vectors) if local.form.averages else ("y", *local.vectors)
    buffers: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    scalars: dict[str, dict[str, float]] = {}
    group_of = {parameter.name: parameter.group for parameter in local.spec.parameters}
    for group, members in local.groups():
        k = _steps(local, group, members)
        scalars[group_of[members[0].name]] = _scalars(local, group, k)
        for member in members:
            kept = local.state_of(member.tensor)
            for name, value in _points(local, member, kept).items():
                buffers[name][member.name] = value
            for name in local.vectors:
                # Adagrad begins its sum with a value that a run adds in its first step.
                is_zero = not k or kept.get(name) is None
                buffers[name][member.name] = torch.zeros_like(member.tensor) if is_zero else kept[name]
    return RunState(local.spec, max(int(each["k"]) for each in scalars.values()), buffers, scalars)


def _points(local: LocalOptimizer, member: Member, kept: Mapping[str, Any]) -> dict[str, Tensor]:
    """y of a parameter, and z where the optimizer averages, in fp32."""
    here = member.tensor.detach().float()
    if not local.form.averages:
        return {"y": here}
    if "z" not in kept:
        # It has not taken a step: all points are the initial weights.
        return {"y": here, "z": here}
    z = kept["z"].to(here.device).float()
    if local.form.keeps_points:
        return {"y": kept["y"].float(), "z": z}
    return {"y": here if local.is_at_y(member.group) else here.lerp(z, 1 - local.beta(member.group)), "z": z}


def _steps(local: LocalOptimizer, group: Mapping[str, Any], members: list[Member]) -> int:
    """The number of steps that a param group has taken; torch's SGD does not count beyond the first."""
    if local.form.averages:
        return int(group.get("k", 0))
    kept = {member.name: local.state_of(member.tensor) for member in members}
    if local.form.algorithm == "sgd":
        steps = {name: int(each.get("momentum_buffer") is not None) for name, each in kept.items()}
        # Without dampening the first gradient enters the buffer as the others do.
        matters = group["dampening"] != 0
    else:
        steps = {name: int(each.get("step", 0)) for name, each in kept.items()}
        matters = True
    if matters and len(set(steps.values())) > 1:
        few = min(steps, key=lambda name: steps[name])
        raise ManifestMismatch(
            f"the parameter {few!r} has taken {steps[few]} steps, and others of its group {max(steps.values())}: in a "
            "run all take the same"
        )
    return max(steps.values())


def _scalars(local: LocalOptimizer, group: Mapping[str, Any], k: int) -> dict[str, float]:
    """A param group's scalars as a run has them."""
    if not local.form.averages:
        return {"k": k}
    lr_max, weight_sum = float(group.get("lr_max", -1.0)), float(group.get("weight_sum", 0.0))
    average = local.optimizer if local.is_wrapper else None
    r, power = (average.r, average.weight_lr_power) if average is not None else (group["r"], group["weight_lr_power"])
    # Of the last step, which the correction for stale gradients begins with.
    c = min(k**r * lr_max**power / weight_sum, 1.0) if weight_sum else 1.0
    return {"k": k, "weight_sum": weight_sum, "lr_max": lr_max, "c": float(c)}


@torch.no_grad()
def export_state(state: RunState, optimizer: Any, model: nn.Module | None = None) -> None:
    """Loads a run's state into a local optimizer and its parameters, which are then at y, in train mode.

    Parameters of the closure forms are at x, as between their steps. Nothing is changed if an error is raised.

    Example:
        >>> optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.0025)
        >>> freestep.export_state(client.run("mnist").export_state(), optimizer, model)

    Args:
        state: From `Run.export_state` or `RunState.load`.
        optimizer: Of the run's algorithm and of the hyperparameters that are in force in the state, with what was
            changed while the run trained: see the module's documentation.
        model: Names the parameters; None takes the names in the param groups, or numbers.

    Raises:
        ManifestMismatch: Parameters, algorithm or hyperparameters differ, or the run has something that the optimizer
            has no place for.
    """
    local = LocalOptimizer(optimizer, model)
    _require_same_parameters(state, local)
    scalars = _require_same_steps(state, local)
    for (group, members), common in zip(local.groups(), scalars, strict=True):
        for member in members:
            _load_member(state, local, member, common)
        if local.form.averages:
            group.update(k=int(common["k"]), weight_sum=common["weight_sum"], lr_max=common["lr_max"])
            if not (local.form.rests_at_x or local.is_wrapper):
                group["train_mode"] = True
    if local.is_wrapper:
        optimizer.train_mode = True


def _require_same_parameters(state: RunState, local: LocalOptimizer) -> None:
    theirs = {parameter.name: tuple(parameter.shape) for parameter in state.spec.parameters}
    ours = {member.name: tuple(member.tensor.shape) for member in local.members}
    for name in [*theirs, *ours]:
        if name not in ours:
            raise ManifestMismatch(f"the optimizer has no parameter {name!r} of the run: it has {', '.join(ours)}")
        if name not in theirs:
            raise ManifestMismatch(f"the run has no parameter {name!r} of the optimizer")
        if theirs[name] != ours[name]:
            raise ManifestMismatch(
                f"the parameter {name!r} has shape {list(ours[name])}, but the run's has {list(theirs[name])}"
            )


def _require_same_steps(state: RunState, local: LocalOptimizer) -> list[Mapping[str, float]]:
    """The scalars of each param group that has parameters. Raises ManifestMismatch where the steps would differ."""
    # Of which a local optimizer has no part.
    control = state.control.model_copy(update={"aggregation": {}})
    spec = in_force(state.spec, control)
    group_of = {parameter.name: parameter.group for parameter in state.spec.parameters}
    own_group_of = {parameter.name: parameter.group for parameter in local.spec.parameters}
    for theirs, ours in {(group_of[name], own_group_of[name]): name for name in group_of}:
        differing = _differences(spec.hyperparameters(theirs), local.spec.hyperparameters(ours))
        if differing:
            raise ManifestMismatch(f"the steps of the run's param group {theirs!r} would be others: {differing}")
    needed = [*local.vectors, "y", *(["z"] if local.form.averages else [])]
    if lacking := [name for name in needed if name not in state.buffers]:
        raise ManifestMismatch(f"the state lacks the vectors {', '.join(lacking)}")
    run = spec.optimizer
    if run.max_grad_norm is not None:
        logger.warning(
            "the run clips gradients to a norm of %g (max_grad_norm), and the optimizer does not: call "
            "torch.nn.utils.clip_grad_norm_ before each step",
            run.max_grad_norm,
        )
    found: list[Mapping[str, float]] = []
    for _, members in local.groups():
        each = [state.scalars[group_of[member.name]] for member in members]
        if any(scalars != each[0] for scalars in each):
            raise ManifestMismatch("parameters of one param group are in several groups of the run, which differ")
        found.append(each[0])
    return found


def _differences(theirs: OptimizerSpec, ours: OptimizerSpec) -> str:
    """What differs between a run's hyperparameters and an optimizer's, for a message."""
    if theirs.algorithm != ours.algorithm:
        return f"the algorithm is {theirs.algorithm} in the run, and {ours.algorithm} in the optimizer"
    correction = theirs.delay_correction if isinstance(theirs, ScheduleFree) else None
    if isinstance(correction, Steady | Ahead) and correction.expected_staleness is not None:
        return "the run corrects for a constant staleness (delay_correction), which the optimizer does not"
    run, own = (each.model_dump(exclude=_OF_RUNS) for each in (theirs, ours))
    differing = [f"{name} is {run[name]} in the run, and {own[name]} in the optimizer" for name in run
                 if run[name] != own[name]]  # fmt: skip
    return "; ".join(differing)


def _load_member(state: RunState, local: LocalOptimizer, member: Member, scalars: Mapping[str, float]) -> None:
    """Loads one parameter and what the optimizer keeps of it, in place of what it kept."""
    tensor = member.tensor

    def like(value: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.preserve_format, requires_grad=False).copy_(value)

    vectors = {name: tensors[member.name] for name, tensors in state.buffers.items()}
    kept: dict[str, Tensor] = {}
    k, y = int(scalars["k"]), vectors["y"]
    if local.form.averages:
        z, beta = vectors["z"], local.beta(member.group)
        formed_with = scalars.get("beta", beta)
        x = y.lerp(z, 1 - 1 / formed_with)
        if formed_with != beta:
            # The run has formed y with another β, for stale gradients.
            y = x.lerp(z, 1 - beta)
        kept |= {"z": like(z), "x": like(x), "y": like(y)} if local.form.keeps_points else {"z": like(z)}
        tensor.copy_(x if local.form.rests_at_x else y)
    else:
        tensor.copy_(y)
    if k or (local.form.averages and local.base is None):
        kept |= {name: like(vectors[name]) for name in local.vectors}
    elif "sum" in local.vectors:
        # Which a run adds in its first step.
        kept["sum"] = torch.full_like(tensor, member.group["initial_accumulator_value"])
    local.optimizer.state[tensor] = {**kept, **_counted(local, member, k)}


def _counted(local: LocalOptimizer, member: Member, k: int) -> dict[str, Tensor]:
    """The number of steps as torch keeps it of a parameter, where it does."""
    form = local.base or local.form
    if form.averages or form.algorithm == "sgd" or (not k and local.base is None):
        return {}
    device = member.tensor.device if member.group.get("capturable") or member.group.get("fused") else "cpu"
    return {"step": torch.tensor(float(k), dtype=torch.float32, device=device)}
