"""A worker under faults, in a process of its own: pushes under one name until its stdin ends, and writes it all down.

Argument: JSON of the members that `main` reads. Each push has a coordinate of its own, which is its key as well. A push
is sent until it is answered for good: with a receipt, or with a refusal.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch

from chaos.history import Recorder, as_ranges

NAMES = ("a", "b", "c")
"""The run's tensors: of one length, so that each of three shards has one."""
_TIMEOUT_S = 1.5
_PATIENCE_S = 25.0
"""After which a push that nobody decides is stuck."""
_DATA, _UNITS = "train", 9
"""The run's data set, whose passes have no end, and the units of one."""
_CLAIMS = 5
"""How often a claim is sent that nobody answers."""
_MEDIA = "application/vnd.safetensors"


class Clients:
    """Calls of one client to a run, each written down."""

    def __init__(self, given: dict[str, Any], who: str) -> None:
        self.urls: list[str] = given["urls"]
        self.path = f"/v1/runs/{given['run']}"
        self.size: int = given["size"]
        self.scale: float = given["scale"]
        self.recorder = Recorder(Path(given["folder"], f"{who}.jsonl"), who)
        self.chance = random.Random(f"{given['seed']}/{who}")
        self.http = httpx.Client(timeout=_TIMEOUT_S, headers={"Authorization": f"Bearer {given['bearer']}"})

    def url(self) -> str:
        return self.chance.choice(self.urls) + self.path

    def lease(self, worker: str, ttl_ms: int) -> dict[str, Any] | None:
        call = self.recorder.begin("ask", worker=worker)
        try:
            answer = self.http.post(f"{self.url()}/leases", json={"worker": worker, "ttl_ms": ttl_ms})
        except httpx.TransportError:
            return None
        if answer.status_code != 201:
            return None
        lease = answer.json()
        told = {name: lease[name] for name in ("lease", "token", "epoch", "step")}
        self.recorder.write("granted", id=call, **told)
        return {"worker": worker, **told}

    def initialize(self) -> None:
        zeros = {name: torch.zeros(self.size) for name in NAMES}
        try:
            body = safetensors.torch.save(zeros)
            self.http.put(f"{self.url()}/parameters", content=body, headers={"Content-Type": _MEDIA})
        except httpx.TransportError:
            pass

    def pull(self, point: str = "y", url: str | None = None) -> tuple[int, int] | None:
        """Epoch and step of what was served, None if nothing was."""
        call = self.recorder.begin("pulling")
        try:
            answer = self.http.get(f"{url or self.url()}/parameters", params={"point": point})
        except httpx.TransportError:
            return None
        if answer.status_code != 200:
            return None
        tensors = safetensors.torch.load(answer.content)
        rows = torch.stack([tensors[name] for name in NAMES], 1)
        moved = rows.any(1).nonzero().flatten().tolist()
        whole = {index for index in moved if bool((rows[index] == self.scale).all())}
        odd = {index: rows[index].tolist() for index in moved if index not in whole}
        place = {"epoch": int(answer.headers["Freestep-Epoch"]), "step": int(answer.headers["Freestep-Step"])}
        value = [self.scale] * len(NAMES)
        self.recorder.write("pulled", id=call, **place, whole=as_ranges(whole), value=value, odd=odd)
        return place["epoch"], place["step"]

    def change(self, lr: float) -> None:
        """Sets the learning rate; its answer promises that it is in force, and stays so."""
        call = self.recorder.begin("changing", lr=lr)
        try:
            answer = self.http.patch(self.url(), json={"optimizer": {"lr": lr}})
        except httpx.TransportError:
            return
        if answer.status_code == 200:
            self.recorder.write("changed", id=call)

    def create_data(self) -> None:
        with suppress(httpx.TransportError):
            self.http.put(f"{self.url()}/data/{_DATA}", json={"length": _UNITS, "unit": 1, "passes": None})

    def claim(self, lease: dict[str, Any], count: int) -> tuple[list[int], bool]:
        """Units that the lease is handed out; whether the lease is still good, as far as is known."""
        headers = {**_holder(lease), "Idempotency-Key": secrets.token_hex(8)}
        call = self.recorder.begin("claiming", worker=lease["worker"], token=lease["token"])
        for _ in range(_CLAIMS):
            try:
                answer = self.http.post(f"{self.url()}/data/{_DATA}/units", json={"count": count}, headers=headers)
            except httpx.TransportError:
                continue
            if answer.status_code == 200:
                units = [each["unit"] for each in answer.json()["units"]]
                self.recorder.write("claimed", id=call, units=units)
                return units, True
            if answer.status_code == 404:
                self.create_data()
            elif answer.status_code in (409, 410):
                return [], False
        return [], True

    def give_back(self, lease: dict[str, Any]) -> None:
        with suppress(httpx.TransportError):
            self.http.delete(f"{self.url()}/data/{_DATA}/units", headers=_holder(lease))

    def data_counts(self) -> dict[str, Any] | None:
        """How much of which passes has counted, None if the service does not say."""
        try:
            answer = self.http.get(f"{self.url()}/data/{_DATA}")
        except httpx.TransportError:
            return None
        if answer.status_code != 200:
            return None
        status = answer.json()
        passes = [[each["pass"], each["done"]] for each in status["passes"]]
        return {"units": status["units"], "passes_done": status["passes_done"], "passes": passes}

    def checkpoint(self) -> None:
        """Asks for a checkpoint; its answer promises that it is kept."""
        try:
            answer = self.http.post(f"{self.url()}/checkpoints")
        except httpx.TransportError:
            return
        if answer.status_code == 201:
            made = answer.json()
            self.recorder.write("durable", epoch=made["epoch"], step=made["step"])

    def send(
        self, coordinate: int, lease: dict[str, Any], taken_at: int, units: list[int], part: int | None = None
    ) -> str:
        """One attempt at a push; how it ended: `receipt`, `refused` or `unknown`, and the reason."""
        names = NAMES if part is None else NAMES[part : part + 1]
        tensors = {name: torch.zeros(self.size) for name in names}
        for each in tensors.values():
            each[coordinate] = -1.0
        headers = {
            "Content-Type": _MEDIA,
            **_holder(lease),
            "Freestep-Step": str(taken_at),
            "Idempotency-Key": f"push-{coordinate}",
        }
        if units:
            headers["Freestep-Units"] = f"{_DATA}={','.join(map(str, units))}"
        claim = {"worker": lease["worker"], "token": lease["token"], "epoch": lease["epoch"], "taken_at": taken_at}
        claim["units"] = units
        call = self.recorder.begin("send", coordinate=coordinate, part=part, **claim)
        query = {} if part is None else {"shard": part, "of": len(NAMES)}
        body = safetensors.torch.save(tensors)
        try:
            answer = self.http.post(f"{self.url()}/gradients", params=query, content=body, headers=headers)
        except httpx.TransportError as error:
            self.recorder.write("unknown", id=call, reason=type(error).__name__)
            return "unknown"
        if answer.status_code == 200:
            receipt = answer.json()
            told = {name: receipt[name] for name in ("decision", "step", "staleness", "replayed")}
            self.recorder.write("receipt", id=call, **told)
            return "receipt"
        try:
            reason = answer.json()["type"].rpartition(":")[2]
        except (ValueError, KeyError):
            reason = str(answer.status_code)
        end = "refused" if 400 <= answer.status_code < 500 and answer.status_code != 429 else "unknown"
        self.recorder.write(end, id=call, reason=reason)
        return f"{end} {reason}"


