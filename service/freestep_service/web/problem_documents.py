"""Refusals in the OpenAPI document: which of them an operation has, and what each looks like.

What raises a refusal declares it, once: an endpoint, what FastAPI injects into it, a function that it calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from inspect import cleandoc
from typing import Any, TypeVar

from freestep import errors
from freestep.errors import PROBLEMS, URN, ProblemError
from freestep_service.web.problems import MEDIA_TYPE, PLAIN, RETRY_AFTER_S, STATUSES

__all__ = ["EVERYWHERE", "declared", "problem_responses", "problem_schemas", "refuses"]

Problem = type[ProblemError]
Function = TypeVar("Function", bound=Callable[..., Any])

EVERYWHERE: frozenset[Problem] = frozenset(
    (errors.MalformedRequest, errors.RequestTimeout, errors.HeadersTooLarge, errors.ShardUnavailable)
)
"""What any request may be refused with: for its head, or because the service shuts down."""
_REFUSES = "_freestep_refuses"
_PLAIN = "PlainProblem"


def refuses(*causes: Problem | Callable[..., Any]) -> Callable[[Function], Function]:
    """Declares what a function may raise: problems, and what functions that it calls have declared."""
    found = [{each} if isinstance(each, type) else _declared_by(each) for each in causes]

    def mark(function: Function) -> Function:
        setattr(function, _REFUSES, _declared_by(function).union(*found))
        return function

    return mark


def declared(dependant: Any) -> frozenset[Problem]:
    """What an endpoint and all that FastAPI injects into it have declared, by FastAPI's `Dependant` of the endpoint."""
    return _declared_by(dependant.call).union(*map(declared, dependant.dependencies))


def _declared_by(function: Any) -> frozenset[Problem]:
    found: frozenset[Problem] = getattr(function, _REFUSES, frozenset())
    return found


def problem_responses(problems: Iterable[Problem]) -> dict[int | str, dict[str, Any]]:
    """The responses of an operation that may be refused with these, by status; and those of a service that fails."""
    by_status: defaultdict[int, list[Problem]] = defaultdict(list)
    for problem in sorted(problems, key=lambda each: each.slug):
        by_status[STATUSES[problem]].append(problem)
    made: dict[int | str, dict[str, Any]] = {status: _response(each) for status, each in sorted(by_status.items())}
    return made | {int(status): _content(status.phrase, _reference(_PLAIN)) for status in PLAIN}


def problem_schemas() -> dict[str, dict[str, Any]]:
    """A schema for each problem, by the name of its class, and one for those that their status describes fully."""
    plain = {"title": {"enum": [each.phrase for each in PLAIN]}, "status": {"enum": [int(each) for each in PLAIN]}}
    return {
        **{problem.__name__: _schema(problem) for problem in PROBLEMS.values()},
        _PLAIN: _object("A problem that its status describes fully.", {"type": {"const": "about:blank"}, **plain}),
    }


def _response(problems: list[Problem]) -> dict[str, Any]:
    """The response of a status that several problems may have."""
    references = {URN + each.slug: _reference(each.__name__) for each in problems}
    schema: dict[str, Any] = {
        "oneOf": list(references.values()),
        "discriminator": {"propertyName": "type", "mapping": {urn: each["$ref"] for urn, each in references.items()}},
    }
    answer = _content("; ".join(each.title for each in problems), schema)
    headers = [dict(_headers(each)) for each in problems]
    found = {name: header for each in headers for name, header in each.items()}
    for name, header in found.items():
        found[name] = {**header, "required": all(each.get(name, {}).get("required") for each in headers)}
    return answer | ({"headers": found} if found else {})


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}


