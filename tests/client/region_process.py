"""A region's process that is killed at its N-th call or save; test_region_kills.py runs it.

python tests/client/region_process.py URL NAME FILE N WHEN ENCODING: WHEN is `before` or `after` what the call does.

It prints what it has done: a line for each call, and "done" where a round has ended before the N-th.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from freestep import Region, Run
from freestep.region_place import PlaceFile
from region_sides import WHOLE, sides

torch.set_num_threads(1)
url, name, file, number, when, encoding = sys.argv[1:]
left = int(number)


def killed_at(kind: type, call: str) -> None:
    """Has a call of a class count, and the process end where it is the one that was named."""
    plain = getattr(kind, call)

    def counting(*given: Any, **options: Any) -> Any:
        global left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*given, **options)
        sys.stdout.write(f"{call}\n")
        sys.stdout.flush()
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, call, counting)


for call in ("lease", "exchange", "pull_into", "pause", "export_state", "import_state", "resume"):
    killed_at(Run, call)
killed_at(PlaceFile, "save")
with sides(url, name) as (run, parent):
    region = Region(run, parent, file, every=2, optimizer=WHOLE, aggregation={"policy": "async"},
                    push_encoding=encoding)  # fmt: skip
    region.finish()
sys.stdout.write("done\n")
