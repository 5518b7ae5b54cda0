"""A replica of torchft's DDP, a group of one rank: `python -m benchmarks.race.torchft_replica TOLD`.

It loses nothing by another's death but the step under way, and one that comes back gets its state from another.
"""

# DDP looks at the annotations of hooks, so they cannot be text.
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

from benchmarks.goodput.ledger import APPLIED, COMPUTED, Ledger
from benchmarks.race.device import Device
from benchmarks.race.looks import Album, moments, x_of
from benchmarks.race.told import Told

_TIMEOUT = timedelta(seconds=5)


def main() -> None:
    told = Told.parse(sys.argv[1])
    task, ledger = told.opened_task(), Ledger(told.place / "ledger")
    net = task.model(told.seed)
    inner = AdamWScheduleFree(net.parameters(), lr=told.lr)
    inner.train()

    def load_state(state: dict[str, Any]) -> None:
        net.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    # Its own store, for its one rank.
    store = TCPStore(told.address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=_TIMEOUT),
        load_state_dict=load_state,
        state_dict=lambda: {"model": net.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        timeout=_TIMEOUT,
        replica_id=f"replica-{told.number}",
        rank=0,
        world_size=1,
        store_addr=told.address,
        store_port=store.port,
        lighthouse_addr=f"http://{told.meeting}",
        hostname=told.address,
    )
    device = Device(0.0)
    counted = False

    class Replicas(DistributedDataParallel):  # type: ignore[misc]
        @staticmethod
        def _comm_hook(
            state: Any,
            bucket: distributed.GradBucket,  # type: ignore[name-defined]
        ) -> torch.futures.Future[Tensor]:
            is_in_time = device.wait()
            if counted:
                ledger.append(COMPUTED, told.number, int(is_in_time))
            # torchft 0.2.0's own hook hands on a future that is not there if a peer has died meanwhile, which ends the
            # process. The manager knows of that, and has the step left out.
            state.allreduce(bucket.buffer()).wait()
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

    replicas, optimizer = Replicas(manager, net), Optimizer(manager, inner)
    # The first pass takes longer than all others. It changes nothing, and asks nobody.
    task.loss(net, next(task.batches(told.seed, told.number, 0))).backward()  # type: ignore[no-untyped-call]
    began = told.wait_for_begin()
    device, counted = told.device(task, began), True
    album = Album(told.place, began, moments(told.seconds, told.look_s), since=time.monotonic() - began)
    has_state = False
    for pair in task.batches(told.seed, told.number, 0):
        # It begins the next quorum, too.
        optimizer.zero_grad()
        device.begin()
        task.loss(replicas, pair).backward()  # type: ignore[no-untyped-call]
        if has_state:
            album.take(lambda: x_of(net, inner))
        before = manager.current_step()
        optimizer.step()
        # A state that came from another is there since the step was agreed on.
        has_state = True
        if manager.current_step() > before:
            ledger.append(APPLIED, told.number, manager.current_step())


if __name__ == "__main__":
    main()
