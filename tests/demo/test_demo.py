"""The demo: its parts, and whole runs of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from freestep import Client
from freestep.api.models import Metric
from freestep.demo.data import load
from freestep.demo.evaluator import Evaluation
from freestep.demo.main import progress
from freestep.demo.model import SmallConvNet
from freestep.demo.plot import draw
from freestep.demo.processes import Processes
from freestep.demo.worker import shifted
from harness import ProcessService
from meanwhile import wait_until


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


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [(0, 0.0, 0.0), (3000, 30.0, 0.5), (6500, 30.0, 1.0), (6500, 10.0, 0.5), (100, 60.0, 0.5), (100, 130.0, 1.0)],
)
def test_progress_goes_by_steps_within_bounds_of_time(step: int, seconds: float, expected: float) -> None:
    assert progress(step, seconds) == pytest.approx(expected)


def test_a_signal_is_heard_after_what_was_said_before_it(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with Processes(tmp_path / "log") as processes:
        processes.start("printer", "this", heard=True)
        assert processes.hear(30) == ("printer", "The Zen of Python, by Tim Peters")
        while processes.hear(30) != ("printer", None):
            pass
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            processes.hear(30)
        with pytest.raises(TimeoutError):
            processes.hear(0)
    assert signal.getsignal(signal.SIGTERM) == handler


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


@pytest.mark.evidence
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
        wait_until(lambda: not run.workers())
        step = run.status().step
        assert step >= 50
        while seen[-1]["step"] < step:
            seen.append(json.loads(evaluator.stdout.readline()))
        last = Evaluation(**seen[-1])
        assert last.x_accuracy > 0.5
        assert last.x_step == last.y_step == step
        assert run.status().metrics == {"accuracy": Metric(value=last.x_accuracy, step=step)}
        run.delete()


@pytest.mark.evidence
@pytest.mark.slow
def test_a_worker_and_an_evaluator_ride_out_a_restart(
    start_process: Callable[..., ProcessService],
    spawn: Callable[..., subprocess.Popen[str]],
    digits_file: Path,
    tmp_path: Path,
) -> None:
    service = start_process()
    common = ("--url", service.url, "--data", digits_file, "--run", "restarted")
    figures = tmp_path / "figures.jsonl"
    worker = spawn("worker", *common, "--seed", 1)
    evaluator = spawn("evaluator", *common, "--json", "--every", 0.1, "--output", figures)
    assert evaluator.stdout is not None
    seen = [json.loads(evaluator.stdout.readline())]
    while seen[-1]["step"] < 30:
        seen.append(json.loads(evaluator.stdout.readline()))
    service.kill()
    service.start()
    while seen[-1]["epoch"] == seen[0]["epoch"] or seen[-1]["step"] < 30:
        seen.append(json.loads(evaluator.stdout.readline()))
    assert [json.loads(line) for line in figures.read_text().splitlines()[: len(seen)]] == seen
    with Client(service.url) as client:
        client.run("restarted").delete()
    assert worker.wait(60) == 0
    assert evaluator.poll() is None


@pytest.mark.evidence
@pytest.mark.slow
def test_the_demo_from_beginning_to_end(tmp_path: Path) -> None:
    (tmp_path / "out" / "service").mkdir(parents=True)
    (tmp_path / "out" / "service" / "mine").touch()
    command = [sys.executable, "-m", "freestep_command", "demo", "--plain", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "processes.log").read_text()
    for event in ("worker-2 killed", "worker-5 joined"):
        assert event in done.stdout
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert history[-1]["x_accuracy"] >= 0.95
    assert (tmp_path / "out" / "plot.png").exists()
    assert (tmp_path / "out" / "service" / "mine").exists(), "the demo removed what is not its own"
    assert "Traceback" not in (tmp_path / "out" / "processes.log").read_text()
    assert not named(tmp_path)


def named(directory: Path) -> list[int]:
    """Processes whose command line contains the directory: those that the demo started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(str(directory) in part for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that has made its first steps; processes that it leaves behind are killed."""
    command = [sys.executable, "-m", "freestep_command", "demo", "--plain", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    yield process
    for pid in {process.pid, *named(tmp_path)}:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    process.communicate()


@pytest.mark.evidence
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nothing_running(
    demo: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    os.killpg(demo.pid, number)
    assert demo.stdout is not None
    for line in demo.stdout:
        if line == "interrupted\n":
            break
    # More signals, while it is ending its processes.
    for again in (signal.SIGINT, signal.SIGTERM):
        os.killpg(demo.pid, again)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in rest
    assert not named(tmp_path)


@pytest.mark.evidence
@pytest.mark.slow
def test_a_demo_whose_service_dies_says_so_and_leaves_nothing_running(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    service = next(child for child in psutil.Process(demo.pid).children() if "serve" in child.cmdline())
    service.kill()
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "broke off" in rest and "Traceback" not in rest
    assert not named(tmp_path)
