"""What is changed of a run, as it is asked for, kept and put in force."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from freestep.api.bases import BaseAdamW
from freestep.api.control import ControlRequest, RunControl, changed, in_force
from freestep.api.models import RunSpec
from freestep.api.schedules import Cosine, Ema, InverseSqrt
from freestep.errors import IdempotencyConflict
from freestep_service.domain.control import Control, ControlChange, Orders
from run_specs import HYPERPARAMETERS, POLICIES, run_specs, wishes_for

STEADY = settings(
    derandomize=True, deadline=None, database=None, max_examples=20, suppress_health_check=list(HealthCheck)
)
SPEC = RunSpec.model_validate(
    {
        "optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.1, "betas": [0.9, 0.99]},
        "parameters": [{"name": "w", "shape": [2], "group": "own"}],
        "groups": {"own": {"lr": 0.2}},
    }
)


def after(control: Control, key: str = "", **wish: Any) -> Control:
    return control.after(SPEC, ControlRequest(**wish), key)


def test_what_is_kept_is_what_differs() -> None:
    control = after(Control(), optimizer={"lr": 0.5, "betas": [0.9, 0.99]}, groups={"own": {"eps": 1e-6}})
    assert (control.optimizer, control.groups) == ({"lr": 0.5}, {"own": {"lr": 0.2, "eps": 1e-6}})
    spec = control.in_force(SPEC)
    assert spec.hyperparameters("own").model_dump()["lr"] == 0.2
    assert spec.hyperparameters("default").model_dump()["lr"] == 0.5
    back = after(control, optimizer={"lr": 0.1}, groups={"own": {"eps": 1e-8}})
    assert back.groups == {"own": {"lr": 0.2, "eps": 1e-8}}
    assert after(Control(), optimizer={"lr": 0.1}) == Control()
    assert not Control()
    assert Control().in_force(SPEC) is SPEC


def test_of_a_groups_documents_the_named_members_change() -> None:
    """Also of those that are the run's so far: an unnamed `schedule` would be another, `constant`."""
    spec = RunSpec.model_validate(
        {
            "optimizer": {
                "algorithm": "adamw",
                "schedule": {"name": "cosine", "total_steps": 90},
                "averaging": {"name": "ema", "decay": 0.9},
            },
            "parameters": [{"name": "w", "shape": [2], "group": "own"}],
            "groups": {"own": {"lr": 0.2}},
        }
    )

    def own(control: Control) -> Any:
        return control.in_force(spec).hyperparameters("own")

    warm = Control().after(spec, ControlRequest(groups={"own": {"schedule": {"warmup_steps": 9}}}), "")
    assert own(warm).schedule == Cosine(total_steps=90, warmup_steps=9)
    # From then on it is the group's.
    longer = warm.after(spec, ControlRequest(optimizer={"schedule": {"total_steps": 100}}), "")
    assert own(longer).schedule == own(warm).schedule
    assert longer.in_force(spec).hyperparameters("default").schedule == Cosine(total_steps=100)
    ended = longer.after(spec, ControlRequest(groups={"own": {"schedule": {"end_factor": 0.5}}}), "")
    assert own(ended).schedule == Cosine(total_steps=90, warmup_steps=9, end_factor=0.5)
    slower = ended.after(spec, ControlRequest(groups={"own": {"averaging": {"decay": 0.99}}}), "")
    assert (own(slower).averaging, own(slower).lr) == (Ema(decay=0.99), 0.2)
    other = slower.after(spec, ControlRequest(groups={"own": {"schedule": {"name": "inverse_sqrt"}}}), "")
    assert own(other).schedule == InverseSqrt()


