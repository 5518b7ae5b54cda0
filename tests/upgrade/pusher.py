"""A worker that counts, in a process of its own and in whichever version PYTHONPATH leads to.

python tests/upgrade/pusher.py URL RUN WORKER

It pushes -1 for every element again and again until its stdin has a line, and writes a line after each: the step that
the push was applied at. Every push is repeated under its key until it is decided, whatever becomes of its lease.
"""

from __future__ import annotations

import json
import select
import sys

import torch

import freestep
from freestep import EpochChanged, LeaseExpired

torch.set_num_threads(1)
url, name, worker = sys.argv[1:]
with freestep.Client(url, retry_for=100) as client:
    run = client.run(name)
    spec = run.status().spec
    gradient = {each.name: -torch.ones(each.shape) for each in spec.parameters}
    lease = run.lease(worker, ttl_ms=60_000)
    while not select.select([sys.stdin], [], [], 0)[0]:
        claim = lease.claim(run.status().step)
        try:
            receipt = run.push(gradient, claim)
        except (EpochChanged, LeaseExpired):
            # Nothing was applied.
            lease.release()
            lease = run.lease(worker, ttl_ms=60_000)
            continue
        sys.stdout.write(json.dumps([receipt.decision, receipt.step]) + "\n")
        sys.stdout.flush()
    lease.release()
