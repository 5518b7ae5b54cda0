"""Folders that `from_pretrained` of the transformers library loads, made of a run's tensors and a folder like them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import add
from pathlib import Path

from freestep.answers import Snapshot
from freestep.errors import FreestepError, MalformedTensors
from freestep.files import writing
from freestep.tensor_file import StoredTensor, content, read_tensors, stored

__all__ = ["PretrainedFolder"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_UNREAD = "pytorch_model*.bin"
"""Weights as torch pickles them."""
_COPIED = ("*config*.json", "*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
"""Configurations, of generation and preprocessing too, tokenizers, chat templates, and the code of custom models."""
_MOST_NAMED = 10
"""Tensors that a note names."""


class PretrainedFolder:
    """A folder with a model's `config.json`, and its weights as safetensors if it has some.

    Raises FreestepError if there is no config or the weights are damaged, and OSError if they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / _CONFIG).is_file():
            raise FreestepError(f"{folder} has no {_CONFIG}: name a folder that save_pretrained has written")
        self._tensors: dict[str, StoredTensor] = {}
        for file in self._weight_files():
            try:
                self._tensors |= read_tensors(file)[0]
            except MalformedTensors as error:
                raise FreestepError(f"{file} is not a safetensors file: {error}") from error

    def _weight_files(self) -> list[Path]:
        # In the order in which transformers looks for them.
        if (file := self.folder / _WEIGHTS).is_file():
            return [file]
        index = self.folder / f"{_WEIGHTS}.index.json"
        if not index.is_file():
            return []
        try:
            return [self.folder / name for name in sorted({*json.loads(index.read_bytes())["weight_map"].values()})]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FreestepError(f"{index} is not an index of weights: {error}") from error

    def write(self, output: Path, x: Snapshot) -> list[str]:
        """Writes a folder with a run's tensors, and what else this one has; returns what its user should know.

        The tensors get the names that they have in this folder's weights, which may have a prefix more or less. Tensors
        of the folder that the run does not have, since they are frozen or buffers, are copied; one that is equal to a
        tensor of the run in the folder is tied to it, and gets the run's values. Where the folder lacks a tensor of
        the run, nothing is copied: it cannot be told which of its tensors would be those of the run.

        Raises FreestepError if a tensor has another shape in the folder, and OSError.
        """
        if output.exists() and output.samefile(self.folder):
            raise FreestepError(f"{output} is the folder of the config too: name another one")
        names, notes = self._names(x), []
        tensors = {names[name]: tensor for name, tensor in stored(x).items()}
        if self._tensors and not tensors.keys() & self._tensors.keys():
            raise FreestepError(
                f"{self.folder} has none of the run's tensors, such as {next(iter(tensors))!r}: name a folder of the "
                "run's model"
            )
        self._require_shapes(tensors)
        missing, others = tensors.keys() - self._tensors.keys(), self._tensors.keys() - tensors.keys()
        if self._tensors and missing:
            notes = [_note(f"not in {self.folder}, and written under the run's names", missing)]
            notes += [_note(f"in {self.folder} only, and left out", others)] if others else []
        elif others:
            tied = {name: tensors[twin] for name in sorted(others) if (twin := self._twin(name, tensors)) is not None}
            copied = {name: self._tensors[name] for name in sorted(others) if name not in tied}
            notes = [_note(f"not in the run, and copied from {self.folder}", copied.keys())] if copied else []
            tensors |= tied | copied
        elif not self._tensors and (unread := sorted(self.folder.glob(_UNREAD))):
            notes = [
                f"{unread[0]} was not read: what the run has not, as frozen tensors and buffers, is left out; if there "
                "is any, name a folder that save_pretrained has written as safetensors"
            ]
        self._write(output, tensors, x.metadata())
        return notes

    def _names(self, x: Snapshot) -> dict[str, str]:
        """The names of the run's tensors here: with the prefix more or less by which most of them are found."""
        renamed = [{name: rename(name) for name in x} for rename in _renamings(next(iter(x), ""), self._tensors)]
        return max(
            (names for names in renamed if len({*names.values()}) == len(x)),
            key=lambda names: len(self._tensors.keys() & names.values()),
        )

    def _require_shapes(self, tensors: Mapping[str, StoredTensor]) -> None:
        for name, tensor in tensors.items():
            known = self._tensors.get(name)
            if known is not None and known.shape != tensor.shape:
                raise FreestepError(
                    f"the tensor {name!r} has the shape {list(known.shape)} in {self.folder}, but {list(tensor.shape)} "
                    "in the run: name a folder of the run's model"
                )

    def _twin(self, name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
        """The tensor of the run that a tensor of the folder is equal to. What is constant may be so by chance."""
        data = self._tensors[name].data
        size = self._tensors[name].itemsize
        if data[size:] == data[: len(data) - size]:
            return None
        return next((twin for twin in tensors if self._tensors[twin] == self._tensors[name]), None)

    def _write(self, output: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        for file in sorted({file for pattern in _COPIED for file in self.folder.glob(pattern) if file.is_file()}):
            if not file.name.endswith(".index.json"):
                with file.open("rb") as source, writing(output / file.name) as target:
                    shutil.copyfileobj(source, target)
        with writing(output / _WEIGHTS) as target:
            for piece in content(tensors, metadata):
                target.write(piece)


def _renamings(first: str, known: Mapping[str, StoredTensor]) -> Iterator[Callable[[str], str]]:
    """Ways to rename tensors of which one is called `first`: none, a prefix less, a prefix more."""
    yield str
    parts = first.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        yield partial(_without, prefix)
    for name in known:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            yield partial(add, prefix)


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _note(what: str, names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return f"{what}: {', '.join(listed[:_MOST_NAMED])}{more}"
