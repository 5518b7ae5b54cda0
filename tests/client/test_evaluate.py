"""`freestep evaluate` with functions as users write them: what is reported, kept and said, and how it ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import safetensors.torch
import torch

import forked
from freestep import Client, Run
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import TENSORS, Api

pytestmark = pytest.mark.slow

SCRIPT = """
import beside
import time
from dataclasses import dataclass

def accuracy(x):
    return x["b"] / 4

def several(x, step):
    return {"ppl[wikitext]": beside.SCALE * x["w"].abs().max(), "acc[/top1]": step + 0.5, "loss": 1}

def first_above(x, step, at=2):
    return step if step < at else {"first_above": -step}

def no_number(x):
    return "high"

def no_numbers(x):
    return {"a": [1]}

def huge(x): return {"a": 10**400}

highest = max

def nothing(x): pass

def infinite(x):
    return {"fine": 1.0, "ppl": float("inf")}

def nameless(x):
    return {"": 1.0}

def wrong(x):
    return inner(x)

def inner(x):
    return x["there is none"]

def needs_two(x, at):
    return 0.0

class Swallowing:
    def __del__(self):
        print("begun", flush=True)
        while True:
            time.sleep(0.01)

def leaves(x):
    raise SystemExit

def leaves_with_3(x):
    raise SystemExit(3)

def swallowing(x):
    Swallowing()
    return 0.0

DATA = 3

if __name__ == "__main__":
    raise SystemExit("run as a script")
"""
GRADIENT = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Functions of a user's, beside a module that they import."""
    (tmp_path / "beside.py").write_text("SCALE = 2")
    path = tmp_path / "typing.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def run(service: ThreadService, api: Api) -> Iterator[Run]:
    """A run whose `b` is 2 at step 0 and at step 1."""
    api.create(optimizer={"algorithm": "sgd", "lr": 1.0})
    with Client(service.url) as client:
        yield client.run(api.run)


def push(run: Run, steps: int = 1) -> None:
    with run.lease() as lease:
        for _ in range(steps):
            run.push(GRADIENT, lease.claim(run.status().step))


def evaluate(run: Run, service: ThreadService, function: object, *arguments: str) -> CompletedProcess[str]:
    environment = {"FREESTEP_URL": service.url, "COLUMNS": "200"}
    return forked.freestep("evaluate", run.name, str(function), "--once", *arguments, **environment)


