"""Judges the history of a run under faults: pure functions of what clients know and of the weights that were served.

The run is plain SGD, and every push moves a coordinate of its own from 0 to `scale` times the rate in force, by
numbers that floats hold exactly, and of which none is the sum of others. So the weights say which pushes moved them,
how often, and by which rate: what a receipt promised is compared with what the weights have.

A run under durability `checkpoint` or `none` may go back, in a new epoch, to a step that nobody tells clients. But what
is lost must be the end of what there was: if a push of an epoch survives, so do all before it. `_Restores` draws that
conclusion from all pulls together, and any push that breaks it is an error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from chaos.history import NEVER, Claimed, History, Pull, Push

__all__ = ["Rules", "check"]


@dataclass(frozen=True)
class Rules:
    """What a run promises: pushes in an update, two at most; its shards; whether it may go back to a checkpoint."""

    batch: int = 1
    shards: int = 1
    goes_back: bool = True

    @property
    def scale(self) -> float:
        """What a push moves its coordinate by: gradients of an update are averaged."""
        return 1.0 / self.batch


def check(history: History, rules: Rules) -> list[str]:
    """What is wrong with a history, a line for each fault; empty if it is sound."""
    faults: list[str] = [f"stuck: {what}" for what in history.stuck]
    for law in _LAWS:
        faults += law(history, rules)
    return faults


def every_push_counts_once(history: History, rules: Rules) -> Iterator[str]:
    """A coordinate is 0, or moved once, by one rate on all shards; and what moved the weights was sent before."""
    moves = [{rules.scale * change.lr} for change in history.changes]
    for pull in history.pulls:
        for coordinate, values in pull.values.items():
            if set(values) not in moves:
                yield f"{_named(pull)}: push {coordinate} counts {[each / rules.scale for each in values]} times"
            push = history.pushes.get(coordinate)
            if push is None:
                yield f"{_named(pull)}: nobody sent push {coordinate}, which is in the weights"
            elif push.began > pull.answered:
                yield f"{_named(pull)}: push {coordinate} is in weights that were served before it was sent"


def pushes_move_by_the_rate_in_force(history: History, rules: Rules) -> Iterator[str]:
    """A push moves the weights by a rate that was in force after it was sent and before it was seen.

    A rate that the service has said to be in force is so from then on, whatever dies, until another is.
    """
    for pull in history.pulls:
        for coordinate, values in pull.values.items():
            push = history.pushes.get(coordinate)
            rates = history.rates(push.began, pull.answered) if push is not None else set()
            if rates and not {value / rules.scale for value in values} <= rates:
                yield f"{_named(pull)}: push {coordinate} moved the weights by {values}, and the rate was of {rates}"


def steps_count_pushes(history: History, rules: Rules) -> Iterator[str]:
    """The weights of step n have the pushes of n updates, no more and no fewer."""
    for pull in history.pulls:
        if len(pull.values) != rules.batch * pull.step:
            yield f"{_named(pull)}: {len(pull.values)} pushes are in the weights, not {rules.batch} for each step"


def receipts_tell_the_weights(history: History, rules: Rules) -> Iterator[str]:
    """Weights of a step have every push whose receipt names this step or one before it, and none that comes after.

    Of pushes of epochs before it, they have those up to where the run went back to.
    """
    restores = _Restores(history)
    if not rules.goes_back and (epochs := {grant.epoch for grant in history.grants}) - {1}:
        yield f"the run went back: its epochs are {sorted(epochs)}"
    for pull in history.pulls:
        for push, update in restores.promised:
            is_there = push.coordinate in pull.values
            if push.epoch == pull.epoch:
                if is_there != (update <= pull.step):
                    yield f"{_named(pull)}: push {push.coordinate} {_found(is_there)}, whose update is step {update}"
            elif push.epoch > pull.epoch:
                if is_there:
                    yield f"{_named(pull)}: push {push.coordinate} is there, of epoch {push.epoch}"
            elif is_there and update > pull.step:
                yield f"{_named(pull)}: push {push.coordinate} is there, whose update is step {update}"
            elif not is_there and _waits(push, pull):
                continue
            elif not is_there and _place(push) <= restores.survived(push.epoch, pull.epoch):
                yield (
                    f"{_named(pull)}: push {push.coordinate} is lost, acknowledged for step {update} of epoch "
                    f"{push.epoch}, of which step {restores.survived(push.epoch, pull.epoch):g} survived"
                )


def refused_pushes_change_nothing(history: History, rules: Rules) -> Iterator[str]:
    """A push that was dropped, or refused each time that it was sent, is not in the weights."""
    without = {
        push.coordinate: "dropped" if push.receipt is not None else f"refused ({push.attempts[-1].reason})"
        for push in history.pushes.values()
        if push.is_refused or (push.receipt is not None and push.receipt.update is None)
    }
    for pull in history.pulls:
        for coordinate in without.keys() & pull.values.keys():
            yield f"{_named(pull)}: push {coordinate} is there, which was {without[coordinate]}"


def receipts_agree(history: History, rules: Rules) -> Iterator[str]:
    """A push has one decision, however often it is sent; one receipt only is news; and steps are of `batch` pushes."""
    updates: Counter[tuple[int, int]] = Counter()
    for push in history.pushes.values():
        receipts = [attempt.receipt for attempt in push.receipts if attempt.receipt is not None]
        told = {(receipt.decision, receipt.step, receipt.staleness) for receipt in receipts}
        if len(told) > 1:
            yield f"push {push.coordinate} has receipts that differ: {sorted(told)}"
        # Twins of one push to several shards may each be the first on one of them.
        news = sum(not receipt.replayed for receipt in receipts)
        if news > 1 and rules.shards == 1:
            yield f"push {push.coordinate} was decided {news} times by its receipts"
        if push.receipt is None:
            continue
        before = push.receipt.step - (push.receipt.decision == "applied")
        if push.receipt.staleness != before - push.taken_at:
            yield f"push {push.coordinate}, taken at step {push.taken_at}, has the receipt {push.receipt}"
        if push.receipt.update is not None:
            updates[push.epoch, push.receipt.update] += 1
    for (epoch, update), pushes in updates.items():
        if pushes > rules.batch:
            yield f"step {update} of epoch {epoch} is of {pushes} pushes by their receipts"


def steps_are_a_register(history: History, rules: Rules) -> Iterator[str]:
    """Within an epoch, what is asked after an answer has come sees that answer's step, or a later one.

    A counter that only rises is linearizable if and only if this is so of all its operations: receipts, which move it,
    and pulls, which read it.
    """
    for epoch in {pull.epoch for pull in history.pulls} | {push.epoch for push in history.pushes.values()}:
        operations = [
            (pull.asked, pull.answered, pull.step, f"the pull of {pull.reader}")
            for pull in history.pulls
            if pull.epoch == epoch
        ]
        for push in history.pushes.values():
            receipt = push.receipt
            if push.epoch == epoch and receipt is not None and receipt.decision == "applied":
                answered = min(attempt.answered for attempt in push.receipts)
                operations.append((push.began, answered, receipt.step, f"the receipt of push {push.coordinate}"))
        yield from _out_of_order(operations, f"of epoch {epoch}")


def readers_go_forward(history: History, rules: Rules) -> Iterator[str]:
    """No reader sees an older epoch, or an older step of the same one, than it has seen."""
    by_reader: dict[str, list[Pull]] = defaultdict(list)
    for pull in history.pulls:
        by_reader[pull.reader].append(pull)
    for pulls in by_reader.values():
        seen: Pull | None = None
        for pull in sorted(pulls, key=lambda pull: pull.asked):
            if seen and pull.asked > seen.answered and (pull.epoch, pull.step) < (seen.epoch, seen.step):
                yield f"{_named(pull)}: its reader has seen step {seen.step} of epoch {seen.epoch} before"
            seen = max(filter(None, (seen, pull)), key=lambda pull: (pull.epoch, pull.step))


def tokens_rise(history: History, rules: Rules) -> Iterator[str]:
    """No two leases have one fencing token, and of a worker's the later one has the higher."""
    for token, number in Counter(grant.token for grant in history.grants).items():
        if number > 1:
            yield f"{number} leases have the token {token}"
    for worker in {grant.worker for grant in history.grants}:
        grants = [
            (grant.asked, grant.answered, grant.token, "a lease") for grant in history.grants if grant.worker == worker
        ]
        yield from _out_of_order(grants, f"of worker {worker} (by token)")


