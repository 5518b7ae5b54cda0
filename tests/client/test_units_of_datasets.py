"""Units of data of several kinds: Hugging Face's, files that are read from beginning to end, two data sets in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from counting import LENGTH, Counts, Make, Numbers, counted, train
from freestep import FreestepError, LocalSteps, Run, Units

FILES = 10
EACH = LENGTH // FILES


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets_of_hugging_face_are_handed_out(remotely: Make, run: Run, workers: int) -> None:
    numbers = datasets.Dataset.from_dict({"number": range(LENGTH)}).with_format("torch")
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, len(numbers), unit=5, passes=2)
    loader = units.loader(numbers, batch_size=10, num_workers=workers)
    train(model, optimizer, (batch["number"] for batch in loader))
    assert units.exhausted and counted(run) == {2.0}
    with pytest.raises(FreestepError, match="by index"):
        units.loader(numbers.to_iterable_dataset(), batch_size=5)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files of numbers, a line for each; all of them together have every example once."""
    paths = [tmp_path / f"{number}.txt" for number in range(FILES)]
    for number, path in enumerate(paths):
        path.write_text("".join(f"{example}\n" for example in range(number * EACH, (number + 1) * EACH)))
    return paths


class Lines(IterableDataset[int]):
    """The numbers in files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __iter__(self) -> Iterator[int]:
        for path in self._paths:
            yield from map(int, path.read_text().split())


def test_files_count_with_one_push_each(remotely: Make, run: Run, files: list[Path]) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, len(files), unit=1, passes=2)
    for numbers in units:
        optimizer.zero_grad()
        for batch in DataLoader(Lines([files[number] for number in numbers]), batch_size=2):
            model.backward(batch)
        optimizer.step()
    assert units.exhausted and counted(run) == {2.0} and run.status().step == 2 * FILES


def test_files_count_with_a_round_each(locally: Callable[..., LocalSteps], run: Run, files: list[Path]) -> None:
    model = Counts()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = locally(model, inner, every=1000, lr=1.0, momentum=0.0)
    units = Units(optimizer, len(files), unit=1)
    for numbers in units:
        for batch in DataLoader(Lines([files[number] for number in numbers]), batch_size=2):
            optimizer.zero_grad()
            model.backward(batch)
            optimizer.step()
        optimizer.push()
    assert units.exhausted and counted(run) == {1.0} and run.status().step == FILES


class Files(Dataset[torch.Tensor]):
    """Example i is the numbers in file i."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([int(line) for line in self._paths[index].read_text().split()])


def test_files_are_read_ahead_by_processes(remotely: Make, run: Run, files: list[Path]) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, len(files), unit=1)
    loader = units.loader(Files(files), batch_size=2, num_workers=2, collate_fn=_together)
    train(model, optimizer, loader)
    assert units.exhausted and counted(run) == {1.0}


def _together(rows: list[torch.Tensor]) -> Any:
    return default_collate(torch.cat(rows).tolist())


def test_two_data_sets_count_together_and_each_on(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    # Examples 0 to 29, and 30 to 49.
    first = Units(optimizer, 30, unit=3, name="first", passes=2)
    second = Units(optimizer, LENGTH - 30, unit=4, name="second")
    for some, others in zip(first, second.loader(Numbers(LENGTH - 30), batch_size=4), strict=False):
        optimizer.zero_grad()
        model.backward([*some, *(others + 30).tolist()])
        optimizer.step()
    assert second.exhausted and not first.exhausted and run.status().step == 5
    assert [(each.name, each.done) for each in run.data_sets()] == [("first", 5), ("second", 5)]
    train(model, optimizer, first)
    y = run.pull("y")[0]["count"]
    assert set(y[:30].tolist()) == {2.0} and set(y[30:].tolist()) == {1.0} and first.exhausted
