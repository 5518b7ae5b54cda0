"""How a worker goes on from a saved state, where its run has gone on, has gone back, or is gone."""

from __future__ import annotations

from typing import Literal, TypeAlias

from freestep.api.models import RunStatus
from freestep.errors import StateMismatch
from freestep.saved_state import SavedPlace

__all__ = ["OnMissing", "way_to_resume"]

OnMissing: TypeAlias = Literal["raise", "seed", "join"]


def way_to_resume(saved: SavedPlace, run: RunStatus | None, on_missing: OnMissing) -> Literal["seed", "join"]:
    """Whether the model's weights are to be made the run's (seed), or the run's newest y to be loaded (join).

    A run that others have begun anew, and trained, is joined: they have seeded it, or another training is there.
    Raises StateMismatch.

    run: as it is now.
    """
    step = run.step if run else 0
    is_gone = run is None or (None not in (saved.run_id, run.id) and saved.run_id != run.id)
    if not is_gone and step >= saved.step:
        return "join"
    if on_missing == "raise":
        what = "is gone, and the run of that name is another" if is_gone else "has gone back"
        raise StateMismatch(
            f"the state is of step {saved.step} of the run {saved.run!r}, which {what}, at step {step}. To start the "
            'run from the weights that the model contains now, make the optimizer with on_missing="seed"; to train on '
            'with the weights that the run has, with on_missing="join"'
        )
    return "seed" if on_missing == "seed" and (step == 0 or not is_gone) else "join"
