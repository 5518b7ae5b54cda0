"""A worker that trains until its input ends or it is killed.

python tests/dashboard/trainer.py RUN WORKER (JSON of RemoteOptimizer's options) [SECONDS BETWEEN STEPS]

It classifies random points, and says so once it has made its first step.
"""

from __future__ import annotations

import json
import sys
import threading
import zlib

import torch
from torch import nn

import freestep
from dashboard.points import INPUTS, LABELS, new_model

torch.set_num_threads(1)
run, worker, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.02
is_over = threading.Event()


def end_with_input() -> None:
    sys.stdin.read()
    is_over.set()


model = new_model()
optimizer = freestep.RemoteOptimizer(model, run=run, worker=worker, **options)
threading.Thread(target=end_with_input, daemon=True).start()
torch.manual_seed(zlib.crc32(worker.encode()))
has_begun = False
while not is_over.is_set():
    batch = torch.randint(len(INPUTS), (64,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(INPUTS[batch]), LABELS[batch])
    loss.backward()
    optimizer.step(loss=loss.detach(), samples=len(batch))
    if not has_begun:
        has_begun = True
        sys.stdout.write("trains\n")
        sys.stdout.flush()
    is_over.wait(pause)
optimizer.close()
