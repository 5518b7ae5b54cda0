"""`freestep follow`: curves of a run in trackers, over restarts; each tracker is the real one, without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import forked
from freestep import Client, InvalidSetting, Run
from freestep.integrations.follow import Ending, follow
from freestep.integrations.trackers import KINDS, Target, TrackerFailed
from harness import ProcessService, ThreadService
from meanwhile import wait_until

SPEC = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "parameters": [{"name": "w", "shape": [2]}],
    "aggregation": {"policy": "async"},
}


class Kept:
    """A tracker of a user's own."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.points.append((step, dict(metrics)))

    def steps(self, name: str = "train/loss") -> list[int]:
        return [step for step, metrics in self.points if name in metrics]


class Broken:
    """A tracker that takes no loss."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "train/loss" in metrics:
            raise OSError("no space left")


@pytest.fixture
def trained(run: Run) -> Run:
    """A run after three pushes and a report."""
    run.create(SPEC)
    run.initialize({"w": torch.zeros(2)})
    push(run, 0, 3)
    run.report("val/acc", 0.5, 3)
    return run


def push(run: Run, first: int, count: int) -> None:
    with run.lease("worker-1") as lease:
        for step in range(first, first + count):
            run.push({"w": torch.ones(2)}, lease.claim(step, loss=step / 4))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads in a folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    made = {}
    for name in read.Tags()["tensors"]:
        made[name] = [(each.step, each.tensor_proto.float_val[0]) for each in read.Tensors(name)]
    return made


def test_a_tracker_of_ones_own_has_the_curves(trained: Run, tmp_path: Path) -> None:
    kept, state = Kept(), tmp_path / "state.json"
    follow(trained, [kept], state, is_live=False)
    losses = [(step, metrics["train/loss"]) for step, metrics in kept.points if "train/loss" in metrics]
    assert losses == [(1, 0.0), (2, 0.25), (3, 0.5)]
    assert (3, {"eval/val/acc": 0.5}) in kept.points
    assert kept.points[0] == (0, {"run/epoch": 1})
    before = len(kept.points)
    push(trained, 3, 2)
    follow(trained, [kept], state, is_live=False)
    assert kept.steps() == [1, 2, 3, 4, 5]
    assert len(kept.points) == before + 2


def test_what_a_tracker_did_not_take_comes_again(trained: Run, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    with pytest.raises(TrackerFailed, match="Broken: OSError: no space left"):
        follow(trained, [Broken()], state, is_live=False)
    kept = Kept()
    follow(trained, [kept], state, is_live=False)
    assert kept.steps() == [1, 2, 3]
    assert kept.steps("run/epoch") == []


def test_trackers_of_one_class_all_have_the_curves(trained: Run, tmp_path: Path) -> None:
    first, second = Kept(), Kept()
    follow(trained, [first, second], tmp_path / "state.json", is_live=False)
    assert first.points == second.points
    assert first.steps() == [1, 2, 3]


def test_a_state_file_that_cannot_be_written_is_no_failure_of_a_tracker(trained: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = tmp_path / "states"
    folder.mkdir()

    class Remover:
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            shutil.rmtree(folder)

    to = [Target("tensorboard", str(tmp_path / "logs")), Remover()]
    with pytest.raises(FileNotFoundError, match="state"):
        follow(trained, to, folder / "state.json", is_live=False)


def test_state_of_another_run_is_refused(trained: Run, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    follow(trained, [], state, is_live=False)
    document = json.loads(state.read_text())
    for change, said in (({"run": "other"}, "another run, other"), ({"run_id": "1"}, "an earlier run")):
        state.write_text(json.dumps(document | change))
        with pytest.raises(InvalidSetting, match=said):
            follow(trained, [Kept()], state, is_live=False)
    changed = ({"gathered": {"tea": 1}}, {"gathered": {"made_at": "x"}}, {"after": 5}, {"key": None})
    for text in ("", "[]", "{}", *(json.dumps(document | change) for change in changed)):
        state.write_text(text)
        with pytest.raises(InvalidSetting, match="does not tell"):
            follow(trained, [Kept()], state, is_live=False)


@pytest.mark.parametrize("text", ["", "tensorboard", "tensorboard:", "aim:here", "TensorBoard:x"])
def test_what_names_no_tracker_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match="names no tracker: tensorboard:DIR; "):
        Target.parse(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_said_before_anything_is_read(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name in [name for name in sys.modules if name == kind or name.startswith(f"{kind}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.delitem(sys.modules, f"freestep.integrations.{kind}", raising=False)
    package = {"mlflow": "mlflow-skinny"}.get(kind, kind)
    kept, state = Kept(), tmp_path / "state.json"
    with pytest.raises(InvalidSetting, match=rf"^{kind}:here needs a package \(.*\): pip install {package}$"):
        follow(trained, [kept, Target(kind, "here")], state, is_live=False)
    assert not kept.points
    assert not state.exists()


def test_curves_are_in_tensorboard(trained: Run, service: ThreadService, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    to = ["--to", f"tensorboard:{tmp_path / 'a'}", "--to", f"tensorboard:{tmp_path / 'b'}"]
    state = ["--state", str(tmp_path / "state"), "--once"]
    done = forked.freestep("follow", trained.name, *to, *state, FREESTEP_URL=service.url)
    assert done.returncode == 0, done.stderr
    for folder in ("a", "b"):
        found = scalars(tmp_path / folder / trained.name)
        assert found["train/loss"] == [(1, 0.0), (2, 0.25), (3, 0.5)]
        assert found["eval/val/acc"] == [(3, 0.5)]
        assert found["run/staleness"] == [(1, 0.0), (2, 0.0), (3, 0.0)]


def following(run: Run, url: str, folder: Path) -> tuple[BaseProcess, list[Path]]:
    """The command, which writes into a folder; and the files of its streams."""
    streams = [folder / name for name in ("in", "out", "err")]
    for stream in streams:
        stream.write_text("")
    to = ("--to", f"tensorboard:{folder}", "--state", str(folder / "state"))
    return forked.start("follow", run.name, *to, streams=streams, FREESTEP_URL=url), streams


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in scalars(folder).get("train/loss", ())] if folder.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_next_goes_on(
    trained: Run, service: ThreadService, tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = tmp_path / trained.name
    for steps in range(3, 6):
        process, streams = following(trained, service.url, tmp_path)
        wait_until(lambda steps=steps: len(steps_in(folder)) == steps, deadline_s=60)  # type: ignore[misc]
        assert process.pid is not None
        os.kill(process.pid, number)
        assert forked.join(process) == 0, streams[2].read_text()
        assert "has where to go on" in streams[1].read_text()
        push(trained, steps, 1)
    assert steps_in(folder) == [1, 2, 3, 4, 5]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Ending() as ending:
            signal.raise_signal(signal.SIGINT)
            assert not ending.is_due
            signal.raise_signal(signal.SIGTERM)
            assert ending.is_due
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_killed_one_leaves_no_gap(trained: Run, service: ThreadService, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = tmp_path / trained.name
    for steps in (3, 4):
        process, _ = following(trained, service.url, tmp_path)
        wait_until(lambda steps=steps: steps in steps_in(folder), deadline_s=60)  # type: ignore[misc]
        process.kill()
        forked.join(process)
        push(trained, steps, 1)
    assert sorted(set(steps_in(folder))) == [1, 2, 3, 4]


@pytest.mark.slow
def test_it_goes_on_when_the_service_has_crashed(
    start_process: Callable[..., ProcessService], name: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    service = start_process()
    with Client(service.url, retry_for=60) as client:
        run = client.run(name)
        run.create({**SPEC, "durability": "journal"})
        run.initialize({"w": torch.zeros(2)})
        push(run, 0, 2)
        process, streams = following(run, service.url, tmp_path)
        wait_until(lambda: steps_in(tmp_path / name) == [1, 2], deadline_s=60)
        service.kill()
        service.start()
        push(run, 2, 2)
        wait_until(lambda: steps_in(tmp_path / name) == [1, 2, 3, 4], deadline_s=60)
        process.terminate()
        assert forked.join(process) == 0, streams[2].read_text()


def test_two_do_not_follow_by_one_file(trained: Run, tmp_path: Path) -> None:
    state = tmp_path / "state.json"

    class Second:
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            with pytest.raises(InvalidSetting, match="another process follows"):
                follow(trained, [Kept()], state, is_live=False)

    follow(trained, [Second()], state, is_live=False)


@pytest.mark.slow
def test_curves_are_in_mlflow(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    # Its other stores need the whole of MLflow.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, state = f"file://{tmp_path / 'mlruns'}", tmp_path / "state"
    trained.report("a//../b?", 0.25, 3)
    for _ in range(2):
        follow(trained, [Target("mlflow", f"{uri}|mine")], state, is_live=False)
        push(trained, trained.status().step, 1)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (found.info.run_name, found.info.status) == (trained.name, "FINISHED")
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((each.step, each.value) for each in losses) == [(1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75)]
    assert found.data.metrics["eval/val/acc"] == 0.5
    assert found.data.metrics["eval/a/_/_/b_"] == 0.25


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB has it, behind wandb's own header."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        # The whole of it, or its last part.
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.slow
def test_curves_are_in_projects_of_wandb(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for _ in range(2):
        to = [Target("wandb", "mine"), Target("wandb", "ours")]
        follow(trained, to, tmp_path / "state", is_live=False)
        push(trained, trained.status().step, 1)
    losses, runs = defaultdict(list), set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                project = record.run.project
                runs.add((project, record.run.display_name, record.run.run_id))
            items = {"/".join(each.nested_key) or each.key: each.value_json for each in record.history.item}
            if "train/loss" in items:
                losses[project].append((int(items["freestep_step"]), float(items["train/loss"])))
    assert losses == {project: [(1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75)] for project in ("mine", "ours")}
    key = json.loads((tmp_path / "state").read_text())["key"]
    assert runs == {(project, trained.name, f"{key}-{project}") for project in ("mine", "ours")}


@pytest.mark.slow
def test_curves_are_in_projects_of_trackio(trained: Run, service: ThreadService, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    for _ in range(2):
        done = forked.freestep(
            *("follow", trained.name, "--to", "trackio:mine", "--to", "trackio:ours", "--once"),
            *("--state", str(tmp_path / "state")),
            FREESTEP_URL=service.url,
            TRACKIO_DIR=str(tmp_path),
        )
        assert done.returncode == 0, done.stderr
        push(trained, trained.status().step, 1)
    key = json.loads((tmp_path / "state").read_text())["key"]
    for project in ("mine", "ours"):
        with sqlite3.connect(tmp_path / f"{project}.db") as database:
            rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        points = [(step, json.loads(metrics)) for _, step, metrics in rows]
        losses = [(step, metrics["train/loss"]) for step, metrics in points if "train/loss" in metrics]
        assert losses == [(1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75)]
        assert {name for name, _, _ in rows} == {f"{trained.name}-{key}"}
