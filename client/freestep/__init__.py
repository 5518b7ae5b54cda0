"""freestep: Schedule-Free optimization as a service; the client."""

from freestep.api.models import AggregationSpec, Receipt, RunSpec, RunStatus
from freestep.client import Client, Pulled, Run
from freestep.encoders import Int8, Rounded, TopK
from freestep.errors import *  # noqa: F403
from freestep.errors import __all__ as _errors
from freestep.flat import Flat
from freestep.lease import Claim, HeldLease
from freestep.local_steps import LocalSteps
from freestep.optimizer import RemoteOptimizer

__version__ = "0.1.0"

__all__ = [
    "AggregationSpec",
    "Claim",
    "Client",
    "Flat",
    "HeldLease",
    "Int8",
    "LocalSteps",
    "Pulled",
    "Receipt",
    "RemoteOptimizer",
    "Rounded",
    "Run",
    "RunSpec",
    "RunStatus",
    "TopK",
    "__version__",
    *_errors,
]