def _reference(schema: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"}


def _headers(problem: Problem) -> Iterator[tuple[str, dict[str, Any]]]:
    """What headers `problems.problem_response` gives a problem."""
    if problem in RETRY_AFTER_S:
        schema = {"type": "integer", "minimum": 1}
        yield "Retry-After", {"description": "Seconds until a repetition.", "schema": schema, "required": True}
    if problem is errors.RangeNotSatisfiable:
        schema = {"type": "string", "pattern": r"^bytes \*/[0-9]+$"}
        yield "Content-Range", {"description": "The body's size.", "schema": schema, "required": True}
    if problem in (errors.Unauthenticated, errors.Forbidden):
        schema = {"type": "string", "pattern": '^Bearer realm="freestep"'}
        # Another token would not help against a foreign host or origin.
        is_always = problem is errors.Unauthenticated
        yield "WWW-Authenticate", {"description": "What is needed, RFC 6750.", "schema": schema, "required": is_always}


def _schema(problem: Problem) -> dict[str, Any]:
    fixed = {"type": URN + problem.slug, "title": problem.title, "status": STATUSES[problem]}
    members = {name: {"const": value} for name, value in fixed.items()}
    return _object(cleandoc(problem.__doc__ or ""), {**members, **_MEMBERS.get(problem, {})})


def _object(description: str, members: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "required": ["type", "title", "status", "detail"],
        "properties": {"detail": {"type": "string", "description": "What is wrong, for people."}, **members},
    }


_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}
_NAME = {"type": ["string", "null"]}
_FIELD = {**_TEXT, "description": "The field that is wrong, such as `optimizer.lr`, or a header's name."}
_FAULTS = {
    "type": "array",
    "items": {"type": "object", "required": ["field", "message"], "properties": {"field": _TEXT, "message": _TEXT}},
}
_RUN = {**_NAME, "description": "The run; null where the path names none."}
_SCOPE = {"enum": ["read", "push", "admin"], "description": "The scope that is needed."}

_MEMBERS: dict[Problem, dict[str, Any]] = {
    errors.MalformedRequest: {
        "field": _FIELD,
        "errors": _FAULTS,
        "shards": _NUMBER,
        "step": _NUMBER,
        "limit": _NUMBER,
    },
    errors.Unauthenticated: {"scope": _SCOPE, "run": _RUN},
    errors.Forbidden: {"scope": _SCOPE, "run": _RUN, "worker": _TEXT, "subject": _TEXT},
    errors.WorkerBanned: {"outliers": _NUMBER},
    errors.RunNotFound: {"run": _RUN},
    errors.CheckpointNotFound: {"step": _NUMBER},
    errors.RunExists: {
        "run": _RUN,
        "differences": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "wanted", "existing"],
                "properties": {"field": _TEXT, "wanted": {}, "existing": {}},
            },
        },
    },
    errors.EpochChanged: {"epoch": _NUMBER, "step": _NUMBER},
    errors.UnitNotHeld: {"units": {**_TEXT, "description": "Those units, as `Freestep-Units` names them."}},
    errors.BodyTooLarge: {"limit": _NUMBER},
    errors.RangeNotSatisfiable: {"size": _NUMBER},
    errors.InvalidSpec: {
        "field": _FIELD,
        "errors": _FAULTS,
        "needed_bytes": _NUMBER,
        "free_bytes": _NUMBER,
        "total_bytes": _NUMBER,
    },
    errors.MalformedTensors: {
        "encoding": _TEXT,
        "block": _TEXT,
        "limit": _NUMBER,
        "expected": _NUMBER,
        "received": _NUMBER,
    },
    errors.Overloaded: {"quota": _TEXT, "limit": _NUMBER, "used": _NUMBER},
    errors.NonFiniteGradient: {"norm": {"type": "number"}},
    errors.HeadersTooLarge: {"bytes": _NUMBER, "fields": _NUMBER},
    errors.ShardUnavailable: {
        "missing": {"type": "array", "items": _NUMBER, "description": "The shards without an owner."},
        "shards": _NUMBER,
        "problems": {"type": "object", "additionalProperties": _TEXT, "description": "Run -> what is wrong with it."},
    },
    errors.StepNotReached: {"epoch": _NUMBER, "step": _NUMBER},
}
"""What problem documents have beside the members of RFC 9457: the extensions that the problems are raised with."""
