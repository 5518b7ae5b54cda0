"""Hooks of schemathesis: the bodies of tensors that it sends, and the runs that it makes for them."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation.meta import TestPhase

from freestep.wire.receiver import MEDIA_TYPE
from plain_calls import BODY, TENSORS

SPEC = {
    "optimizer": {"algorithm": "sgd_schedule_free", "lr": 0.5},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()],
}
"""Of runs whose tensors the bodies are."""

# Three of four bodies are a run's tensors: else hardly a run would ever get its weights.
schemathesis.openapi.media_type(MEDIA_TYPE, st.sampled_from([BODY] * 3 + [BODY[:-1], b"", bytes(64)]))


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Along links, requests are such that what follows can succeed. No stream goes on for as long as it is read."""
    if case.operation.definition.raw["operationId"] == "read_events" and (case.query or {}).get("follow", "true") in (
        True,
        "true",
    ):
        case.query = {**(case.query or {}), "follow": "false"}
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive:
        return
    case.body = _with_plain_integers(case.body)
    if meta.phase.name is TestPhase.STATEFUL:
        match case.operation.definition.raw["operationId"]:
            case "create_run":
                case.body = SPEC
            case "grant_lease":
                # Else it might end before it is used.
                case.body = {"worker": case.body["worker"]}
            case "create_token":
                # Likewise.
                case.body = {name: value for name, value in case.body.items() if name != "expires_in"}
            case "push":
                case.query = {}


def _with_plain_integers(value: Any) -> Any:
    """JSON Schema takes 1.0 for an integer, and the service takes integers as they are usually written."""
    if isinstance(value, dict):
        return {name: _with_plain_integers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_plain_integers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
