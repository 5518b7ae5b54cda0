"""Imported by the process that tests fork: the modules of services and workers, and the compiled loops.

That process must have a single thread.
"""

from __future__ import annotations

import gc
import os

import torch

import freestep.cli
import freestep_service.server
from freestep_service.optimizers.readiness import compile_loops

__all__ = ["freestep", "freestep_service"]

compile_loops()
# The first optimizer of a process imports torch's compiler, which takes more than a second.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
# A process that looks for garbage among what all have in common gets copies of it.
gc.freeze()
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not forked"
