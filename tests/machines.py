"""State machines of hypothesis, run as tests: the same examples each time, however slow the machine."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

__all__ = ["run_machine"]


def run_machine(
    kind: type[RuleBasedStateMachine], examples: int, steps: int, *, shrinks: bool = True, **attributes: Any
) -> None:
    """attributes: of the class. shrinks: False where an example takes seconds, which shrinking repeats for minutes."""
    run_state_machine_as_test(
        type("Machine", (kind,), attributes),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