def older_leases_are_fenced(history: History, rules: Rules) -> Iterator[str]:
    """No push counts that was first sent under a lease after its worker had been granted a later one.

    A grant that Redis has lost fences nobody: its holder is refused, and has to ask for another one.
    """
    known = [grant for grant in history.grants if not history.may_be_forgotten(grant)]
    for push in history.pushes.values():
        if push.receipt is None or push.receipt.update is None:
            continue
        for grant in known:
            if grant.worker == push.worker and grant.token > push.token and grant.answered < push.began:
                yield (
                    f"push {push.coordinate} of {push.worker} counts under token {push.token}, though token "
                    f"{grant.token} had been granted before it was sent"
                )
                break


def owners_take_turns(history: History, rules: Rules) -> Iterator[str]:
    """Once the later owner of a shard has admitted a push, no earlier one does."""
    for shard in {each.shard for each in history.admissions}:
        admissions = [
            (each.asked, each.answered, each.token, "an admission")
            for each in history.admissions
            if each.shard == shard
        ]
        yield from _out_of_order(admissions, f"by an owner of shard {shard} (by token)")


def units_count_once(history: History, rules: Rules) -> Iterator[str]:
    """No unit of a pass has moved the weights twice."""
    for pull in history.pulls:
        for unit, number in _units_in(pull, history).items():
            if number > 1:
                yield f"{_named(pull)}: unit {unit} counts {number} times"


