"""Forks children that pull through the client that their parent uses; arguments: URL, then names of runs.

Run i has a parameter w of ones times i. Prints a line for each process with what it has pulled, and one at the end.
"""

import os
import sys

import torch

from freestep import Client

# OpenMP's threads do not survive a fork.
torch.set_num_threads(1)

url, *names = sys.argv[1:]
client = Client(url)
lease = client.run(names[0]).lease("parent")
for name in names:
    client.run(name).pull("y")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def pulled(name: str) -> set[float]:
    return {client.run(name).pull("y")[0]["w"].unique().item() for _ in range(30)}


children = []
for number, name in enumerate(names):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, repr((number, pulled(name), client.run(name).status().run == name)).encode())
        lease.release()
        client.close()
        os._exit(0)
    os.close(write)
    children.append((child, read))
say(repr(("parent", pulled(names[-1]))))
for child, read in children:
    say(os.read(read, 1 << 16).decode())
    assert os.waitpid(child, 0)[1] == 0
say(client.run(names[0]).status().workers[0].worker)
lease.release()
client.close()
