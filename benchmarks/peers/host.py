"""The process of a peer's worker: `python -m benchmarks.peers.host NAME PARAMETERS`.

It prints `ready`, and for each line that it reads makes an exchange and prints the seconds it took. What comes back is
held against the optimizer's own y, of the first elements; a peer that returns anything else is not measured.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from benchmarks.peers import OURS, PEERS
from benchmarks.peers.held import Held

_COMPARED = 1000
_RTOL, _ATOL = 1e-3, 1e-6
"""Hundreds of steps in fp32 come to this where operations are in another order."""


def main() -> None:
    name, parameters = sys.argv[1], int(sys.argv[2])
    # What a peer prints must not be taken for figures.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    gradient = torch.empty(parameters).normal_(generator=torch.Generator().manual_seed(0))
    expected = Held(min(parameters, _COMPARED))
    peer = (OURS | PEERS)[name].make()
    peer.setup(parameters)
    print("ready", file=answers)
    for _ in sys.stdin:
        began = time.perf_counter()
        y = peer.exchange(gradient)
        seconds = time.perf_counter() - began
        expected.step(gradient[:_COMPARED].clone())
        torch.testing.assert_close(y[:_COMPARED], expected.y, rtol=_RTOL, atol=_ATOL)
        print(seconds, file=answers)
    peer.close()
    # Some peers leave threads behind that would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
