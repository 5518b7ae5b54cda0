"""A worker that pushes large bodies until it is killed; prints "shares memory" once it does."""

from __future__ import annotations

import sys

from freestep import Client, Flat

url, name = sys.argv[1:]
with Client(url) as client:
    run = client.run(name)
    gradient, into = Flat(run.manifest), Flat(run.manifest)
    with run.lease() as lease:
        step = lease.granted.step
        is_told = False
        while True:
            step = run.exchange(gradient, lease.claim(step), into)[1].step
            if run.shares_memory and not is_told:
                sys.stdout.write("shares memory\n")
                sys.stdout.flush()
                is_told = True
