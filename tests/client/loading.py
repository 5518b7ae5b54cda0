"""Trains from a DataLoader whose forked workers inherit the optimizer; arguments: URL, run.

In the workers, the data set asks the service through the client, and the optimizer is dropped. A thread of the parent
uses the client all the while, so that forks happen when locks are held. Prints a line for each fact.
"""

import gc
import sys
import threading

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from freestep import Client, RemoteOptimizer
from freestep.forks import ForkLock

# OpenMP's threads do not survive a fork.
torch.set_num_threads(1)
url, name = sys.argv[1:]
client = Client(url)
model = torch.nn.Linear(2, 1)
optimizer = RemoteOptimizer(model, client=client, run=name, worker="parent", aggregation="async", lr=0.1)
lock = ForkLock()


class Squares(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        assert get_worker_info() is not None
        with lock.held:
            # Raises unless the answer is of this request.
            assert client.run(name).status().run == name
        return torch.full((2,), float(index))


def drop_optimizer(_: int) -> None:
    del globals()["optimizer"]
    gc.collect()


over = threading.Event()


def beside() -> None:
    while not over.is_set():
        with lock.held:
            client.run(name).pull("x")


thread = threading.Thread(target=beside)
thread.start()
loader = DataLoader(
    Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork", worker_init_fn=drop_optimizer
)
for _ in range(3):
    for inputs in loader:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
over.set()
thread.join()
status = client.run(name).status()
sys.stdout.write(f"{status.step} {[worker.worker for worker in status.workers]} {status.epoch}\n")
sys.stdout.flush()
optimizer.close()
client.close()
