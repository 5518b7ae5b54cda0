"""The `freestep` command as a person and as a program use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import safetensors
import safetensors.torch
import torch

import forked
from freestep import Client, Run
from freestep.commands.facts import facts
from harness import ThreadService
from plain_calls import TENSORS

pytestmark = pytest.mark.slow

SPEC = {
    "optimizer": {"algorithm": "sgd_schedule_free", "lr": 0.5},
    "parameters": [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()],
}


@pytest.fixture
def run(service: ThreadService) -> Iterator[Run]:
    """A run after one push of `worker-1`, whose lease is held."""
    with Client(service.url) as client:
        made = client.run(f"cli-{uuid.uuid4().hex[:8]}")
        made.create(SPEC)
        made.initialize(TENSORS)
        with made.lease("worker-1") as lease:
            made.push(TENSORS, lease.claim(0, loss=0.5))
            yield made


def freestep(service: ThreadService | str, *arguments: str, stdin: str = "") -> CompletedProcess[str]:
    url = service if isinstance(service, str) else service.url
    return forked.freestep(*arguments, stdin=stdin, FREESTEP_URL=url, COLUMNS="120")


def test_runs_are_listed(service: ThreadService, run: Run) -> None:
    table = freestep(service, "runs", "list")
    assert table.returncode == 0
    (row,) = [line.split() for line in table.stdout.splitlines() if run.name in line]
    assert row == [run.name, "sgd_schedule_free", "ringmaster", "1", "1", "1", "7"]
    documents = json.loads(freestep(service, "runs", "list", "--json").stdout)
    assert run.name in [document["run"] for document in documents]


@pytest.mark.parametrize(("staleness", "shown"), [(None, "-"), (1.5e-27, "0"), (0.62664, "0.627"), (3.0, "3")])
def test_a_staleness_is_shown_to_a_thousandth(run: Run, staleness: float | None, shown: str) -> None:
    assert dict(facts(run.status().model_copy(update={"staleness": staleness})))["staleness"] == shown


def test_a_run_is_shown(service: ThreadService, run: Run) -> None:
    shown = freestep(service, "runs", "show", run.name)
    assert shown.returncode == 0
    for fact in ("sgd_schedule_free", "lr=0.5", "ringmaster", "worker-1", "1 applied", "7 in 3 tensors"):
        assert fact in shown.stdout
    document = json.loads(freestep(service, "runs", "show", run.name, "--json").stdout)
    assert (document["step"], document["loss"]) == (1, 0.5)


def test_a_metric_is_reported(service: ThreadService, run: Run) -> None:
    assert freestep(service, "report", run.name, "accuracy", "0.875", "--step", "1").returncode == 0
    again = freestep(service, "report", run.name, "accuracy", "0.875", "--step", "1", "--epoch", "1", "--json")
    assert json.loads(again.stdout)["replayed"] is True
    assert "accuracy 0.875 at step 1" in freestep(service, "runs", "show", run.name).stdout
    below = freestep(service, "report", run.name, "gain", "--step", "1", "--", "-2e-3")
    assert below.stdout == f"gain of {run.name} at step 1 is -0.002\n"
    assert freestep(service, "report", run.name, "accuracy", "0.5", "--step", "1").returncode == 1
    assert freestep(service, "report", run.name, "accuracy", "nan", "--step", "1").returncode == 2


def test_workers_are_listed(service: ThreadService, run: Run) -> None:
    assert "worker-1" in freestep(service, "workers", run.name).stdout
    (document,) = json.loads(freestep(service, "workers", run.name, "--json").stdout)
    assert (document["worker"], document["pushes"]) == ("worker-1", 1)


@pytest.mark.parametrize("point", ["x", "y", "z"])
def test_a_point_is_pulled_into_a_file(service: ThreadService, run: Run, tmp_path: Path, point: str) -> None:
    file = tmp_path / "model.safetensors"
    done = freestep(service, "pull", run.name, "--point", point, "-o", str(file))
    assert done.returncode == 0
    assert str(file) in done.stdout
    pulled, _ = run.pull(point)  # type: ignore[arg-type]
    loaded = safetensors.torch.load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], pulled[name]) for name in TENSORS)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata()["freestep.step"] == "1"
        assert opened.metadata()["freestep.point"] == point
        assert opened.metadata()["format"] == "pt"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_point_is_pulled_in_a_narrow_dtype_and_said_in_json(service: ThreadService, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    done = freestep(service, "pull", run.name, "-o", str(file), "--dtype", "BF16", "--json")
    assert json.loads(done.stdout) == {"run": run.name, "point": "x", "epoch": 1, "step": 1, "output": str(file)}
    assert safetensors.torch.load_file(file)["w"].dtype == torch.bfloat16


def test_a_point_that_travels_as_int8_is_fp32_in_the_file(service: ThreadService, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert freestep(service, "pull", run.name, "-o", str(file), "--dtype", "I8").returncode == 0
    loaded, pulled = safetensors.torch.load_file(file), run.pull("x", dtype="I8")[0]
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, pulled[name])
    assert freestep(service, "pull", run.name, "-o", str(file), "--dtype", "I4").returncode == 2


def test_a_point_of_a_checkpoint_is_pulled(service: ThreadService, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    done = freestep(service, "pull", run.name, "-o", str(file), "--checkpoint", "0")
    assert (done.returncode, done.stdout) == (0, f"x of {run.name} at step 0 is in {file}\n")
    loaded = safetensors.torch.load_file(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    none = freestep(service, "pull", run.name, "-o", str(file), "--checkpoint", "1")
    assert (none.returncode, "there is no checkpoint of step 1" in none.stderr) == (1, True)
    assert freestep(service, "pull", run.name, "-o", str(file), "--checkpoint", "-1").returncode == 2
    assert run.status().step == 1


def test_checkpoints_are_written_listed_and_gone_back_to(service: ThreadService, run: Run) -> None:
    assert json.loads(freestep(service, "checkpoint", run.name, "--json").stdout)["step"] == 1
    listed = json.loads(freestep(service, "checkpoint", run.name, "--list", "--json").stdout)
    assert [each["step"] for each in listed] == [0, 1]
    assert freestep(service, "checkpoint", run.name, "--list").stdout.count("\n") == 3
    assert freestep(service, "checkpoint", run.name, "--list", "--restore", "0").returncode == 2
    assert json.loads(freestep(service, "checkpoint", run.name, "--restore", "0", "--json").stdout)["epoch"] == 2
    assert run.status().step == 0


def test_a_run_is_deleted_when_that_is_meant(service: ThreadService, run: Run) -> None:
    assert freestep(service, "runs", "delete", run.name, stdin="n\n").returncode != 0
    assert run.status().step == 1
    assert freestep(service, "runs", "delete", run.name, "--yes").returncode == 0
    assert freestep(service, "runs", "show", run.name).returncode == 1


HOSTILE = [
    "gpu[/0]",
    "[red]w[/red]",
    "acc[/top1]",
    "ppl[wikitext]",
    ":boom: [bold",
    "\\[x]",
    "w\x1b[31m\r\n",
    "[@click=a]ü 日",
]
"""Names that rich would take for markup or emoji, and that a terminal would take for commands."""


def shown(name: str) -> str:
    """A name as it is shown: literally, but for control characters."""
    return name.replace("\x1b", "\\x1b").replace("\r", "\\r").replace("\n", "\\n")


@pytest.fixture
def hostile(service: ThreadService) -> Iterator[Run]:
    """A run whose workers, metrics, parameters and groups have these names."""
    with Client(service.url) as client, ExitStack() as leases:
        made = client.run(f"cli-{uuid.uuid4().hex[:8]}")
        parameters = [{"name": name, "shape": [2], "group": name} for name in HOSTILE]
        made.create({**SPEC, "parameters": parameters, "groups": {name: {"lr": 0.1} for name in HOSTILE}})
        made.initialize({name: torch.zeros(2) for name in HOSTILE})
        held = [leases.enter_context(made.lease(name)) for name in HOSTILE]
        made.push({name: torch.ones(2) for name in HOSTILE}, held[0].claim(0))
        for name in HOSTILE:
            made.report(name, 0.5, 1)
        yield made


def test_hostile_names_are_shown_as_they_are(service: ThreadService, hostile: Run, tmp_path: Path) -> None:
    run = hostile.name

    def output(*arguments: str) -> str:
        done = forked.freestep(*arguments, FREESTEP_URL=service.url, COLUMNS="1000")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert "\x1b" not in done.stdout
        return done.stdout

    def assert_shown(text: str, form: str = "{}") -> None:
        assert [name for name in HOSTILE if form.format(shown(name)) not in text] == []

    assert_shown(output("workers", run))
    facts = output("runs", "show", run)
    assert_shown(facts, "{} 0.5 at step 1")
    assert_shown(next(line for line in facts.splitlines() if line.split()[:1] == ["workers"]))
    assert run in output("runs", "list")
    assert "no owner" not in output("runs", "topology", run)
    file = tmp_path / "model[red]:x:.safetensors"
    assert output("pull", run, "-o", str(file)).endswith(f"is in {file}\n")
    assert safetensors.torch.load_file(file).keys() == set(HOSTILE)
    assert set(json.loads(output("runs", "show", run, "--json"))["metrics"]) == set(HOSTILE)
    output("checkpoint", run)
    for going_back in (("checkpoint", run, "--restore", "1"), ("runs", "reshard", run, "--shards", "1")):
        assert_shown(output(*going_back), "{} 0.5 at step 1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "show", "{}"),
        ("runs", "topology", "{}"),
        ("runs", "reshard", "{}", "--shards", "2"),
        ("runs", "delete", "{}", "--yes"),
        ("workers", "{}"),
        ("checkpoint", "{}"),
        ("workers", "{}", "--watch"),
        ("pull", "{}", "-o", "none"),
        ("report", "{}", "{}", "1", "--step", "1"),
    ],
    ids=" ".join,
)
def test_a_hostile_argument_is_repeated_as_it_is(service: ThreadService, arguments: tuple[str, ...]) -> None:
    name = "[/0] :x: [red]\x1b[31m\r\n"
    done = freestep(service, *(each.format(name) for each in arguments))
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("freestep: ") and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr and "Traceback" not in done.stderr
    if "delete" in arguments:
        asked = freestep(service, "runs", "delete", name, stdin="n\n")
        assert asked.stdout.startswith(f"Delete the run {shown(name)} and its checkpoints?")


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "show", "{}"),
        ("end-worker", "run", "{}"),
        ("dashboard", "{}"),
        ("set", "run", "lr={}"),
        ("set", "run", "{}=1"),
        ("events", "run", "--after", "{}"),
    ],
    ids=" ".join,
)
def test_an_argument_that_is_no_utf_8_is_refused(service: ThreadService, arguments: tuple[str, ...]) -> None:
    done = freestep(service, *(each.format(os.fsdecode(b"\xff")) for each in arguments))
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("freestep: ") and done.stderr.count("\n") == 1


def from_nothing(service: ThreadService, script: str, *arguments: str, **environment: str) -> CompletedProcess[bytes]:
    """A command that a shell's script starts, with a Python that opens its streams anew."""
    return subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "freestep.cli", *arguments],
        env={**os.environ, "FREESTEP_URL": service.url, **environment},
        capture_output=True,
        check=False,
    )


