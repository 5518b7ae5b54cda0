"""What an optimizer warns about, each once: what a user changes that the run replaces or does not take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from freestep.process_group import warn_of_ranks
from freestep.weights_guard import WeightsGuard

__all__ = ["Cautions"]

logger = logging.getLogger("freestep")


class Cautions:
    """The warnings of one optimizer.

    run: the run's name. groups: the param groups, with the run's hyperparameters, of these names. guard: compares the
    weights; None where somebody else may change them. of_ranks: whether ranks of torch.distributed are to be looked
    for.
    """

    def __init__(
        self,
        run: str,
        groups: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        guard: WeightsGuard | None,
        *,
        of_ranks: bool,
    ) -> None:
        self._run = run
        self._shown: list[dict[str, Any]] | None = [{name: group[name] for name in names} for group in groups]
        self._guard = guard
        self._of_ranks = of_ranks

    def before_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warns of other hyperparameters than the run's, and of ranks that push the same gradient."""
        if self._of_ranks:
            # Here, since frameworks join the ranks after the optimizer was made.
            self._of_ranks = False
            warn_of_ranks()
        for shown, group in zip(self._shown or (), groups, strict=False):
            for name, value in shown.items():
                if group.get(name) is not value and group.get(name) != value:
                    logger.warning(
                        "a param group's %s was set to %s, %sand has no effect: it is that of the run %s, whose "
                        "hyperparameters have its warmup and schedule, and `freestep set` changes them while it trains",
                        name, group.get(name), "by a scheduler perhaps, " if name == "lr" else "", self._run,
                    )  # fmt: skip
                    self._shown = None
                    return

    def before_load(self) -> None:
        """Warns of weights that were changed since they were loaded, and are to be replaced."""
        if self._guard is not None and (name := self._guard.changed()) is not None:
            logger.warning(
                "the parameter %r was changed outside the optimizer: the weights are those of the run %s, and the next "
                "y or x replaces them. Load pretrained weights before the optimizer is made; overwrite() makes the "
                "weights that the model contains the run's",
                name,
                self._run,
            )
            self._guard = None
