"""Consistent reads in any order of requests, pushes, reports and losses: one place for a ticket, and bounded memory.

A place is an entry of the log at which every shard copies a point. Redis grants as many as all shards have memory for.
In every order: a ticket gets one place, the same for every shard that asks, and a log entry that names it; no more
places are open than there is memory for; and once readers have come, or their time is over, nobody waits any more.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from coordination.driven import DrivenRun, Driver
from machines import run_machine

PUSHES, PULLS, STATES = 4, 2, 1
"""Places that shards have memory for: for the answers of pushes, and for pulls; and the place of states."""
KEPT_MS = 30_000
"""For so long a place is kept for who does not come."""
STATE = "state F32"
POINTS = st.sampled_from(["y F32", "x F32", "y BF16"])


class Reads(RuleBasedStateMachine):
    """Calls to one run, beside a model of its tickets."""

    driver: ClassVar[Driver]
    shards: ClassVar[int]

    @initialize()
    def open(self) -> None:
        self.run = DrivenRun(self.driver, self.shards).open()
        self.lease = self.run.grant()
        self.tickets: dict[str, str] = {}
        """Every ticket, and what it asks for."""
        self.places: dict[str, int] = {}
        """The entry at which a ticket reads, once that is known."""
        self.unsent: dict[str, set[int]] = {}
        """The shards that have not sent a ticket's part."""

    def cuts(self) -> dict[str, Any]:
        found: Any = self.run.redis.hgetall(self.run.key("cuts"))
        return {ticket: json.loads(text) for ticket, text in found.items()}

    def learn(self) -> None:
        """What the log says of the tickets' places, as shards hear it."""
        for entry in self.run.entries():
            for ticket, wanted in (entry.get("cuts") or {}).items():
                assert wanted == self.tickets[ticket]
                assert self.places.setdefault(ticket, entry["seq"]) == entry["seq"], "a ticket has two places"

    def new_ticket(self, wanted: str) -> str:
        ticket = f"ticket-{len(self.tickets)}"
        self.tickets[ticket] = wanted
        self.unsent[ticket] = set(range(self.shards))
        return ticket

    def ask(self, ticket: str, shard: int) -> None:
        log, owner = self.run.coordinator.log, self.run.owner(shard)
        wanted, had_places = self.tickets[ticket], set(self.places)
        are_over = any(cut["seq"] and cut["ends"] <= self.now() for cut in self.cuts().values())
        kind: Literal["pull", "state"] = "state" if wanted == STATE else "pull"
        seq = self.run.do(log.request_read(owner, ticket, wanted, self.shards, kind))
        self.learn()
        assert seq == self.places.get(ticket, 0)
        if kind == "state":
            # Nobody else gets a place by it, but one whose time is over; and it waits nowhere.
            assert are_over or set(self.places) - had_places <= {ticket}
            assert seq or ticket not in self.cuts()

    @rule(wanted=POINTS, shard=st.integers(0, 2))
    def pull(self, wanted: str, shard: int) -> None:
        self.ask(self.new_ticket(wanted), shard % self.shards)

    @rule(shard=st.integers(0, 2))
    def export(self, shard: int) -> None:
        """It gets its place at once unless another has that."""
        is_taken = any(cut.get("kind") == "state" and cut["ends"] > self.now() for cut in self.cuts().values())
        ticket = self.new_ticket(STATE)
        self.ask(ticket, shard % self.shards)
        assert (ticket in self.places) != is_taken

    @precondition(lambda self: self.cuts())
    @rule(data=st.data(), shard=st.integers(0, 2))
    def ask_again(self, data: st.DataObject, shard: int) -> None:
        """Another shard is asked for its part, or the answer was lost."""
        self.ask(data.draw(st.sampled_from(sorted(self.cuts()))), shard % self.shards)

    @rule(wanted=st.one_of(st.none(), POINTS))
    def push(self, wanted: str | None) -> None:
        """wanted: what its answer is to hold, if it is not the receipt alone."""
        ticket = f"push-{len(self.run.entries())}-{len(self.tickets)}"
        if wanted is not None:
            self.tickets[ticket], self.unsent[ticket] = wanted, set(range(self.shards))
        claim = self.run.claim(self.lease, ticket)
        for shard in range(self.shards):
            self.run.admit(claim, shard)
        for shard in range(self.shards):
            self.run.commit_part(claim, shard, self.run.part(shard), wanted=wanted or "")

    @precondition(lambda self: any(self.unsent[ticket] for ticket in self.places))
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        """A shard has sent its part, or its reader is slow and counted apart."""
        ticket = data.draw(st.sampled_from(sorted(ticket for ticket in self.places if self.unsent[ticket])))
        self.unsent[ticket].discard(data.draw(st.sampled_from(sorted(self.unsent[ticket]))))
        self.run.do(self.run.coordinator.log.reads_sent([ticket]))

    @rule()
    def lose_patience(self) -> None:
        """Nobody comes for the places that were granted, for so long that they are given up."""
        for ticket, cut in self.cuts().items():
            cut["ends"] -= KEPT_MS
            self.run.redis.hset(self.run.key("cuts"), ticket, json.dumps(cut))
        for ticket in self.places:
            self.unsent[ticket].clear()

    @rule()
    def drain(self) -> None:
        """Readers come until nobody waits."""
        for _ in range(len(self.tickets) + 1):
            self.learn()
            for ticket in self.places:
                for _ in range(len(self.unsent[ticket])):
                    self.run.do(self.run.coordinator.log.reads_sent([ticket]))
                self.unsent[ticket].clear()
            for ticket in self.waiting():
                # Places whose time is over are given up when one who waits asks again.
                self.ask(ticket, 0)
        assert self.waiting() == []

    def now(self) -> float:
        seconds, microseconds = self.run.redis.time()  # type: ignore[misc]
        return 1000 * seconds + microseconds / 1000

    def waiting(self) -> list[str]:
        return [ticket for ticket, cut in self.cuts().items() if cut["seq"] == 0]

    @invariant()
    def no_more_places_are_open_than_there_is_memory_for(self) -> None:
        self.learn()
        open_places: dict[tuple[int, str], set[str]] = {}
        for cut in self.cuts().values():
            if cut["seq"] > 0:
                open_places.setdefault((cut["seq"], cut["point"]), set()).add(cut.get("kind", "pull"))
        pushes = sum("push" in kinds for kinds in open_places.values())
        states = sum("state" in kinds for kinds in open_places.values())
        assert states <= STATES
        assert len(open_places) - states <= PUSHES + PULLS
        assert pushes <= PUSHES + PULLS
        assert len(open_places) - pushes - states <= PULLS

    @invariant()
    def a_place_is_kept_until_every_shard_has_sent_its_part(self) -> None:
        cuts = self.cuts()
        for ticket in self.places:
            if len(self.unsent[ticket]) == self.shards and ticket in cuts:
                assert cuts[ticket]["seq"] == self.places[ticket]
        for ticket, cut in cuts.items():
            assert cut["left"] == len(self.unsent[ticket]) or not self.unsent[ticket]


@pytest.mark.parametrize("shards", [2, 3])
def test_reads_in_any_order(driver: Driver, shards: int) -> None:
    run_machine(Reads, 40, 30, driver=driver, shards=shards)