def test_what_the_output_has_no_characters_for_is_shown_as_escapes(service: ThreadService, run: Run) -> None:
    report = ("report", run.name, "日", "1", "--step", "1")
    done = from_nothing(service, 'exec "$@"', *report, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"\\u65e5 of %s at step 1 is 1\n" % run.name.encode()), done.stderr


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_full_disk_behind_the_output_is_2(service: ThreadService, tmp_path: Path, as_json: tuple[str, ...]) -> None:
    streams = [Path(os.devnull), Path("/dev/full"), tmp_path / "stderr"]
    streams[2].touch()
    code = forked.join(forked.start("runs", "list", *as_json, streams=streams, FREESTEP_URL=service.url))
    assert (code, streams[2].read_text()) == (2, "freestep: the output cannot be written: No space left on device\n")


def test_who_closes_the_standard_streams_has_the_command_work_all_the_same(service: ThreadService) -> None:
    closed = from_nothing(service, 'exec "$@" <&- >&-', "runs", "list", "--json")
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_refused_is_1(service: ThreadService) -> None:
    done = freestep(service, "runs", "show", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "freestep: there is no run 'nobody'\n"


@pytest.mark.parametrize(
    "arguments",
    [("runs", "show"), ("pull", "run"), ("pull", "run", "-o", "f", "--point", "w"), ("nonsense",), ("runs", "--bad")],
)
def test_used_wrongly_is_2(service: ThreadService, arguments: tuple[str, ...]) -> None:
    done = freestep(service, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("{}",), ("runs", "{}"), ("pull", "run", "-o", "f", "--point", "{}"), ("evaluate", "run", "{}.py:f")]
)
def test_what_was_used_wrongly_is_repeated_as_it_is(service: ThreadService, arguments: tuple[str, ...]) -> None:
    done = freestep(service, *(each.format("[/0]:x:[red]") for each in arguments))
    assert done.returncode == 2
    assert "[/0]:x:[red]" in done.stderr


def test_a_file_that_cannot_be_written_is_2(service: ThreadService, run: Run, tmp_path: Path) -> None:
    done = freestep(service, "pull", run.name, "-o", str(tmp_path / "none" / "file"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_a_service_that_is_away_is_3() -> None:
    done = freestep("http://127.0.0.1:9", "runs", "list")
    assert done.returncode == 3
    assert "did not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_tells_of_every_command(service: ThreadService) -> None:
    help_ = freestep(service, "--help").stdout
    for command in ("serve", "runs", "workers", "pull", "evaluate", "checkpoint", "demo"):
        assert command in help_
    assert "--redis-url" in freestep(service, "serve", "--help").stdout