def test_a_number_is_called_like_the_function(run: Run, service: ThreadService, script: Path) -> None:
    done = evaluate(run, service, f"{script}:accuracy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "step 0: accuracy 0.5\n", "")
    metric = run.status().metrics["accuracy"]
    assert (metric.value, metric.step) == (0.5, 0)


def test_a_dict_has_several_and_a_step_is_given_where_it_is_taken(
    run: Run, service: ThreadService, script: Path
) -> None:
    push(run)
    done = evaluate(run, service, f"{script}:several")
    assert (done.returncode, done.stdout) == (0, "step 1: ppl[wikitext] 10, acc[/top1] 1.5, loss 1\n"), done.stderr
    found = {name: metric.value for name, metric in run.status().metrics.items()}
    assert found == {"ppl[wikitext]": 10.0, "acc[/top1]": 1.5, "loss": 1.0}
    document = json.loads(evaluate(run, service, f"{script}:several", "--json").stdout)
    assert document == {"run": run.name, "epoch": 1, "step": 1, "metrics": found, "kept": False}


def test_the_best_is_kept(run: Run, service: ThreadService, script: Path, tmp_path: Path) -> None:
    file, function = tmp_path / "best", f"{script}:several"
    keep = (function, "--keep-best", "loss", str(file), "--mode", "min")
    done = evaluate(run, service, *keep)
    assert (done.returncode, done.stdout) == (0, "step 0: ppl[wikitext] 8, acc[/top1] 0.5, loss 1 (best so far)\n")
    push(run)
    assert json.loads(evaluate(run, service, *keep, "--json").stdout)["kept"] is False
    assert torch.equal(safetensors.torch.load_file(file)["w"], TENSORS["w"])
    unclear = evaluate(run, service, function, "--keep-best", "loss", str(tmp_path / "other"))
    assert (unclear.returncode, "smaller or a larger 'loss' better? Say --mode min or" in unclear.stderr) == (2, True)
    other = evaluate(run, service, function, "--keep-best", "acc[/top1]", str(file))
    assert (other.returncode, "has the metric 'loss'" in other.stderr) == (2, True)
    missing = evaluate(run, service, function, "--keep-best", "top5", str(tmp_path / "other"))
    assert (missing.returncode, "returned no 'top5'" in missing.stderr) == (1, True)
    full = evaluate(run, service, function, "--keep-best", "acc[/top1]", str(tmp_path / "none" / "file"))
    assert (full.returncode, "cannot be written: No such file" in full.stderr) == (2, True)
    assert evaluate(run, service, function, "--mode", "min").returncode == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("no_number", "returned 'high': a number, or a dict of numbers by name, is needed"),
        ("no_numbers", "returned {'a': [1]}: a number, or a dict of numbers by name, is needed"),
        ("huge", "returned {'a': 1000"),
        ("highest", "returned 'w': a number, or a dict of numbers by name, is needed"),
        ("nothing", "returned None: a number, or a dict of numbers by name, is needed"),
        ("infinite", "returned ppl=inf at step 0: Input should be a finite number"),
        ("nameless", "returned =1 at step 0: "),
        ("wrong", "failed at step 0: KeyError: 'there is none'"),
        ("needs_two", "failed at step 0: TypeError: needs_two() missing 1 required positional argument: 'at'"),
    ],
)
def test_a_fault_of_the_function_is_1(
    run: Run, service: ThreadService, script: Path, function: str, reason: str
) -> None:
    done = evaluate(run, service, f"{script}:{function}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"freestep: {script}:{function} {reason}" in done.stderr
    if function == "wrong":
        # The user's frames, and none of the command's.
        assert [line.split(", ")[-1] for line in done.stderr.splitlines() if "File " in line] == [
            "in wrong",
            "in inner",
        ]
    assert not run.status().metrics


@pytest.mark.parametrize(
    ("content", "reason"),
    [("import nonexistent", "ModuleNotFoundError: No module named"), ("def f(x):\n  (", "SyntaxError: ")],
)
def test_a_fault_of_the_script_is_1(run: Run, service: ThreadService, script: Path, content: str, reason: str) -> None:
    script.write_text(content)
    done = evaluate(run, service, f"{script}:f")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"freestep: {script} failed: {reason}" in done.stderr
    assert str(script) in done.stderr.partition("freestep: ")[0]
    assert "commands/" not in done.stderr


@pytest.mark.parametrize(
    ("script_of", "function", "code", "message"),
    [
        (SCRIPT, "leaves", 1, "{} called sys.exit() at step 0, and returned no metrics"),
        (SCRIPT, "leaves_with_3", 3, None),
        ("import sys; sys.exit(0)", "f", 1, "{} called sys.exit() before anything was evaluated: put what it does"),
        ("import sys; sys.exit(3)", "f", 3, None),
    ],
)
def test_a_script_that_ends_the_command_has_evaluated_nothing(
    run: Run, service: ThreadService, script: Path, script_of: str, function: str, code: int, message: str | None
) -> None:
    script.write_text(script_of)
    done = evaluate(run, service, f"{script}:{function}")
    assert (done.returncode, done.stdout) == (code, "")
    place = f"{script}:{function}" if function == "leaves" else f"{script}"
    assert done.stderr == "" if message is None else done.stderr.startswith(f"freestep: {message.format(place)}")
    assert not run.status().metrics


@pytest.mark.parametrize("function", ["{}", "{}:", ":f", "{}:DATA", "{}:missing", "{}.none:f", "{}:not a name"])
def test_a_function_that_is_not_there_is_2(run: Run, service: ThreadService, script: Path, function: str) -> None:
    done = evaluate(run, service, function.format(script))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr and "freestep: " in done.stderr


def test_a_run_that_is_not_there_is_1(service: ThreadService, script: Path) -> None:
    done = forked.freestep("evaluate", "nobody", f"{script}:accuracy", FREESTEP_URL=service.url)
    assert (done.returncode, done.stderr) == (1, "freestep: there is no run 'nobody'\n")


def test_what_the_service_does_not_take_is_said_and_left(run: Run, service: ThreadService, script: Path) -> None:
    run.report("accuracy", 0.25, 0)
    done = evaluate(run, service, f"{script}:accuracy")
    assert (done.returncode, done.stdout) == (0, "step 0: accuracy 0.5\n")
    assert done.stderr.startswith("freestep: accuracy 0.5 at step 0 is not reported: ")


def test_a_signal_that_the_function_swallows_ends_it_all_the_same(
    run: Run, service: ThreadService, script: Path, tmp_path: Path
) -> None:
    streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()
    function = f"{script}:swallowing"
    process = forked.start("evaluate", run.name, function, streams=streams, FREESTEP_URL=service.url)
    wait_until(lambda: streams[1].read_text() == "begun\n")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert forked.join(process) == 128 + signal.SIGTERM
    assert streams[1].read_text() == "begun\nstep 0: swallowing 0\n"


def test_new_points_are_evaluated_until_it_is_interrupted(
    start_process: Callable[..., ProcessService], script: Path, tmp_path: Path
) -> None:
    service = start_process()
    with Client(service.url, retry_for=100.0) as client:
        run = Api(service.url)
        run.create(optimizer={"algorithm": "sgd", "lr": 1.0})
        run.http.close()
        remote = client.run(run.run)
        streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.touch()
        lines = ["step 0: first_above 0", "step 2: first_above -2", "step 5: first_above -5"]
        arguments = ("evaluate", remote.name, f"{script}:first_above", "--every", "2")
        process = forked.start(*arguments, streams=streams, FREESTEP_URL=service.url)
        wait_until(lambda: streams[1].read_text().splitlines() == lines[:1])
        push(remote, 2)
        wait_until(lambda: streams[1].read_text().splitlines() == lines[:2])
        remote.checkpoint()
        # It bears with the service being away.
        service.stop()
        service.start()
        with remote.lease() as lease:
            for step in range(2, 5):
                remote.push(GRADIENT, lease.claim(step))
        wait_until(lambda: streams[1].read_text().splitlines()[-1] in (lines[2], "step 4: first_above -4"))
        assert remote.workers() == []
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert forked.join(process) == 130
    assert "Traceback" not in streams[2].read_text()


def test_sigterm_ends_it_in_order(run: Run, service: ThreadService, script: Path, tmp_path: Path) -> None:
    streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()
    arguments = ("evaluate", run.name, f"{script}:accuracy")
    process = forked.start(*arguments, streams=streams, FREESTEP_URL=service.url)
    # It waits for the next step then.
    wait_until(lambda: streams[1].read_text() == "step 0: accuracy 0.5\n")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert forked.join(process) == 143
    assert streams[2].read_text() == ""