def _holder(lease: dict[str, Any]) -> dict[str, str]:
    return {"Freestep-Lease": lease["lease"], "Freestep-Token": str(lease["token"])}


class Worker(Clients):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given, f"{given['worker']}-{given['first']}")
        self.given = given
        self.stopping = threading.Event()
        self.threads = ThreadPoolExecutor(6)

    def work(self) -> None:
        lease, seen = None, (0, 0)
        first, last = self.given["first"], self.given["last"]
        while not self.stopping.is_set() and first < last:
            lease = lease or self.lease(self.given["worker"], self.given["ttl_ms"])
            if lease is None:
                time.sleep(0.05)
                continue
            if self.chance.random() < 0.3:
                seen = self.pull(self.chance.choice("xy")) or seen
            if self.chance.random() < self.given["checkpoints"]:
                self.checkpoint()
            epoch, step = max(seen, (lease["epoch"], lease["step"]))
            # A step of a later epoch than the lease's cannot be claimed.
            step = step if epoch == lease["epoch"] else lease["step"]
            units, is_good = self.choose_units(lease)
            if not is_good:
                lease = None
                continue
            end = self.push_until_decided(first, lease, step, units)
            if end.startswith("refused"):
                lease = None
                if end.endswith("run-not-initialized"):
                    self.initialize()
            first += 1
            time.sleep(self.chance.uniform(0.0, self.given["pause_s"]))

    def choose_units(self, lease: dict[str, Any]) -> tuple[list[int], bool]:
        """Units for the next push, and whether the lease is still good; some are given back, some pushes have none."""
        if self.chance.random() < self.given["without_units"]:
            return [], True
        units, is_good = self.claim(lease, self.chance.randrange(1, 4))
        if units and self.chance.random() < 0.1:
            self.give_back(lease)
            units = []
        return units, is_good

    def push_until_decided(self, coordinate: int, lease: dict[str, Any], step: int, units: list[int]) -> str:
        begun = time.monotonic()
        while (end := self.attempt(coordinate, lease, step, units)).startswith("unknown"):
            if time.monotonic() - begun > _PATIENCE_S:
                self.recorder.write("stuck", what=f"push {coordinate} was not decided in {_PATIENCE_S:g} s: {end}")
                break
            time.sleep(self.chance.uniform(0.02, 0.1))
        return end

    def attempt(self, coordinate: int, lease: dict[str, Any], step: int, units: list[int]) -> str:
        """The push as a whole, or its parts at once; sometimes twice at once, or again after its receipt."""
        way = self.chance.random()
        if self.given["shards"] > 1 and way < 0.5:
            parts = list(range(len(NAMES)))
            self.chance.shuffle(parts)
            ends = self.together([(coordinate, lease, step, units, part) for part in parts])
            # What one part was refused with, another may not know yet.
            return ends[0] if len(set(ends)) == 1 else f"unknown {ends}"
        ends = self.together([(coordinate, lease, step, units)] * (2 if way > 0.9 else 1))
        if 0.7 < way < 0.9 and "receipt" in ends:
            self.send(coordinate, lease, step, units)
        return "receipt" if "receipt" in ends else ends[0] if len(set(ends)) == 1 else f"unknown {ends}"

    def together(self, calls: list[tuple[Any, ...]]) -> list[str]:
        return [each.result() for each in [self.threads.submit(self.send, *call) for call in calls]]


def main() -> None:
    worker = Worker(json.loads(sys.argv[1]))

    def listen() -> None:
        sys.stdin.read()
        worker.stopping.set()

    threading.Thread(target=listen, daemon=True).start()
    worker.work()
    os._exit(0)


if __name__ == "__main__":
    main()
