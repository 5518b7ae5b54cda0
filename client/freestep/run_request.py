"""What a worker says of the run that it creates or joins; what it does not say is the run's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from freestep.api.differences import Difference
from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.models import DEFAULT_GROUP, AggregationSpec, RunSpec
from freestep.errors import InvalidSpec
from freestep.groups import LocalParameter, complete_hyperparameters, hyperparameter_values, nearest, validated

__all__ = ["DEFAULT_ALGORITHM", "RunRequest"]

_POLICIES: tuple[str, ...] = get_args(AggregationSpec.model_fields["policy"].annotation)

DEFAULT_ALGORITHM = "adamw_schedule_free"


@dataclass(frozen=True)
class RunRequest:
    """What a worker says of a run.

    algorithm: its name, or None. hyperparameters: those that were given. options: other members of the spec (of
    `aggregation`, also the policy's name or the document), None for those that were not given. aggregation: that of a
    new run where none was given.
    """

    algorithm: str | None
    hyperparameters: Mapping[str, Any]
    options: Mapping[str, Any]
    aggregation: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raises InvalidSpec for what no run can have, whatever its parameters are."""
        algorithm, completed = self._possible()
        given = {**self.options, "aggregation": self._aggregation()}
        validated(
            RunSpec,
            {
                "optimizer": {"algorithm": algorithm, **completed},
                # One that every algorithm can have.
                "parameters": [{"name": "any", "shape": [1, 1]}],
                **{name: value for name, value in given.items() if value is not None},
            },
        )

    def _possible(self) -> tuple[str, dict[str, Any]]:
        """An algorithm that has the hyperparameters that were given, and all of them."""
        choices = [self.algorithm] if self.algorithm else [DEFAULT_ALGORITHM, *ALGORITHMS]
        refusals = []
        for algorithm in choices:
            try:
                return algorithm, complete_hyperparameters(algorithm, self.hyperparameters)
            except InvalidSpec as error:
                refusals.append(error)
        raise refusals[0]

    def complete(self, run: RunSpec | None) -> tuple[str, dict[str, Any]]:
        """The algorithm, and all of its hyperparameters: as given, else the run's, else the defaults.

        Raises InvalidSpec.
        """
        algorithm = self.algorithm or (run.optimizer.algorithm if run else DEFAULT_ALGORITHM)
        completed = complete_hyperparameters(algorithm, self.hyperparameters)
        if run is not None and run.optimizer.algorithm == algorithm:
            given = {name: completed[name] for name in self.hyperparameters}
            completed = {**hyperparameter_values(run.optimizer), **given}
        return algorithm, completed

    def spec(self, groups: Sequence[dict[str, Any]], parameters: Iterable[LocalParameter]) -> RunSpec:
        """The spec of a new run; hyperparameters in which a group differs from the others are its own.

        Raises InvalidSpec.
        """
        algorithm, completed = self.complete(None)
        own = _own_hyperparameters(groups, completed)
        names = list(own)
        given = self._aggregation()
        options = {**self.options, "aggregation": self.aggregation if given is None else given}
        return validated(
            RunSpec,
            {
                "optimizer": {"algorithm": algorithm, **completed},
                "parameters": [
                    {"name": each.name, "shape": list(each.tensor.shape), "group": names[each.group]}
                    for each in parameters
                ],
                "groups": {} if own == {DEFAULT_GROUP: {}} else own,
                **{name: value for name, value in options.items() if value is not None},
            },
        )

    def _aggregation(self) -> Any:
        """As a document, or an AggregationSpec, or None. Raises InvalidSpec for a policy that there is not."""
        given = self.options.get("aggregation")
        document = {"policy": given} if isinstance(given, str) else given
        if isinstance(document, Mapping) and document.get("policy", _POLICIES[0]) not in _POLICIES:
            policy = document["policy"]
            raise InvalidSpec(
                f"unknown policy {policy!r}{nearest(str(policy), _POLICIES)}: must be one of {', '.join(_POLICIES)}",
                field="aggregation.policy",
            )
        return document

    def differences(
        self, groups: Sequence[dict[str, Any]], parameters: Sequence[LocalParameter], run: RunSpec
    ) -> list[Difference]:
        """What was given and is not so in the run, field by field; the number of shards, which can change, is left out.

        parameters: by the run's names.
        """
        found = list(self._option_differences(run))
        algorithm, completed = self.complete(run)
        if algorithm != run.optimizer.algorithm:
            return [Difference("algorithm", algorithm, run.optimizer.algorithm), *found]
        values = hyperparameter_values(run.optimizer)
        found += [
            Difference(name, completed[name], values[name])
            for name in self.hyperparameters
            if completed[name] != values[name]
        ]
        return [*found, *_group_differences(_own_hyperparameters(groups, completed), parameters, run)]

    def _option_differences(self, run: RunSpec) -> Iterator[Difference]:
        asked = {**self.options, "aggregation": self._aggregation()}
        if asked["aggregation"] is not None:
            asked["aggregation"] = validated(AggregationSpec, asked["aggregation"])
        for name, value in asked.items():
            existing = getattr(run, name)
            if name == "shards" or value is None or value == existing:
                continue
            if isinstance(value, AggregationSpec):
                value, existing = (
                    {"policy": each.policy} | each.model_dump(exclude_defaults=True) for each in (value, existing)
                )
            yield Difference(name, value, existing)


def _own_hyperparameters(groups: Sequence[dict[str, Any]], completed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the name of each param group, its hyperparameters that are not those of all."""
    made: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        name = group.get("name") or (DEFAULT_GROUP if len(groups) == 1 else f"group{number}")
        made[name] = {key: group[key] for key in completed if key != "max_grad_norm" and group[key] != completed[key]}
    return made


def _group_differences(
    own: Mapping[str, dict[str, Any]], parameters: Sequence[LocalParameter], run: RunSpec
) -> Iterator[Difference]:
    group_of = {parameter.name: parameter.group for parameter in run.parameters}
    for number, (name, given) in enumerate(own.items()):
        values = hyperparameter_values(run.optimizer.overruled(given)) if given else {}
        here = {group_of[each.name]: None for each in parameters if each.group == number}
        for existing in [hyperparameter_values(run.hyperparameters(group)) for group in here]:
            yield from (
                Difference(f"groups.{name}.{key}", values[key], existing[key])
                for key in given
                if values[key] != existing[key]
            )
