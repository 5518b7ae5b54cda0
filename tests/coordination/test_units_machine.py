"""Units of data sets in any order of calls: nobody has one that another has, and none counts twice."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordination.driven import HOUR, DrivenRun, Driver
from freestep.api.data import DataSpec
from freestep.api.models import Lease
from freestep.errors import LeaseExpired, NonFiniteGradient, UnitNotHeld
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.data_progress import progress_of, units_of
from freestep_service.domain.data_sets import DataSets, NewDataSet
from freestep_service.domain.records import Behind, Claim, Record, RunState
from machines import run_machine
from units_twin import UnitsTwin

SPECS = {
    "a": DataSpec(length=19, unit=4, passes=3, seed=5),
    "b": DataSpec(length=7, unit=1, passes=2, shuffle="none"),
}
NAMES = st.sampled_from(sorted(SPECS))
WORKERS = st.sampled_from(["v", "w"])
NUMBERS = st.sets(st.integers(0, 20), min_size=1, max_size=3)
# A push is dropped if the run has taken a step since.
POLICY = Policy("1", "0", distinct=False)


def after(entries: list[dict[str, Any]]) -> DataSets:
    """What shards know of the data sets after these entries of the log."""
    made = DataSets()
    for entry in entries:
        if data := entry.get("data"):
            made.add(NewDataSet(data["name"], DataSpec.model_validate_json(data["spec"])))
        if "record" in entry:
            made.count(Record.from_json(entry["record"]).counted, advance=entry["advance"])
    return made


class Units(RuleBasedStateMachine):
    """What workers and the owners of shards call, beside a twin that keeps every unit by itself."""

    driver: ClassVar[Driver]
    shards: ClassVar[int]

    @initialize()
    def open(self) -> None:
        self.run = DrivenRun(self.driver, self.shards, POLICY).open()
        self.data = self.run.coordinator.data
        self.twins = {name: UnitsTwin(spec) for name, spec in SPECS.items()}
        for name, spec in SPECS.items():
            assert self.run.do(self.data.create(self.run.owner(), NewDataSet(name, spec))) is not None
            assert self.run.do(self.data.create(self.run.owner(), NewDataSet(name, spec))) is None
        self.before: list[dict[str, Any]] = []
        """Entries of earlier logs that the run's state contains."""
        self.leases: dict[str, Lease] = {}
        self.keys = 0

    def entries(self) -> list[dict[str, Any]]:
        return self.before + self.run.entries()

    def lease(self, worker: str) -> Lease:
        if worker not in self.leases:
            self.leases[worker] = self.run.grant(worker)
        return self.leases[worker]

    @rule(worker=WORKERS, name=NAMES, count=st.integers(1, 6), again=st.booleans())
    def claim(self, worker: str, name: str, count: int, again: bool) -> None:
        lease, twin = self.lease(worker), self.twins[name]
        self.keys += 1
        expected = twin.claim(lease.lease, count)
        for _ in range(1 + again):
            call = self.data.claim(self.run.owner(), lease.lease, lease.token, name, count, f"key-{self.keys}")
            held = self.run.do(call)
            if not expected:
                # No more of an empty claim is remembered than of none.
                break
            assert held.numbers == expected
        assert held.spec == twin.spec and held.is_exhausted == (set(twin.state) == {"done"})

    @rule(
        worker=WORKERS,
        a=NUMBERS,
        b=NUMBERS,
        names=st.sampled_from(["a", "b", "ab"]),
        owned=st.booleans(),
        fate=st.sampled_from(["good", "good", "good", "stale", "too large", "malformed", "cut"]),
    )
    def push(self, worker: str, a: set[int], b: set[int], names: str, owned: bool, fate: str) -> None:
        """A push of units that its worker has, if it is to own them."""
        lease = self.lease(worker)
        units = {}
        for name, numbers in (("a", a), ("b", b)):
            has = self.twins[name].numbers(lease.lease)
            chosen = has[: len(numbers)] if owned else sorted(numbers)
            if name in names and chosen:
                units[name] = tuple(chosen)
        self.keys += 1
        step = self.run.number("step")
        taken_at = max(step - (fate == "stale"), 0)
        claim = Claim(lease.lease, lease.token, taken_at, f"key-{self.keys}", units=units)
        lacking = {name: self.twins[name].lacking(lease.lease, numbers) for name, numbers in units.items()}
        if any(lacking.values()):
            before = self.run.dump()
            with pytest.raises(UnitNotHeld) as refused:
                self.run.admit(claim)
            with pytest.raises(UnitNotHeld):
                self.run.do(self.run.pushes.precheck(claim))
            shown = ";".join(f"{name}={','.join(map(str, each))}" for name, each in lacking.items() if each)
            assert refused.value.extensions == {"units": shown}
            # It renews its lease.
            assert {key: value for key, value in self.run.dump().items() if not key.endswith(":leases")} == {
                key: value for key, value in before.items() if not key.endswith(":leases")
            }
            return
        is_dropped = taken_at < step
        if is_dropped:
            assert self.run.admit(claim).record.decision == "dropped"
        else:
            for shard in range(self.shards):
                self.run.admit(claim, shard)
            if fate == "malformed":
                self.run.discard(claim, 0, "malformed-tensors", "why")
            elif fate == "cut":
                for shard in range(self.shards):
                    self.run.discard(claim, shard)
                return
            else:
                self.commit(claim, too_large=fate == "too large")
        has_counted = not is_dropped and fate in ("good", "stale")
        for name, numbers in units.items():
            self.twins[name].set(numbers, "done" if has_counted else "open")

    def commit(self, claim: Claim, *, too_large: bool) -> None:
        for shard in range(self.shards):
            try:
                self.run.commit(claim, shard, largest_norm=-1.0 if too_large else None)
            except NonFiniteGradient:
                assert too_large

    @rule(worker=WORKERS, name=NAMES, numbers=st.one_of(st.none(), NUMBERS))
    def give_back(self, worker: str, name: str, numbers: set[int] | None) -> None:
        lease, twin = self.lease(worker), self.twins[name]
        has = twin.numbers(lease.lease)
        expected = [number for number in has if numbers is None or number in numbers]
        given = self.run.do(self.data.give_back(lease.lease, lease.token, name, sorted(numbers or ())))
        assert given == expected
        twin.set(expected, "open")

    @rule(worker=WORKERS, how=st.sampled_from(["release", "replace", "expire"]))
    def end_lease(self, worker: str, how: str) -> None:
        lease = self.leases.pop(worker, None)
        if lease is None:
            return
        if how == "release":
            self.run.do(self.run.leases.release(lease.lease, self.run.position))
        elif how == "replace":
            self.leases[worker] = self.run.grant(worker)
        else:
            self.run.redis.zadd(self.run.key("leases"), {worker: 1})
            self.run.do(self.run.leases.expire(self.run.position, HOUR))
        for twin in self.twins.values():
            twin.open_all_of(lease.lease)
        with pytest.raises(LeaseExpired):
            self.run.do(self.data.claim(self.run.owner(), lease.lease, lease.token, "a", 1, ""))

    @rule(
        lost=st.sampled_from(["", "out", "held", "back", "workers"]), goes_back=st.booleans(), keep=st.integers(0, 99)
    )
    def open_again(self, lost: str, goes_back: bool, keep: int) -> None:
        """The run opens with what its shards know, in the same epoch, or goes back to an earlier place in another."""
        entries = self.entries()
        if goes_back:
            entries = entries[: max(len(SPECS), keep % (len(entries) + 1))]
        if lost:
            self.run.redis.delete(self.run.key(lost))
        step, epoch = sum(entry["advance"] for entry in entries), self.run.number("epoch") + goes_back
        data = after(entries)
        self.run.do(self.run.opening.gather(self.shards))
        self.run.reopen(RunState(epoch, step, 0 if goes_back else self.run.number("seq"), initialized=True, data=data))
        self.before = entries
        if goes_back or lost in ("out", "workers"):
            for name, twin in self.twins.items():
                state = data.open_units()[name]
                twin.go_back(set(range(state.reached)) - set(state.open))
        if goes_back or lost == "workers":
            self.leases.clear()

    @rule(key=st.sampled_from(["out", "held", "back"]))
    def lose(self, key: str) -> None:
        """A claim notices that what belongs together is not all there."""
        lease = self.lease("v")
        if self.run.redis.delete(self.run.key(key)):
            with pytest.raises(Behind):
                self.run.do(self.data.claim(self.run.owner(), lease.lease, lease.token, "a", 1, ""))
            self.open_again("out", goes_back=False, keep=0)

    @invariant()
    def agrees(self) -> None:
        data = after(self.entries())
        assert DataSets.of(json.loads(json.dumps(data.manifest_members()["data"]))).states() == data.states()
        views = {view.name: view for view in self.run.do(self.data.read_all())}
        progress = progress_of(self.run.redis.hgetall(self.run.key("run")))  # type: ignore[arg-type]
        for name, twin in self.twins.items():
            view, known, status = views[name], data.open_units()[name], views[name].status()
            done = twin.numbers("done")
            assert [number for number in range(known.reached) if number not in known.open] == done
            assert view.done == status.done == progress[name].done == len(done)
            held = {each.number: each.worker for each in view.out}
            owners = {lease.lease: worker for worker, lease in self.leases.items()}
            assert held == {n: owners[each] for n, each in enumerate(twin.state) if each not in ("open", "done")}
            opened = {*view.back, *range(view.cursor, len(twin.state))}
            assert sorted(opened) == twin.numbers("open") and status.open == len(opened)
            assert status.exhausted == progress[name].exhausted == (len(done) == len(twin.state))
            examples = units_of(twin.spec, done)
            assert status.examples_done == sum(each.end - each.begin for each in examples)
            by_pass = twin.done_by_pass()
            assert status.passes_done == by_pass.count(twin.spec.units)
            assert all(each.done == by_pass[each.of_pass] for each in status.passes)
            assert all(each.open + each.out + each.done == twin.spec.units for each in status.passes)


@pytest.mark.parametrize("shards", [1, 3])
def test_units_are_those_of_the_twin(driver: Driver, shards: int) -> None:
    run_machine(Units, 60, 30, driver=driver, shards=shards)
