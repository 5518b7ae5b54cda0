"""The method that hyperparameters select."""

from __future__ import annotations

from freestep.api import hyperparameters as specs
from freestep_service.optimizers.method import Method
from freestep_service.optimizers.methods import adamc, baselines, outer, schedule_free, wrapper

__all__ = ["method_of"]


def method_of(h: specs.OptimizerSpec) -> Method:
    """The method of a run's hyperparameters; those of its param groups select the same one."""
    match h:
        case specs.SGDScheduleFree():
            return schedule_free.SGD
        case specs.AdamWScheduleFree():
            return schedule_free.ADAMW_INNER_MOMENTUM if h.inner_momentum else schedule_free.ADAMW
        case specs.RAdamScheduleFree():
            return schedule_free.RADAM
        case specs.ScheduleFreeWrapper():
            return wrapper.wrapper_of(h)
        case specs.AdamCScheduleFreePlus():
            return adamc.ADAMC_PLUS
        case specs.GPAAdamW():
            return wrapper.GPA_ADAMW
        case specs.GPASGD():
            return wrapper.GPA_SGD
        case specs.SGD():
            return baselines.SGD if h.averaging.name == "none" else baselines.AVERAGED_SGD
        case specs.AdamW():
            return baselines.ADAMW if h.averaging.name == "none" else baselines.AVERAGED_ADAMW
        case specs.DiLoCo():
            return outer.NESTEROV if h.momentum_period == 1 else outer.DELAYED_NESTEROV
