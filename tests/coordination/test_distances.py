"""The exchange of distances between pushes, in a real Redis: who is told what, and what is fenced off."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from coordination.driven import DrivenRun, Driver
from freestep_service.domain.distances import part_of, summed
from freestep_service.domain.records import Behind, Fenced, LogPosition, RunState
from machines import run_machine

Make = Callable[..., DrivenRun]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PARTS = [numbers(0.1, 1e300, 5e-324), numbers(0.2, -0.0, 1e-30), numbers(0.3, 1.0, 2.0)]
SUM = PARTS[0] + PARTS[1] + PARTS[2]


def report(run: DrivenRun, shard: int, seq: int, part: Tensor | None = None, **changes: Any) -> Tensor | None:
    owner = run.owner(shard)._replace(**changes)
    return run.do(run.log.report_distances(owner, seq, PARTS[shard] if part is None else part))


@pytest.fixture
def three(make_run: Make) -> DrivenRun:
    """A run of three shards with five entries in its log."""
    run = make_run(3).open()
    for _ in range(5):
        run.do(run.log.mark_checkpoint(run.owner()))
    run.position = LogPosition(1, 5)
    return run


@contextmanager
def heard(run: DrivenRun) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What was said in the run's channel since the last call."""
    with run.redis.pubsub() as channel:
        channel.subscribe(run.key("messages"))
        assert channel.get_message(timeout=10)["type"] == "subscribe"

        def said() -> list[dict[str, Any]]:
            # A message of the test's own is behind all others.
            run.redis.publish(run.key("messages"), "null")
            messages = []
            while (message := channel.get_message(timeout=10)) is None or message["data"] != "null":
                messages += [] if message is None else [json.loads(message["data"])]
            return messages

        yield said


def test_parts_travel_with_all_their_bits() -> None:
    for part in (*PARTS, numbers(), numbers(float("inf"))):
        assert torch.equal(summed(part_of(part)), part)
    assert torch.equal(summed(" ".join(map(part_of, PARTS))), SUM)
    # Of one push there are no distances.
    assert summed(" ".join([part_of(numbers())] * 3)).shape == (0,)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_sum_does_not_depend_on_who_reports_first(three: DrivenRun, order: tuple[int, ...]) -> None:
    with heard(three) as said:
        *early, last = order
        for shard in early:
            assert report(three, shard, 4) is None
            # As by one whose answer was lost.
            assert report(three, shard, 4) is None
        assert said() == []
        found = report(three, last, 4)
        assert found is not None
        assert torch.equal(found, SUM)
        (message,) = said()
        assert (message["kind"], message["epoch"], message["seq"]) == ("distances", 1, 4)
        assert torch.equal(summed(message["parts"]), SUM)
        # Who has not heard it asks by a repeated report, which changes nothing.
        before = three.dump()
        for shard in range(3):
            again = report(three, shard, 4, numbers(7.0, 7.0, 7.0))
            assert again is not None
            assert torch.equal(again, SUM)
        assert (three.dump(), said()) == (before, [])


def test_an_update_is_known_until_the_next_is(three: DrivenRun) -> None:
    for shard in range(3):
        report(three, shard, 2)
    assert report(three, 0, 4) is None
    # One that has missed the message is behind, and late reports of others change nothing.
    found = report(three, 1, 2)
    assert found is not None
    assert torch.equal(found, SUM)
    assert report(three, 0, 2) is not None
    report(three, 1, 4)
    found = report(three, 2, 4)
    assert found is not None
    assert torch.equal(found, SUM)
    before = three.dump()
    assert report(three, 1, 2) is None
    assert three.dump() == before
    # What is kept does not grow.
    assert set(three.redis.hkeys(three.key("distances"))) == {"all"}


def test_what_all_had_reported_is_reported_again_where_it_is_lost(three: DrivenRun) -> None:
    for shard in range(3):
        report(three, shard, 4)
    three.redis.delete(three.key("distances"))
    with heard(three) as said:
        # The others have made the update, of which this one has not heard.
        assert report(three, 1, 4) is None
        assert said() == [{"kind": "distances-lost", "epoch": 1, "seq": 4}]
        assert report(three, 0, 4) is None
        found = report(three, 2, 4)
        assert found is not None
        assert torch.equal(found, SUM)
        assert said()[-1]["kind"] == "distances"
        # Of an update that is yet to be made nobody asks.
        three.redis.delete(three.key("distances"))
        assert report(three, 1, 5) is None
        assert said() == []


