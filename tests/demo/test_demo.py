"""The demo's parts, and the whole of it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
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
from rich.console import Console

from freestep import Client, ServiceUnreachable
from freestep.api.models import Metric
from freestep.demo import main as the_demo
from freestep.demo.baselines import LEARNING_RATES, Baseline, Kind, train
from freestep.demo.data import load
from freestep.demo.evaluator import Evaluation
from freestep.demo.exactly_once import Count, counted
from freestep.demo.main import progress, to_try
from freestep.demo.model import SmallConvNet
from freestep.demo.options import end_between_steps
from freestep.demo.plot import draw
from freestep.demo.processes import Processes
from freestep.demo.show import Show
from freestep.demo.worker import shifted
from harness import ProcessService
from meanwhile import wait_until

DEMO_S = 600
"""Seconds for a whole demo on a busy machine: its run ends after two minutes, the rest takes what it takes."""


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


@pytest.mark.parametrize("plain", [False, True])
def test_names_are_displayed_as_they_are(plain: bool, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {name: 1 for name in Evaluation.__annotations__}
    evaluation = Evaluation(**{**fields, "workers": {"gpu[/0]": 7, "[red]:x:": 8}})
    file = io.StringIO()
    with Show(Console(file=file, force_terminal=True, width=200), "http://[/x]:8000", plain=plain) as show:
        show.update(evaluation, 0.5)
        show.show_event("gpu[/0] killed")
    text = file.getvalue() + capsys.readouterr().out
    expected = ["gpu[/0] killed"]
    if not plain:
        expected += ["http://[/x]:8000", "gpu[/0] (7 pushes)  [red]:x: (8 pushes)"]
    assert [each for each in expected if each not in text] == []


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
        x_training_loss=0.5 / (1 + number),
        y_step=100 * number,
        y_accuracy=1 - 0.6 / (1 + number),
        y_loss=2 / (1 + number),
        y_training_loss=1 / (1 + number),
    )


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    baselines = [Baseline(kind, 40 * each, 0.9, 0.3, 0.2) for kind in LEARNING_RATES for each in range(10)]
    draw([evaluation(number) for number in range(5)], [(1002.0, "killed")], baselines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_kept_where_pushes_cannot_be_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(*given: Any, plain: bool) -> bool:
        history = given[4]
        history.append(evaluation(1))
        return True

    def count(*given: Any) -> Count:
        raise ServiceUnreachable("it did not answer")

    monkeypatch.setattr(the_demo, "_start_service", lambda *_: "http://127.0.0.1:1")
    monkeypatch.setattr(the_demo, "_train", trained)
    monkeypatch.setattr(the_demo, "_count", count)
    assert the_demo.run_demo(tmp_path, plain=True) == 1
    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 100
    shown = capsys.readouterr().out
    assert "it did not answer" in shown
    assert "the demo ended early" in shown


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [(0, 0.0, 0.0), (2000, 30.0, 0.5), (4500, 30.0, 1.0), (4500, 10.0, 0.5), (100, 60.0, 0.5), (100, 130.0, 1.0)],
)
def test_progress_goes_by_steps_within_bounds_of_time(step: int, seconds: float, expected: float) -> None:
    assert progress(step, seconds) == pytest.approx(expected)


def test_a_signal_is_heard_after_what_was_said_before_it(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with Processes(tmp_path / "log") as processes:
        processes.start("printer", "this", is_read=True)
        assert processes.read_line(30) == ("printer", "The Zen of Python, by Tim Peters")
        while processes.read_line(30) != ("printer", None):
            pass
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            processes.read_line(30)
        with pytest.raises(TimeoutError):
            processes.read_line(0)
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


@pytest.mark.parametrize("kind", LEARNING_RATES)
def test_a_baseline_spends_its_budget(kind: Kind, digits_file: Path) -> None:
    found = list(train(kind, load(digits_file), 4, lr=0.001))
    assert [each.step for each in found] == [0, 1, 2, 3, 4]
    assert {each.kind for each in found} == {kind}
    assert found[-1].training_loss != found[0].training_loss
    assert found == list(train(kind, load(digits_file), 4, lr=0.001))


@pytest.mark.slow
def test_a_worker_tells_of_each_push_that_was_applied(
    start_process: Callable[..., ProcessService],
    spawn: Callable[..., subprocess.Popen[str]],
    digits_file: Path,
    tmp_path: Path,
) -> None:
    service, told = start_process(), tmp_path / "told"
    told.mkdir()
    for _ in range(2):
        worker = spawn("worker", "--url", service.url, "--data", digits_file, "--steps", 3, "--told", told / "worker")
        assert worker.wait(60) == 0
    with Client(service.url) as client:
        count = counted(client, "digits", told, killed=0)
    assert (count.acknowledged, count.weights) == (6, 6)


@pytest.mark.parametrize(
    ("acknowledged", "weights", "text"),
    [
        (1200, 1200, "pushes acknowledged     1,200\npushes in the weights   1,200: equal"),
        (1200, 1201, "pushes acknowledged     1,200\nunder way at the kill   1\npushes in the weights   1,201: equal"),
        (1200, 1202, "pushes acknowledged     1,200\npushes in the weights   1,202: NOT EQUAL"),
        (1200, 1199, "pushes acknowledged     1,200\npushes in the weights   1,199: NOT EQUAL"),
    ],
    ids=["equal", "one that nobody was told of", "one too many", "one is lost"],
)
def test_pushes_have_to_be_in_the_weights_once(acknowledged: int, weights: int, text: str) -> None:
    count = Count(acknowledged, weights, killed=1)
    assert str(count) == text
    assert count.agrees == ("NOT" not in text)


def test_a_worker_that_is_told_to_end_takes_its_step() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        with end_between_steps() as ending:
            signal.raise_signal(signal.SIGTERM)
            assert ending.is_set()
            # And where the service is away for longer, it ends all the same.
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGALRM)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, "the signal would kill a process that is ending"
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("place", [".", "bin", "elsewhere"])
def test_what_to_try_next_needs_no_active_environment(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "of the user" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("python", "freestep"):
        (programs / name).touch()
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir({".": tmp_path, "bin": programs, "elsewhere": tmp_path / "elsewhere"}[place])
    commands = [shlex.split(line) for line in to_try(Path("o u t")).splitlines() if not line.startswith("  #")]
    *ours, compose = commands
    assert compose[0] == "docker"
    assert ours[0][1:] == ["serve", "--data-dir", "o u t"]
    for program, *_ in ours:
        assert (
            program.startswith(("./", "/")) and Path(program).is_file() and Path(program).resolve().parent == programs
        )
    (programs / "freestep").unlink()
    assert shlex.split(to_try(Path("out")).splitlines()[1])[1:4] == ["-m", "freestep.cli", "serve"]


@pytest.mark.evidence
@pytest.mark.slow
@pytest.mark.timeout(DEMO_S + 30)
def test_the_demo_from_beginning_to_end(tmp_path: Path) -> None:
    (tmp_path / "out" / "service").mkdir(parents=True)
    (tmp_path / "out" / "service" / "mine").touch()
    command = [sys.executable, "-m", "freestep.cli", "demo", "--plain", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEMO_S)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "processes.log").read_text()
    for event in ("worker-2 killed", "worker-5 started"):
        assert event in done.stdout
    first, *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"the service is at (http://127\.0\.0\.1:\d+), and its dashboard at \1/", first)
    assert re.fullmatch(r"pushes in the weights   [\d,]+: equal", last)
    lines = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    history = [line for line in lines if "kind" not in line]
    assert history[-1]["x_accuracy"] >= 0.95
    ends = {line["kind"]: line for line in lines if "kind" in line and line["step"] == history[-1]["step"]}
    assert sorted(ends) == ["constant", "cosine"] and all(end["accuracy"] >= 0.95 for end in ends.values())
    assert (tmp_path / "out" / "plot.png").exists()
    assert (tmp_path / "out" / "service" / "mine").exists(), "the demo removed what is not its own"
    assert "Traceback" not in (tmp_path / "out" / "processes.log").read_text()
    assert not named(tmp_path)


def named(directory: Path) -> list[int]:
    """Processes whose command names the directory: what the demo started in it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(str(directory) in part for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that has made its first steps; whatever it leaves behind is killed."""
    command = [sys.executable, "-m", "freestep.cli", "demo", "--plain", "-o", str(tmp_path / "out")]
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
    # The impatient come again while it is ending its processes.
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
    assert "ended early" in rest and "Traceback" not in rest
    assert not named(tmp_path)
