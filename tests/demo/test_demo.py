"""The demo's parts, and the whole of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from freestep import Client
from freestep.demo.data import load
from freestep.demo.evaluator import Evaluation
from freestep.demo.model import SmallConvNet
from freestep.demo.plot import draw
from freestep.demo.worker import shifted
from harness import ProcessService


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("digits") / "digits.pt"
    load(file)
    return file


def test_the_digits_are_always_split_in_the_same_way(digits_file: Path) -> None:
    digits = load(digits_file)
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert sorted(digits.test_labels.unique().tolist()) == list(range(10))
    fresh = load()
    assert all(torch.equal(one, other) for one, other in zip(digits, fresh, strict=True))


def test_the_model_has_as_many_parameters_as_it_says() -> None:
    model = SmallConvNet()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters" in (SmallConvNet.__doc__ or "")
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_shifted_images_keep_their_ink() -> None:
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    moved = shifted(images, torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved.sum((1, 2, 3)), images.sum((1, 2, 3)))


def evaluation(number: int) -> Evaluation:
    return Evaluation(
        time=1000.0 + number,
        epoch=1,
        step=100 * number,
        workers={"worker-1": 100 * number},
        staleness=1.0,
        train_loss=1 / (1 + number),
        x_step=100 * number,
        x_accuracy=1 - 0.5 / (1 + number),
        x_loss=1 / (1 + number),
        y_step=100 * number,
        y_accuracy=1 - 0.6 / (1 + number),
        y_loss=2 / (1 + number),
    )


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    draw([evaluation(number) for number in range(5)], [(1002.0, "killed")], 1000.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts modules of the demo as processes; they are killed with the test, if they have not ended."""
    running: list[subprocess.Popen[str]] = []

    def start(module: str, *arguments: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"freestep.demo.{module}", *map(str, arguments)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_workers_come_and_go_while_an_evaluator_looks_on(
    start_process: Callable[..., ProcessService], spawn: Callable[..., subprocess.Popen[str]], digits_file: Path
) -> None:
    service = start_process()
    common = ("--url", service.url, "--data", digits_file)
    evaluator = spawn("evaluator", *common, "--json", "--every", 0.1)
    killed = spawn("worker", *common, "--worker", "killed")
    stopped = spawn("worker", *common, "--worker", "stopped")
    assert evaluator.stdout is not None
    seen = [json.loads(evaluator.stdout.readline())]
    while seen[-1]["step"] < 30 or len(seen[-1]["workers"]) < 2:
        seen.append(json.loads(evaluator.stdout.readline()))
    killed.kill()
    joined = spawn("worker", *common, "--worker", "joined", "--steps", 20)
    assert joined.wait(60) == 0
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 0
    with Client(service.url) as client:
        run = client.run("digits")
        assert "stopped" not in [worker.worker for worker in run.workers()]
        while run.workers():
            pass
        step = run.status().step
        assert step >= 50
        while seen[-1]["step"] < step:
            seen.append(json.loads(evaluator.stdout.readline()))
        last = Evaluation(**seen[-1])
        assert last.x_accuracy > 0.5
        assert last.x_step == last.y_step == step
        run.delete()


@pytest.mark.slow
def test_the_demo_from_beginning_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "freestep.cli", "demo", "--plain", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "processes.log").read_text()
    for event in ("worker-2 killed", "worker-5 joined"):
        assert event in done.stdout
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert history[-1]["x_accuracy"] >= 0.95
    assert (tmp_path / "out" / "plot.png").exists()
    assert "Traceback" not in (tmp_path / "out" / "processes.log").read_text()
    assert not named(tmp_path)


def named(directory: Path) -> list[int]:
    """Processes whose command names the directory: what the demo started in it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(str(directory) in part for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "freestep.cli", "demo", "--plain", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    os.killpg(process.pid, number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not named(tmp_path)