def test_reports_are_fenced(three: DrivenRun) -> None:
    report(three, 0, 4)
    before = three.dump()
    with pytest.raises(Fenced):
        report(three, 1, 4, token="1")
    with pytest.raises(Fenced):
        report(three, 1, 4, token=three.owner(0).token)
    with pytest.raises(Behind):
        report(three, 1, 4, position=LogPosition(1, 6))
    with pytest.raises(Behind):
        report(three, 1, 4, position=LogPosition(2, 0))
    assert three.dump() == before
    three.redis.delete(three.key("run"))
    with pytest.raises(Behind):
        report(three, 1, 4)


def test_a_run_that_is_gathered_takes_reports_and_one_that_loads_takes_none(three: DrivenRun) -> None:
    report(three, 0, 4)
    three.do(three.opening.gather(3))
    assert report(three, 1, 4) is None
    generation = three.number("generation")
    assert three.do(three.opening.open(RunState(1, seq=5, initialized=True), 3, generation, {}))
    before = three.dump()
    assert report(three, 2, 4) is None
    assert three.dump() == before


def test_an_opening_forgets_what_was_reported(three: DrivenRun) -> None:
    """The places of the log may be taken again, where Redis has lost entries that were not applied."""
    for shard in range(2):
        report(three, shard, 4)
    three.do(three.opening.gather(3))
    three.reopen(RunState(1, seq=3, initialized=True))
    assert not three.redis.exists(three.key("distances"))
    three.do(three.log.mark_checkpoint(three.owner()))
    assert report(three, 2, 4) is None
    three.do(three.opening.gather(3))
    three.reopen(RunState(2, seq=3, initialized=True))
    assert report(three, 2, 4, position=LogPosition(1, 4)) is None
    assert not three.redis.exists(three.key("distances"))


def test_a_run_that_is_deleted_leaves_no_reports(three: DrivenRun) -> None:
    report(three, 0, 4)
    three.do(three.opening.delete(1))
    assert three.dump() == {three.key("deleted"): "1"}


class Exchange(RuleBasedStateMachine):
    """Shards that report the updates of a log in its order, and repeat any of their reports at any time."""

    driver: ClassVar[Driver]

    @initialize()
    def open(self) -> None:
        self.run = DrivenRun(self.driver, 3).open()
        self.told = [0] * 3
        """The newest update whose distances each shard has."""
        self.run.redis.hset(self.run.key("run"), "seq", 1000)
        self.run.position = LogPosition(1, 1000)

    def part(self, shard: int, seq: int) -> Tensor:
        return numbers(0.1 * seq, 1 / (1 + shard), 3.0**shard)

    def total(self, seq: int) -> Tensor:
        first, second, third = (self.part(shard, seq) for shard in range(3))
        return first + second + third

    @rule(shard=st.integers(0, 2))
    def report(self, shard: int) -> None:
        seq = self.told[shard] + 1
        found = report(self.run, shard, seq, self.part(shard, seq))
        if found is not None:
            assert torch.equal(found, self.total(seq))
            self.told[shard] = seq

    @rule(shard=st.integers(0, 2), ago=st.integers(0, 3))
    def repeat(self, shard: int, ago: int) -> None:
        seq = self.told[shard] - ago
        if seq > 0:
            found = report(self.run, shard, seq, self.part(shard, seq))
            assert found is None or torch.equal(found, self.total(seq))

    @rule()
    def go_on(self) -> None:
        """All that wait are told within a report of each and another."""
        oldest = min(self.told)
        for shard in [*range(3), *range(3)]:
            if self.told[shard] == oldest:
                self.report(shard)
        assert min(self.told) > oldest

    @invariant()
    def nobody_is_ahead(self) -> None:
        if hasattr(self, "told"):
            assert max(self.told) - min(self.told) <= 1
            assert self.run.redis.hlen(self.run.key("distances")) <= 4


def test_reports_in_any_order_lead_to_the_same_sums(driver: Driver) -> None:
    run_machine(Exchange, examples=40, steps=20, driver=driver)
