"""The ranks of a torch.distributed group as one worker: updates, refusals, lost leases, restores and resharding."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from freestep import FreestepError, RemoteOptimizer
from harness import ThreadService
from ranks import run_ranks

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("rank.py")
ERRORS_OF_ONE = ("raised", "interrupted on 0", "interrupted on 1", "interrupted for all", "ended on 1")
"""What is another error on the rank that it comes from."""
Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(service: ThreadService, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Seen]:
    """What each of two ranks recorded."""
    file, name = tmp_path_factory.mktemp("ranks") / "seen", f"ranks-{uuid.uuid4().hex[:8]}"
    run_ranks(RANK, service.url, name, str(file), WORLD_SIZE="2")
    first, second = (json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2))
    return first, second


def test_all_ranks_see_the_same(ranks: tuple[Seen, Seen]) -> None:
    first, second = ranks
    for event in first:
        if event not in ERRORS_OF_ONE:
            assert first[event] == second[event], event


def moved(seen: Seen, before: str, after: str) -> set[float]:
    """The distinct differences of parameters between two events."""
    pairs = zip(seen[before]["parameters"], seen[after]["parameters"], strict=True)
    return {round(one - other, 4) for one, other in pairs}


def test_the_gradient_is_the_mean_over_ranks(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert moved(seen, "joined", "weighted") == {1.75}
    assert seen["weighted"]["loss"] == pytest.approx(0.75)
    assert moved(seen, "weighted", "unweighted") == {1.5}


def test_a_refusal_is_raised_on_all_ranks_and_changes_nothing(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert seen["nan"]["error"].startswith("NonFiniteGradient")
    assert moved(seen, "unweighted", "nan") == {0}


def test_what_one_rank_raises_is_told_on_the_others(ranks: tuple[Seen, Seen]) -> None:
    first, second = ranks
    assert first["raised"]["error"] == "FreestepError: rank 1: ValueError: bad"
    assert second["raised"]["error"] == "ValueError: bad"
    assert first["raised"]["parameters"] == second["raised"]["parameters"]


def test_an_interrupt_on_one_rank_is_raised_on_all(ranks: tuple[Seen, Seen]) -> None:
    first, second = ranks
    for event in ("interrupted on 0", "interrupted for all"):
        assert first[event]["error"] == "KeyboardInterrupt: "
        assert second[event]["error"] == "KeyboardInterrupt: on rank 0"
    assert first["interrupted on 1"]["error"] == "KeyboardInterrupt: on rank 1"
    assert second["interrupted on 1"]["error"] == "KeyboardInterrupt: "


def test_the_end_of_one_rank_is_an_error_on_the_others(ranks: tuple[Seen, Seen]) -> None:
    first, second = ranks
    assert first["ended on 1"]["error"] == "FreestepError: rank 1: SystemExit: enough"
    assert second["ended on 1"]["error"] == "SystemExit: enough"


def test_a_group_whose_lease_is_lost_takes_a_new_one_and_its_gradient_counts(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert seen["fenced"]["receipt"]["decision"] == "applied"
    assert moved(seen, "nan", "fenced") == {1}


def test_a_group_joins_again_after_a_restore(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    receipt = seen["restored"]["receipt"]
    assert (receipt["decision"], receipt["reason"]) == ("dropped", "epoch-changed")
    assert (seen["restored"]["pulled"], seen["restored"]["parameters"]) == ([2, 0], seen["joined"]["parameters"])


def test_a_group_goes_to_x_and_back(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert (seen["eval"]["error"], seen["eval"]["pulled"]) == (None, None)
    assert seen["at x"]["error"].startswith("EvalMode")
    assert seen["train"]["pulled"] == [2, 0]


def test_a_group_goes_on_with_another_number_of_shards(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert seen["resharded"]["receipt"]["decision"] == "dropped"
    assert seen["resharded, next"]["receipt"]["decision"] == "applied"
    assert moved(seen, "train", "resharded, next") == {1}


def test_parameters_that_differ_on_one_rank_are_refused_on_all(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert seen["other"]["error"].startswith("ManifestMismatch")


def test_a_group_holds_one_lease_and_ends_it(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert seen["other"]["workers"] == ["group"]
    assert seen["other"]["workers at last"] == []


def test_every_rank_keeps_the_residual_of_all_shards(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert any(seen["encoded"]["residual"])
    assert seen["encoded"]["lacking"] == pytest.approx(seen["encoded"]["residual"], abs=1e-5)


def test_every_rank_has_the_int8_parts_of_all_shards(ranks: tuple[Seen, Seen]) -> None:
    for seen in ranks:
        assert any(seen["int8"]["y"])
        assert seen["int8"]["parameters"] == seen["int8"]["y"]


def test_a_groups_pushes_travel_while_it_goes_on(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert seen["late 0"]["receipt"] is None
    assert moved(seen, "late, joined", "late 0") == {0}
    assert moved(seen, "late, joined", "late 1") == {1.5}
    assert moved(seen, "late, joined", "late, flushed") == {4.5}
    assert seen["late, flushed"]["pulled"] == [1, 3]


def test_what_becomes_of_a_groups_push_in_flight_becomes_of_it_on_all_ranks(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert moved(seen, "late, flushed", "late, fenced") == {0}
    assert moved(seen, "late, flushed", "late, after it") == {1}
    assert seen["late, nan"]["receipt"]["decision"] == "applied"
    assert seen["late, refused"]["error"].startswith("NonFiniteGradient")
    assert seen["late, again"]["error"] is None
    assert moved(seen, "late, nan", "late, landed") == {1}
    assert seen["late, restored"]["receipt"]["reason"] == "epoch-changed"
    assert (seen["late, eval"]["pulled"], seen["late, train"]["pulled"]) == (None, [2, 0])


def test_a_group_skips_a_step_together(ranks: tuple[Seen, Seen]) -> None:
    seen, _ = ranks
    assert (seen["overflow"]["error"], seen["no overflow"]["error"]) == (None, None)
    assert seen["late, at last"]["pulled"] == [2, 1]
    # The overflow halved the scale that a gradient of 1 is divided by.
    assert moved(seen, "late, train", "late, at last") == {2}


def test_ranks_that_push_each_for_itself_are_warned_unless_they_say_so(ranks: tuple[Seen, Seen]) -> None:
    for seen in ranks:
        (text,) = seen["process_group=None"]["said"]
        assert "2 ranks" in text
        assert "process_group=True" in text
        assert seen["process_group=False"]["said"] == []


def test_a_group_must_be_there(service: ThreadService) -> None:
    with pytest.raises(FreestepError, match="init_process_group"):
        RemoteOptimizer([], run="none", url=service.url, process_group=True)


def test_without_ranks_auto_is_this_process(service: ThreadService) -> None:
    name = f"auto-{uuid.uuid4().hex[:8]}"
    with RemoteOptimizer(nn.Linear(2, 1), run=name, url=service.url, process_group="auto") as optimizer:
        assert optimizer.state_dict()["param_groups"][0]["step"] == 0
    with pytest.raises(FreestepError, match="'auto'"):
        RemoteOptimizer(nn.Linear(2, 1), run=name, url=service.url, process_group="all")  # type: ignore[arg-type]