def units_count_for_their_holder(history: History, rules: Rules) -> Iterator[str]:
    """No push counts units that its lease was never handed out, or that another one was, later, before it was sent.

    What Redis has lost of the handing out, it may hand out again; `units_count_once` holds nevertheless.
    """
    claims: dict[int, list[Claimed]] = defaultdict(list)
    for claim in history.claims:
        for unit in claim.units:
            claims[unit].append(claim)
    for push in history.pushes.values():
        if push.receipt is None or push.receipt.update is None:
            continue
        for unit in push.units:
            own = [each.answered for each in claims[unit] if each.token == push.token and each.answered < push.began]
            if not own:
                yield f"push {push.coordinate} counts unit {unit}, which token {push.token} was not handed out"
                continue
            for other in claims[unit]:
                if history.may_be_forgotten(other):
                    continue
                if other.token != push.token and max(own) < other.asked and other.answered < push.began:
                    yield (
                        f"push {push.coordinate} counts unit {unit} under token {push.token}, though token "
                        f"{other.token} had been handed it out before it was sent"
                    )


def data_tells_the_weights(history: History, rules: Rules) -> Iterator[str]:
    """What a data set says to have counted is what is in the weights: each unit once in every pass that is done."""
    for look in history.looks:
        pull = next((each for each in history.pulls if (each.epoch, each.step) == (look.epoch, look.step)), None)
        if pull is None:
            continue
        told = {of_pass: look.units for of_pass in range(look.passes_done + len(look.passes))}
        told |= look.passes
        told = {of_pass: done for of_pass, done in told.items() if done}
        in_weights = _units_in(pull, history)
        # A push that waits for another one has counted, and is not in the weights yet.
        waiting = [push.units for push in _waiting(pull, history)] if rules.batch > 1 else []
        found = [Counter(unit // look.units for unit in [*in_weights.elements(), *units]) for units in [(), *waiting]]
        if told not in found:
            yield f"{_named(pull)}: of passes {told} units are said to have counted, and {dict(found[0])} have"


_LAWS: list[Callable[[History, Rules], Iterable[str]]] = [
    every_push_counts_once,
    pushes_move_by_the_rate_in_force,
    steps_count_pushes,
    receipts_tell_the_weights,
    refused_pushes_change_nothing,
    receipts_agree,
    steps_are_a_register,
    readers_go_forward,
    tokens_rise,
    older_leases_are_fenced,
    owners_take_turns,
    units_count_once,
    units_count_for_their_holder,
    data_tells_the_weights,
]


class _Restores:
    """Up to which step each epoch is known to have taken over what was before it.

    By the weights: they have a push of an epoch before. By the service's word: it had said that a checkpoint has a step
    before anybody saw a later epoch.
    """

    def __init__(self, history: History) -> None:
        self.promised = [
            (push, update)
            for push in history.pushes.values()
            if push.receipt is not None and (update := push.receipt.update) is not None
        ]
        self._kept: dict[int, float] = defaultdict(float)
        epochs = {pull.epoch for pull in history.pulls} | {grant.epoch for grant in history.grants}
        self._newest = max(epochs, default=0)
        for pull in history.pulls:
            for push, _ in self.promised:
                if push.epoch < pull.epoch and push.coordinate in pull.values:
                    self._keep(push.epoch, pull.epoch, _place(push))
        for epoch, step, told in history.durable:
            seen = [grant.answered for grant in history.grants if grant.epoch > epoch]
            seen += [pull.answered for pull in history.pulls if pull.epoch > epoch]
            if told < min(seen, default=NEVER):
                self._keep(epoch, self._newest, step)

    def _keep(self, before: int, epoch: int, step: float) -> None:
        for later in range(before + 1, epoch + 1):
            self._kept[later] = max(self._kept[later], step)

    def survived(self, before: int, epoch: int) -> float:
        """The step of epoch `before` up to which all is in the weights of `epoch`, at least."""
        return min(self._kept[later] for later in range(before + 1, epoch + 1))


def _out_of_order(operations: list[tuple[int, int, int, str]], where: str) -> Iterator[str]:
    """Operations (asked, answered, place, name) with a lower place than one that had ended before they began."""
    ended = sorted((answered, place, name) for _, answered, place, name in operations)
    furthest: list[tuple[int, str]] = []
    for _, place, name in ended:
        furthest.append(max(furthest[-1], (place, name)) if furthest else (place, name))
    for asked, _, place, name in operations:
        before = bisect_left(ended, (asked,))
        if before and furthest[before - 1][0] > place:
            yield f"{name} {where} is of {place}, asked after {furthest[before - 1][1]} of {furthest[before - 1][0]}"


def _place(push: Push) -> float:
    """Where a push that counts is among the others: at its update's step, or before it, if it waits there for more.

    A checkpoint may lie between the two pushes of an update, so one of them may survive without the other.
    """
    assert push.receipt is not None and push.receipt.update is not None
    return push.receipt.update - 0.5 * (push.receipt.decision == "accumulated")


def _waits(push: Push, pull: Pull) -> bool:
    """Whether a push waits for another one before its update, at the step of a pull."""
    assert push.receipt is not None and push.receipt.update is not None
    return push.receipt.decision == "accumulated" and push.receipt.update > pull.step


def _units_in(pull: Pull, history: History) -> Counter[int]:
    """How often the weights have each unit."""
    pushes = [push for coordinate in pull.values if (push := history.pushes.get(coordinate)) is not None]
    return Counter(unit for push in pushes for unit in push.units)


def _waiting(pull: Pull, history: History) -> Iterator[Push]:
    """The pushes that may wait for another one at the step of a pull."""
    for push in history.pushes.values():
        if push.coordinate in pull.values or push.is_refused:
            continue
        if push.receipt is None or (push.receipt.decision == "accumulated" and push.receipt.step == pull.step):
            yield push


def _named(pull: Pull) -> str:
    return f"weights of epoch {pull.epoch}, step {pull.step}, for {pull.reader}"


def _found(is_there: bool) -> str:
    return "is there" if is_there else "is missing"