def test_of_a_groups_base_the_rest_goes_on_being_the_runs() -> None:
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "adamw", "lr": 0.1}},
            "parameters": [{"name": "w", "shape": [2], "group": "own"}],
            "groups": {"own": {}},
        }
    )
    control = Control().after(spec, ControlRequest(groups={"own": {"base": {"weight_decay": 0.5}}}), "")
    control = control.after(spec, ControlRequest(optimizer={"base": {"lr": 0.2}}), "")
    assert control.in_force(spec).hyperparameters("own").base == BaseAdamW(lr=0.2, weight_decay=0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("algorithm", HYPERPARAMETERS)
def test_what_is_kept_is_what_was_asked_for(algorithm: str, policy: str) -> None:
    """However many changes there were, and through the text that Redis, journals and checkpoints have."""

    @STEADY
    @given(data=st.data(), document=run_specs(algorithm, policy))
    def kept(data: st.DataObject, document: dict[str, Any]) -> None:
        spec = RunSpec.model_validate(document)
        control, model = Control(), RunControl()
        for number in range(data.draw(st.integers(1, 5))):
            wish = ControlRequest(**data.draw(st.sampled_from(wishes_for(spec))))
            model = changed(spec, model, wish)
            control = control.after(spec, wish, f"key-{number}")
            written = json.loads(json.dumps(control.members()))
            assert Control.of_member(written.get("control", {})) == control
            assert Control.parse(control.text, control.orders) == control
            assert control.in_force(spec) == in_force(spec, model)
            assert control.after(spec, wish, f"key-{number}") == control
            # Another spec is the same, and nothing but what may be changed differs.
            assert spec.model_copy(update={name: getattr(control.in_force(spec), name) for name in _CHANGED}) == (
                control.in_force(spec)
            )

    kept()


_CHANGED = ("optimizer", "groups", "aggregation")


def test_of_a_param_group_that_there_is_not_those_are_named_that_there_are() -> None:
    with pytest.raises(ValidationError, match="there is no such param group: the run has default, own"):
        after(Control(), groups={"bias": {"lr": 0.5}})


def test_a_key_that_comes_again_changes_nothing() -> None:
    first = after(Control(), "one", optimizer={"lr": 0.5})
    second = after(first, "two", optimizer={"lr": 0.25})
    assert after(second, "one", optimizer={"lr": 0.5}) == second
    with pytest.raises(IdempotencyConflict):
        after(second, "one", optimizer={"lr": 0.75})
    for number in range(64):
        second = after(second, f"more-{number}", optimizer={"lr": 1.0 + number})
    assert len(second.answered) == 64
    assert after(second, "one", optimizer={"lr": 0.5}).optimizer == {"lr": 0.5}


def test_a_new_policy_begins_with_its_own_values() -> None:
    gathered = after(Control(), aggregation={"policy": "buffered", "batch": 4, "max_staleness": 9})
    assert gathered.aggregation == {"policy": "buffered", "batch": 4, "max_staleness": 9}
    assert after(gathered, aggregation={"policy": "async"}).aggregation == {"policy": "async"}
    assert after(gathered, aggregation={"batch": 2}).aggregation == {
        "policy": "buffered",
        "batch": 2,
        "max_staleness": 9,
    }
    with pytest.raises(ValidationError, match="needs a batch"):
        after(gathered, aggregation={"policy": "quorum"})


def test_how_a_run_is_operated_is_no_part_of_what_it_computes() -> None:
    paused = after(Control(), paused=True)
    assert paused.text == "" and paused.orders.paused and paused.members()
    change = ControlChange.of(
        {"worker": "w", "until": "1700000000000", "at": "1600000000000", "asked": "{}", "by": "me"}
    )
    suspended = change.after(paused)
    assert suspended.orders == Orders(True, {"w": 1_700_000_000_000})
    seen = suspended.as_seen(1_699_999_999_000)
    assert (seen.paused, seen.suspended) == (True, {"w": 1000})
    assert suspended.as_seen(1_700_000_000_000).suspended == {}
    # A change of anything else leaves who is suspended.
    lr = after(suspended, optimizer={"lr": 0.5})
    entry = ControlChange.of({"text": lr.text, "paused": "1", "asked": "{}", "by": "me"})
    assert entry.after(suspended) == lr
    assert Orders.of({}) == Orders.of({"paused": "0", "suspended": ""}) == Orders()


def test_nobody_is_remembered_whose_time_is_over() -> None:
    """Else a run whose workers have ever new names would remember them all."""

    def told(control: Control, worker: str, at: int, until: int) -> Control:
        member = {"worker": worker, "until": str(until), "at": str(at), "asked": "{}", "by": "me"}
        return ControlChange.of(member).after(control)

    control = told(told(Control(), "short", 1000, 2000), "long", 1500, 9000)
    assert control.orders.suspended == {"short": 2000, "long": 9000}
    control = told(control, "other", 2000, 3000)
    assert control.orders.suspended == {"long": 9000, "other": 3000}
    # A refusal that is lifted is over at once.
    assert told(control, "long", 2500, 2500).orders.suspended == {"other": 3000}
