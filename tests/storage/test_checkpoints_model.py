"""Checkpoints under any sequence of what processes and disks do to them, against a model of what was written."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from checkpointed import RECORD, part_of
from freestep.errors import CheckpointNotFound
from freestep_service.domain.records import CheckpointId
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import LocalStorage

NUMEL, KEEP = 12, 2
STRETCHES = [(0, 12), (0, 6), (6, 12), (0, 4), (4, 8), (8, 12)]
"""The parts of one, two and three shards."""
SUFFIXES = st.sampled_from([".json", ".safetensors"])
VIEWS = st.integers(0, 2)
"""Processes."""


@dataclass
class Model:
    """A checkpoint that was begun: its state, which of its parts are intact, and whether it was completed."""

    copy: StateCopy
    intact: set[tuple[int, int]] = field(default_factory=set)
    damaged: set[tuple[int, int]] = field(default_factory=set)
    is_marked: bool = False

    def holds(self, begin: int, end: int, without: Collection[tuple[int, int]] = ()) -> bool:
        """Whether intact parts, but for some, have all of a stretch; of an empty one, any part has all."""
        parts = self.intact.difference(without)
        return bool(parts) and all(any(first <= place < last for first, last in parts) for place in range(begin, end))


class CheckpointsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.views = [Checkpoints(LocalStorage(self.root), "run", KEEP) for _ in range(3)]
        self.suspect: list[defaultdict[CheckpointId, set[tuple[int, int]]]] = [defaultdict(set) for _ in self.views]
        """Parts that a process may have found to be damaged, and may leave out until it writes them itself."""
        self.models: dict[CheckpointId, Model] = {}
        self.last = CheckpointId(1, 0, 0)

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def path(self, checkpoint_id: CheckpointId) -> Path:
        name = f"{checkpoint_id.epoch:08d}-{checkpoint_id.step:012d}-{checkpoint_id.seq:012d}"
        return self.root / "runs" / "run" / "checkpoints" / name

    def choose(self, number: int) -> CheckpointId:
        return sorted(self.models)[number % len(self.models)]

    @rule(new_epoch=st.booleans(), steps=st.integers(1, 2))
    def advance(self, new_epoch: bool, steps: int) -> None:
        """The run has another state."""
        epoch, step, seq = self.last
        self.last = CheckpointId(epoch + new_epoch, max(step - 1, 0) if new_epoch else step + steps, seq + steps)
        generator = torch.Generator().manual_seed(self.last.seq)
        tensors = {name: torch.randn(NUMEL, generator=generator) for name in ("y", "z")}
        scalars = {"default": {"k": float(self.last.step)}}
        self.models[self.last] = Model(StateCopy(*self.last, tensors, scalars, {}, 0.0, 0.0))

    @precondition(lambda self: self.models)
    @rule(view=VIEWS, number=st.integers(0, 9), stretch=st.sampled_from(STRETCHES))
    def write(self, view: int, number: int, stretch: tuple[int, int]) -> None:
        """A shard writes its part."""
        model = self.models[self.choose(number)]
        size = self.views[view].write(part_of(model.copy, *stretch), *stretch, NUMEL, {"key": RECORD})
        assert size > 8 * (stretch[1] - stretch[0])
        model.damaged.discard(stretch)
        model.intact.add(stretch)
        self.suspect[view][self.choose(number)].discard(stretch)

    @precondition(lambda self: any(model.holds(0, NUMEL) for model in self.models.values()))
    @rule(view=VIEWS, number=st.integers(0, 9))
    def complete(self, view: int, number: int) -> None:
        """The last part has been written; what is older than the newest complete ones is dropped."""
        whole = sorted(each for each, model in self.models.items() if model.holds(0, NUMEL))
        completed = whole[number % len(whole)]
        self.models[completed].is_marked = True
        self.views[view].complete(completed)
        marked = sorted(each for each, model in self.models.items() if model.is_marked)
        for each in marked[-KEEP:]:
            assert self.path(each).exists()
        undamaged = [each for each in marked if not self.models[each].damaged and not self.suspect[view][each]]
        there = {each for each in self.models if self.path(each).exists()}
        if len(undamaged) >= KEEP:
            assert not any(each < undamaged[-KEEP] for each in there)
        for each in list(self.models):
            if each not in there and (self.models[each].intact or self.models[each].damaged):
                del self.models[each]

    @precondition(lambda self: any(model.intact for model in self.models.values()))
    @rule(data=st.data(), suffix=SUFFIXES, place=st.floats(0, 1, exclude_max=True), cuts=st.booleans())
    def damage(self, data: st.DataObject, suffix: str, place: float, cuts: bool) -> None:
        """A disk gives back something else than was written to it."""
        parts = sorted((each, part) for each, model in self.models.items() for part in model.intact)
        checkpoint_id, (begin, end) = data.draw(st.sampled_from(parts))
        file = self.path(checkpoint_id) / f"{begin:015d}-{end:015d}{suffix}"
        content = file.read_bytes()
        at = int(place * len(content))
        file.write_bytes(content[:at] if cuts else content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        self.models[checkpoint_id].intact.discard((begin, end))
        self.models[checkpoint_id].damaged.add((begin, end))

    @precondition(lambda self: any(model.is_marked for model in self.models.values()))
    @rule(number=st.integers(0, 9))
    def die_while_dropping(self, number: int) -> None:
        """A process is killed while it drops a checkpoint: the mark is gone, and the first manifest."""
        marked = sorted(each for each, model in self.models.items() if model.is_marked)
        checkpoint_id = marked[number % len(marked)]
        documents = sorted(self.path(checkpoint_id).glob("*.json"), key=lambda file: file.name != "complete.json")
        for file in documents[:2]:
            file.unlink()
        model = self.models[checkpoint_id]
        model.is_marked = False
        if len(documents) > 1:
            begin, end = map(int, documents[1].stem.split("-"))
            model.intact.discard((begin, end))
            model.damaged.discard((begin, end))

    @precondition(lambda self: self.models)
    @rule(view=VIEWS, number=st.integers(0, 9), bounds=st.tuples(st.integers(0, NUMEL), st.integers(0, NUMEL)))
    def load(self, view: int, number: int, bounds: tuple[int, int]) -> None:
        """A shard of any stretch is loaded."""
        begin, end = sorted(bounds)
        checkpoint_id = self.choose(number)
        model = self.models[checkpoint_id]
        try:
            loaded = self.views[view].load(checkpoint_id, begin, end)
        except Damaged:
            assert not model.holds(begin, end, without=self.suspect[view][checkpoint_id])
        else:
            assert id_of(loaded.state) == checkpoint_id
            assert loaded.state.scalars == model.copy.scalars
            assert loaded.receipts == {"key": RECORD}
            for name, tensor in loaded.state.tensors.items():
                assert torch.equal(tensor, model.copy.tensors[name][begin:end])
        self.suspect[view][checkpoint_id] |= model.damaged

    @rule(view=VIEWS)
    def remove(self, view: int) -> None:
        """The run is deleted."""
        self.views[view].remove(self.last.epoch)
        assert list(self.root.glob("runs/*")) == []
        self.models.clear()

    @invariant()
    def the_newest_whole_checkpoint_is_found(self) -> None:
        """By a process that has just started."""
        checkpoints = Checkpoints(LocalStorage(self.root), "run", KEEP)
        found = None
        while found is None and (offers := checkpoints.offers(0, NUMEL)):
            assert offers == sorted(offers)
            try:
                found = id_of(checkpoints.load(offers[-1], 0, NUMEL).state)
            except Damaged:
                assert offers[-1] not in checkpoints.offers(0, NUMEL)
        assert found == max((each for each, model in self.models.items() if model.holds(0, NUMEL)), default=None)

    @invariant()
    def what_is_listed_can_be_gone_back_to(self) -> None:
        checkpoints = Checkpoints(LocalStorage(self.root), "run", KEEP)
        listed = checkpoints.all()
        assert [(each.epoch, each.step) for each in listed] == sorted((each.epoch, each.step) for each in listed)
        for each in listed:
            checkpoint_id = checkpoints.at(each.step)
            assert checkpoint_id.step == each.step
            assert checkpoints.describe(checkpoint_id) in listed
        with pytest.raises(CheckpointNotFound):
            checkpoints.at(10**6)


TestCheckpoints = CheckpointsMachine.TestCase
TestCheckpoints.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=40)
