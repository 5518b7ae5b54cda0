"""The checker, on histories made by hand: sound ones pass, and each thing that can be wrong is objected to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.checker import Rules, check
from chaos.history import (
    Admitted,
    Attempt,
    Change,
    Claimed,
    DataLook,
    Grant,
    History,
    Pull,
    Push,
    Receipt,
    Recorder,
    as_ranges,
    from_ranges,
    read,
)

CHECKPOINT, JOURNAL = Rules(), Rules(goes_back=False)


def push(coordinate: int, step: int, at: int, epoch: int = 1, token: int = 1, decision: str = "applied") -> Push:
    """A push of worker `w`, sent at a time and answered at the next."""
    before = step - (decision == "applied")
    receipt = Receipt(decision, step, 0, False)
    return Push(coordinate, "w", token, epoch, before, attempts=[Attempt(at, None, at + 1, "receipt", "", receipt)])


def lost(coordinate: int, at: int, taken_at: int = 0, epoch: int = 1, end: str = "unknown") -> Push:
    """A push that got no receipt."""
    return Push(coordinate, "w", 1, epoch, taken_at, attempts=[Attempt(at, None, at + 1, end, "lease-expired")])


def pull(at: int, step: int, *coordinates: int, epoch: int = 1, reader: str = "r", value: float = 1.0) -> Pull:
    return Pull(reader, epoch, step, {each: (value,) * 3 for each in coordinates}, at, at + 1)


def moved(at: int, values: dict[int, float]) -> Pull:
    """Weights with coordinates that rates have moved by different values."""
    return Pull("r", 1, len(values), {each: (value,) * 3 for each, value in values.items()}, at, at + 1)


FIRST = Change(1.0, -2, -1)
"""The rate that a run begins with."""


def history(pushes: list[Push], *pulls: Pull) -> History:
    made = History({each.coordinate: each for each in pushes}, [Grant("w", 1, 1, 0, 0, 1)], list(pulls))
    made.grants += [Grant("w", 2, 2, 0, 500, 501)] if any(each.epoch == 2 for each in [*pushes, *pulls]) else []
    return made


def with_units(units: dict[int, tuple[int, ...]], *claims: Claimed, look: DataLook | None = None) -> History:
    """Pushes of these coordinates that counted these units, one after the other, and the weights after them."""
    pushes = [replace(push(each, step, 10 * step), units=of) for step, (each, of) in enumerate(units.items(), start=1)]
    made = history(pushes, pull(100, len(pushes), *units))
    return replace(made, claims=list(claims), looks=[look] if look else [])


BOTH = Claimed(1, (0, 1, 2), 2, 3)

SOUND: dict[str, Callable[[], History]] = {
    "in order": lambda: history([push(1, 1, 10), push(2, 2, 20)], pull(12, 1, 1), pull(30, 2, 1, 2)),
    "an unanswered push that counts": lambda: history([push(1, 1, 10), lost(2, 20)], pull(30, 2, 1, 2)),
    "an unanswered push that does not": lambda: history([push(1, 1, 10), lost(2, 20)], pull(30, 1, 1)),
    "a refused push": lambda: history([push(1, 1, 10), lost(2, 20, end="refused")], pull(30, 1, 1)),
    "owners of two shards, and calls that overlap": lambda: replace(
        history([]), admissions=[Admitted(0, 8, 1, 4), Admitted(0, 7, 2, 3), Admitted(1, 6, 9, 10)]
    ),
    "units that count once": lambda: with_units({1: (0, 1), 2: (2,)}, BOTH, look=DataLook(1, 2, 2, 1, {1: 1})),
    "units that others had before": lambda: with_units({1: (0,)}, Claimed(2, (0,), 2, 3), Claimed(1, (0,), 4, 5)),
    "rates that were set": lambda: replace(
        history([push(1, 1, 10), push(2, 2, 20)], moved(30, {1: 1.0, 2: 0.75})), changes=[FIRST, Change(0.75, 12, 14)]
    ),
    "a rate that may have been set": lambda: replace(
        history([push(1, 1, 10), push(2, 2, 20)], moved(30, {1: 1.0, 2: 0.75})), changes=[FIRST, Change(0.75, 12)]
    ),
    "a dropped push": lambda: history([push(1, 0, 10, decision="dropped")], pull(30, 0)),
    "a newer lease that Redis has lost": lambda: replace(
        history([push(1, 1, 10)], pull(30, 1, 1)),
        grants=[Grant("w", 1, 1, 0, 0, 1), Grant("w", 2, 1, 0, 2, 3)],
        taken_back=[(2, 5)],
    ),
    "units whose handing out Redis has lost": lambda: replace(
        with_units({1: (0,)}, BOTH, Claimed(2, (0,), 5, 6)), taken_back=[(4, 7)]
    ),
    "a run that went back": lambda: history(
        [push(1, 1, 10), push(2, 2, 20), push(3, 2, 600, epoch=2, token=2)],
        pull(30, 2, 1, 2),
        pull(590, 1, 1, epoch=2),
        pull(700, 2, 1, 3, epoch=2),
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_histories_pass(name: str) -> None:
    assert check(SOUND[name](), CHECKPOINT) == []


UNSOUND: dict[str, tuple[Callable[[], History], Rules, str]] = {
    "counted twice": (
        lambda: history([push(1, 1, 10)], pull(30, 1, 1, value=2.0)),
        CHECKPOINT,
        "push 1 counts [2.0, 2.0, 2.0] times",
    ),
    "counted on one shard only": (
        lambda: history([push(1, 1, 10)], replace(pull(30, 1), values={1: (1.0, 0.0, 1.0)})),
        CHECKPOINT,
        "push 1 counts [1.0, 0.0, 1.0] times",
    ),
    "a rate that nobody set": (
        lambda: history([push(1, 1, 10)], moved(30, {1: 0.75})),
        CHECKPOINT,
        "push 1 counts [0.75, 0.75, 0.75] times",
    ),
    "a rate that was lost": (
        lambda: replace(history([push(1, 1, 10)], pull(30, 1, 1)), changes=[FIRST, Change(0.75, 2, 4)]),
        CHECKPOINT,
        "moved the weights by (1.0, 1.0, 1.0), and the rate was of {0.75}",
    ),
    "a rate before it was set": (
        lambda: replace(history([push(1, 1, 10)], moved(30, {1: 0.75})), changes=[FIRST, Change(0.75, 40, 41)]),
        CHECKPOINT,
        "moved the weights by (0.75, 0.75, 0.75), and the rate was of {1.0}",
    ),
    "a rate of some shards": (
        lambda: replace(
            history([push(1, 1, 10)], Pull("r", 1, 1, {1: (1.0, 0.75, 1.0)}, 30, 31)),
            changes=[FIRST, Change(0.75, 11, 12)],
        ),
        CHECKPOINT,
        "push 1 counts [1.0, 0.75, 1.0] times",
    ),
    "from nowhere": (lambda: history([], pull(30, 1, 7)), CHECKPOINT, "nobody sent push 7"),
    "before it was sent": (
        lambda: history([push(1, 1, 100)], pull(30, 1, 1)),
        CHECKPOINT,
        "served before it was sent",
    ),
    "an acknowledged push that is missing": (
        lambda: history([push(1, 1, 10), lost(2, 11)], pull(30, 1, 2)),
        CHECKPOINT,
        "push 1 is missing, whose update is step 1",
    ),
    "a step that is not of its pushes": (
        lambda: history([push(1, 1, 10)], pull(30, 2, 1)),
        CHECKPOINT,
        "1 pushes are in the weights, not 1 for each step",
    ),
    "a later push that survives an earlier one": (
        lambda: history([push(1, 1, 10), push(2, 2, 20)], pull(600, 1, 2, epoch=2)),
        CHECKPOINT,
        "push 1 is lost, acknowledged for step 1 of epoch 1, of which step 2 survived",
    ),
    "a push that comes back": (
        lambda: history([push(1, 1, 10), push(2, 2, 20)], pull(600, 1, 1, epoch=2), pull(700, 2, 1, 2, epoch=2)),
        CHECKPOINT,
        "push 2 is lost, acknowledged for step 2 of epoch 1, of which step 2 survived",
    ),
    "a lost push that was durable": (
        lambda: replace(history([push(1, 1, 10)], pull(600, 0, epoch=2)), durable=[(1, 1, 15)]),
        CHECKPOINT,
        "push 1 is lost",
    ),
    "a run with a journal that goes back": (
        lambda: history([push(1, 1, 10)], pull(600, 0, epoch=2)),
        JOURNAL,
        "the run went back",
    ),
    "a refused push that counts": (
        lambda: history([lost(1, 10, end="refused")], pull(30, 1, 1)),
        CHECKPOINT,
        "which was refused (lease-expired)",
    ),
    "a dropped push that counts": (
        lambda: history([push(1, 0, 10, decision="dropped")], pull(30, 1, 1)),
        CHECKPOINT,
        "which was dropped",
    ),
    "two pushes with one step": (
        lambda: history([push(1, 1, 10), push(2, 1, 11)]),
        CHECKPOINT,
        "step 1 of epoch 1 is of 2 pushes",
    ),
    "a receipt of a wrong staleness": (
        lambda: history([replace(push(1, 3, 10), taken_at=0)], pull(5, 0)),
        CHECKPOINT,
        "push 1, taken at step 0, has the receipt",
    ),
    "a read of the past": (
        lambda: history([push(1, 1, 10)], pull(30, 0, reader="other")),
        CHECKPOINT,
        "asked after the receipt of push 1 of 1",
    ),
    "a reader that goes back": (
        lambda: history([push(1, 1, 10, epoch=2, token=2)], pull(20, 1, 1, epoch=2), pull(30, 0)),
        CHECKPOINT,
        "its reader has seen step 1 of epoch 2 before",
    ),
    "a token that falls": (
        lambda: replace(history([]), grants=[Grant("w", 5, 1, 0, 0, 1), Grant("w", 4, 1, 0, 2, 3)]),
        CHECKPOINT,
        "of worker w (by token) is of 4, asked after a lease of 5",
    ),
    "a token of two leases": (
        lambda: replace(history([]), grants=[Grant("w", 5, 1, 0, 0, 9), Grant("v", 5, 1, 0, 0, 9)]),
        CHECKPOINT,
        "2 leases have the token 5",
    ),
    "a lease that was fenced off": (
        lambda: replace(
            history([push(1, 1, 10)], pull(30, 1, 1)), grants=[Grant("w", 1, 1, 0, 0, 1), Grant("w", 2, 1, 0, 2, 3)]
        ),
        CHECKPOINT,
        "push 1 of w counts under token 1, though token 2 had been granted before",
    ),
    "a lease that was fenced off before Redis went back": (
        lambda: replace(
            history([push(1, 1, 10)], pull(30, 1, 1)),
            grants=[Grant("w", 1, 1, 0, 0, 1), Grant("w", 2, 1, 0, 2, 3)],
            taken_back=[(4, 7)],
        ),
        CHECKPOINT,
        "push 1 of w counts under token 1, though token 2 had been granted before",
    ),
    "an owner that was taken over": (
        lambda: replace(history([]), admissions=[Admitted(0, 8, 1, 2), Admitted(0, 7, 3, 4)]),
        CHECKPOINT,
        "an admission by an owner of shard 0 (by token) is of 7, asked after an admission of 8",
    ),
    "a unit that counts twice": (
        lambda: with_units({1: (0, 1), 2: (1,)}, BOTH),
        JOURNAL,
        "unit 1 counts 2 times",
    ),
    "a unit that was not handed out": (
        lambda: with_units({1: (5,)}, BOTH),
        CHECKPOINT,
        "push 1 counts unit 5, which token 1 was not handed out",
    ),
    "a unit that another has by now": (
        lambda: with_units({1: (0,)}, BOTH, Claimed(2, (0,), 5, 6)),
        CHECKPOINT,
        "push 1 counts unit 0 under token 1, though token 2 had been handed it out",
    ),
    "a unit that is said to have counted": (
        lambda: with_units({1: (0,)}, BOTH, look=DataLook(1, 1, 2, 1, {})),
        CHECKPOINT,
        "of passes {0: 2} units are said to have counted, and {0: 1} have",
    ),
    "a unit of which nothing is said": (
        lambda: with_units({1: (0, 1)}, BOTH, look=DataLook(1, 1, 2, 0, {0: 1})),
        CHECKPOINT,
        "of passes {0: 1} units are said to have counted, and {0: 2} have",
    ),
    "something that never ended": (lambda: replace(history([]), stuck=["a push"]), CHECKPOINT, "stuck: a push"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_histories_are_objected_to(name: str) -> None:
    made, rules, objection = UNSOUND[name]
    assert any(objection in fault for fault in check(made(), rules)), check(made(), rules)


def test_receipts_that_differ_are_objected_to() -> None:
    made = push(1, 1, 10)
    made.attempts.append(Attempt(20, None, 21, "receipt", "", Receipt("applied", 2, 0, True)))
    assert any("receipts that differ" in fault for fault in check(history([made]), CHECKPOINT))


def test_a_push_that_is_news_twice_is_objected_to() -> None:
    made = push(1, 1, 10)
    made.attempts.append(Attempt(20, None, 21, "receipt", "", Receipt("applied", 1, 0, False)))
    assert any("was decided 2 times" in fault for fault in check(history([made]), CHECKPOINT))


def test_updates_of_several_pushes_are_counted_by_all_of_them() -> None:
    accumulated, applied = push(1, 0, 10, decision="accumulated"), push(2, 1, 20)
    rules = Rules(batch=2)
    assert check(history([accumulated, applied], pull(15, 0), pull(30, 1, 1, 2, value=0.5)), rules) == []
    assert check(history([accumulated, applied], pull(30, 1, 1, 2, value=1.0)), rules)
    assert check(history([accumulated, applied], pull(30, 1, 2, value=0.5)), rules)


def test_an_update_may_be_cut_between_its_pushes() -> None:
    accumulated, applied, other = (
        push(1, 0, 10, decision="accumulated"),
        push(2, 1, 20),
        push(3, 1, 600, epoch=2, token=2),
    )
    rules, after = Rules(batch=2), pull(700, 1, 1, 3, epoch=2, value=0.5)
    assert check(history([accumulated, applied, other], after), rules) == []
    # The one that survived waited for the other when the run was looked at first.
    assert check(history([accumulated, applied, other], pull(590, 0, epoch=2), after), rules) == []
    without = pull(700, 1, 2, 3, epoch=2, value=0.5)
    assert any("push 1 is lost" in fault for fault in check(history([accumulated, applied, other], without), rules))


def test_what_is_written_is_read_even_if_its_last_line_is_torn(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "w.jsonl", "w")
    ask = recorder.begin("ask", worker="w")
    recorder.write("granted", id=ask, lease="l", token=3, epoch=1, step=0)
    claim = {"worker": "w", "token": 3, "epoch": 1, "taken_at": 0}
    send = recorder.begin("send", coordinate=4, part=None, **claim)
    recorder.write("receipt", id=send, decision="applied", step=1, staleness=0, replayed=False)
    look = recorder.begin("pulling")
    recorder.write(
        "pulled", id=look, epoch=1, step=1, whole=as_ranges([4]), value=[1.0] * 3, odd={"7": [2.0, 1.0, 1.0]}
    )
    with open(tmp_path / "w.jsonl", "a") as file:
        file.write('{"kind": "se')
    made = History.of(read(tmp_path))
    assert made.pushes[4].receipt == Receipt("applied", 1, 0, False)
    assert made.grants[0].token == 3
    assert made.pulls[0].values == {4: (1.0, 1.0, 1.0), 7: (2.0, 1.0, 1.0)}


def test_ranges_are_what_they_were_made_of() -> None:
    assert as_ranges([5, 1, 2, 3, 9]) == [[1, 3], [5, 5], [9, 9]]
    assert list(from_ranges([[1, 3], [5, 5]])) == [1, 2, 3, 5]
