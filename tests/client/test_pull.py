"""`freestep pull` into files of each format, links, pipes, devices and standard output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import safetensors.torch
import torch

import forked
from freestep import Client, Run
from harness import ThreadService
from meanwhile import under_way
from plain_calls import TENSORS, Api

pytestmark = pytest.mark.slow


@pytest.fixture
def run(service: ThreadService, api: Api) -> Iterator[Run]:
    api.create()
    with Client(service.url) as client:
        yield client.run(api.run)


def pull(run: Run, service: ThreadService, *arguments: str) -> CompletedProcess[str]:
    return forked.freestep("pull", run.name, *arguments, FREESTEP_URL=service.url, COLUMNS="120")


def assert_weights(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I8"])
def test_a_state_dict_is_loaded_by_torch(service: ThreadService, run: Run, tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "model.pt"
    done = pull(run, service, "--format", "torch", "--dtype", dtype, "-o", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    loaded, (x, _) = torch.load(file, weights_only=True), run.pull("x", dtype=dtype)
    assert list(loaded) == list(TENSORS)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, x[name]) and tensor.dtype == x[name].dtype
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_link_is_written_through(service: ThreadService, run: Run, tmp_path: Path, format: str) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_bytes(b"old")
    link.symlink_to("target")
    assert pull(run, service, "-o", str(link), "--format", format).returncode == 0
    assert link.is_symlink() and not target.is_symlink()
    load = safetensors.torch.load_file if format == "safetensors" else torch.load
    assert_weights(load(target))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_pipe_is_written_through(service: ThreadService, run: Run, tmp_path: Path, format: str) -> None:
    pipe, read = tmp_path / "pipe", tmp_path / "read"
    os.mkfifo(pipe)
    reading = under_way(pipe.read_bytes)
    assert pull(run, service, "-o", str(pipe), "--format", format).returncode == 0
    assert pipe.is_fifo()
    read.write_bytes(reading.result())
    assert_weights(safetensors.torch.load_file(read) if format == "safetensors" else torch.load(read))


def test_a_device_is_written_through(service: ThreadService, run: Run) -> None:
    assert pull(run, service, "-o", "/dev/null").returncode == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_device_that_is_full_is_2(service: ThreadService, run: Run, format: str) -> None:
    done = pull(run, service, "-o", "/dev/full", "--format", format)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "freestep: /dev/full cannot be written: No space left on device\n"


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_standard_output_has_the_file_alone(
    service: ThreadService, run: Run, tmp_path: Path, output: str, format: str
) -> None:
    streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()
    process = forked.start(
        "pull", run.name, "-o", output, "--format", format, streams=streams, FREESTEP_URL=service.url
    )
    assert forked.join(process) == 0
    assert_weights(safetensors.torch.load_file(streams[1]) if format == "safetensors" else torch.load(streams[1]))
    assert streams[2].read_text() == f"x of {run.name} at step 0 is in {output}\n"


def test_a_file_called_minus_is_named_with_its_folder(service: ThreadService, run: Run, tmp_path: Path) -> None:
    done = pull(run, service, "--json", "-o", str(tmp_path / "-"))
    assert json.loads(done.stdout)["output"] == str(tmp_path / "-")
    assert_weights(safetensors.torch.load_file(tmp_path / "-"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-o", "-", "--json"), "takes one thing"),
        (("-o", "f", "--format", "hf"), "go together"),
        (("-o", "f", "--like", "."), "go together"),
        (("-o", "-", "--format", "hf", "--like", "."), "takes one thing"),
        (("-o", "f", "--format", "hf", "--like", "/dev"), "/dev has no config.json"),
        (("-o", "f", "--format", "pickle"), "pickle"),
    ],
)
def test_what_does_not_go_together_is_2(
    service: ThreadService, run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    done = pull(run, service, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert not Path("f").exists()
