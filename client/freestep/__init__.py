"""freestep: Schedule-Free optimization as a service; the client."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from freestep.answers import Pulled, Snapshot
from freestep.api.models import AggregationSpec, Receipt, RunSpec, RunStatus
from freestep.client import Client
from freestep.errors import *  # noqa: F403
from freestep.errors import __all__ as _errors
from freestep.lease import Claim, HeldLease
from freestep.leaving import leave_on_sigterm
from freestep.run import Run

if TYPE_CHECKING:
    from freestep.batchnorm import reestimate_batchnorm
    from freestep.best_weights import BestWeights
    from freestep.closure_forms import AdamWScheduleFreeClosure, RAdamScheduleFreeClosure, SGDScheduleFreeClosure
    from freestep.drop_in import AdamCScheduleFreePlus, AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
    from freestep.encoders import Int8, Rounded, TopK
    from freestep.flat import Flat
    from freestep.local_steps import LocalSteps
    from freestep.optimizer import RemoteOptimizer
    from freestep.optimizer_states import export_state, import_state
    from freestep.region import Region
    from freestep.run_state import RunState
    from freestep.units import Units
    from freestep.wrapped_base import ScheduleFreeWrapper
else:
    # Imported when first used: torch takes seconds to import, and the control plane does not need it.
    _WITH_TORCH = {
        "AdamCScheduleFreePlus": "freestep.drop_in",
        "AdamWScheduleFree": "freestep.drop_in",
        "AdamWScheduleFreeClosure": "freestep.closure_forms",
        "BestWeights": "freestep.best_weights",
        "Flat": "freestep.flat",
        "Int8": "freestep.encoders",
        "LocalSteps": "freestep.local_steps",
        "RAdamScheduleFree": "freestep.drop_in",
        "RAdamScheduleFreeClosure": "freestep.closure_forms",
        "Region": "freestep.region",
        "RemoteOptimizer": "freestep.optimizer",
        "Rounded": "freestep.encoders",
        "RunState": "freestep.run_state",
        "SGDScheduleFree": "freestep.drop_in",
        "SGDScheduleFreeClosure": "freestep.closure_forms",
        "ScheduleFreeWrapper": "freestep.wrapped_base",
        "TopK": "freestep.encoders",
        "Units": "freestep.units",
        "reestimate_batchnorm": "freestep.batchnorm",
        "export_state": "freestep.optimizer_states",
        "import_state": "freestep.optimizer_states",
    }

    def __getattr__(name: str) -> Any:
        if name not in _WITH_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_WITH_TORCH[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.2.0"

__all__ = [
    "AdamCScheduleFreePlus",
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "AggregationSpec",
    "BestWeights",
    "Claim",
    "Client",
    "Flat",
    "HeldLease",
    "Int8",
    "LocalSteps",
    "Pulled",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "Receipt",
    "Region",
    "RemoteOptimizer",
    "Rounded",
    "Run",
    "RunSpec",
    "RunState",
    "RunStatus",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "ScheduleFreeWrapper",
    "Snapshot",
    "TopK",
    "Units",
    "__version__",
    "reestimate_batchnorm",
    "export_state",
    "import_state",
    "leave_on_sigterm",
    *_errors,
]
