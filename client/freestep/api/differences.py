"""What differs between the spec that is wanted of a run and the one that the run has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freestep.api.spec import ParameterSpec, RunSpec

__all__ = ["Difference", "SpecDifferences"]

_MOST = 10
"""How many of each kind are named."""
_KINDS = ("algorithm", "name")
"""Members that say what the others of their object mean: where they differ, the others are not compared."""


@dataclass(frozen=True)
class Difference:
    """A field of a spec, or a parameter, with its two values as in JSON; None where one of the specs has none."""

    field: str
    wanted: Any
    existing: Any

    def __str__(self) -> str:
        return f"{self.field} is {_shown(self.existing)}, and {_shown(self.wanted)} is wanted"


@dataclass(frozen=True)
class SpecDifferences:
    """The differences of two specs by kind; none of any kind where the specs are equal.

    fields: of all but the parameters. extra, missing: parameters that only the wanted spec, or only the run, has.
    changed: parameters of another shape or group. order: the names from the first one that stands elsewhere on.
    """

    fields: Sequence[Difference]
    extra: Sequence[Difference]
    missing: Sequence[Difference]
    changed: Sequence[Difference]
    order: Sequence[Difference]

    @classmethod
    def of(cls, wanted: RunSpec, existing: RunSpec) -> SpecDifferences:
        """Compares two specs."""
        ours, theirs = ({each.name: _parameter(each) for each in spec.parameters} for spec in (wanted, existing))
        extra = [Difference(f"parameters.{name}", ours[name], None) for name in ours if name not in theirs]
        missing = [Difference(f"parameters.{name}", None, theirs[name]) for name in theirs if name not in ours]
        changed = [
            Difference(f"parameters.{name}", ours[name], theirs[name])
            for name in ours
            if name in theirs and ours[name] != theirs[name]
        ]
        order = [] if extra or missing or list(ours) == list(theirs) else [_order(list(ours), list(theirs))]
        documents = (spec.model_dump(mode="json", exclude={"parameters"}) for spec in (wanted, existing))
        return cls(list(_compared("", *documents)), extra, missing, changed, order)

    def listed(self) -> list[dict[str, Any]]:
        """The first ten of each kind, as JSON objects: `field`, `wanted`, `existing`."""
        kinds = (self.fields, self.extra, self.missing, self.changed, self.order)
        return [vars(each).copy() for kind in kinds for each in kind[:_MOST]]

    def __str__(self) -> str:
        """The same as text."""
        said = [str(each) for each in self.fields[:_MOST]] + _more(self.fields)
        for verb, kind in (("lacks", self.extra), ("also has", self.missing)):
            if kind:
                names = [_named(each) for each in kind[:_MOST]] + _more(kind)
                said.append(f"the run {verb} the parameters {', '.join(names)}")
        said += [str(each) for each in self.changed[:_MOST]] + _more(self.changed)
        said += [f"the order of the {each}" for each in self.order]
        return "; ".join(said)


def _parameter(parameter: ParameterSpec) -> dict[str, Any]:
    return {"shape": list(parameter.shape), "group": parameter.group}


def _order(ours: Sequence[str], theirs: Sequence[str]) -> Difference:
    begin = next(index for index, name in enumerate(ours) if theirs[index] != name)
    return Difference("parameters", ours[begin : begin + _MOST], theirs[begin : begin + _MOST])


def _compared(path: str, wanted: Mapping[str, Any], existing: Mapping[str, Any]) -> Iterator[Difference]:
    for kind in _KINDS:
        if kind in wanted and kind in existing and wanted[kind] != existing[kind]:
            yield Difference(path + kind, wanted[kind], existing[kind])
            return
    for name in dict.fromkeys([*wanted, *existing]):
        ours, theirs = wanted.get(name), existing.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _compared(f"{path}{name}.", ours, theirs)
        elif ours != theirs or (name in wanted) != (name in existing):
            yield Difference(path + name, ours, theirs)


def _named(difference: Difference) -> str:
    name = difference.field.partition(".")[2]
    return f"{name!r} {(difference.wanted or difference.existing)['shape']}"


def _more(kind: Sequence[Difference]) -> list[str]:
    return [f"and {len(kind) - _MOST} more"] if len(kind) > _MOST else []


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
