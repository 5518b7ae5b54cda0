"""The sums behind averaging weights are those of the package's steps, however many are counted at once."""

from __future__ import annotations

import pytest
import schedulefree
import torch

from freestep.api.hyperparameters import AdamWScheduleFree, RAdamScheduleFree, ScheduleFree, SGDScheduleFree
from freestep.averaging_weights import AveragingWeights

CASES: dict[str, ScheduleFree] = {
    "sgd": SGDScheduleFree(lr=0.5),
    "warm": SGDScheduleFree(lr=0.5, warmup_steps=70),
    "warm-r": AdamWScheduleFree(warmup_steps=70, r=1.5, weight_lr_power=0.5),
    "r": AdamWScheduleFree(r=3.0),
    "radam": RAdamScheduleFree(betas=(0.9, 0.9)),
    "radam-r": RAdamScheduleFree(betas=(0.9, 0.9), r=0.5),
    "radam-sgd": RAdamScheduleFree(betas=(0.9, 0.99), silent_sgd_phase=False),
    "radam-still": RAdamScheduleFree(betas=(0.9, 0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_are_the_packages_at_any_step(case: str) -> None:
    h = CASES[case]
    kind = {SGDScheduleFree: "SGDScheduleFree", AdamWScheduleFree: "AdamWScheduleFree"}.get(
        type(h), "RAdamScheduleFree"
    )
    given = h.model_dump(
        exclude={"algorithm", "decay_at_z", "inner_momentum", "averaging_constant", "delay_correction"}
    )
    del given["max_grad_norm"]
    parameter = torch.nn.Parameter(torch.zeros(1))
    package = getattr(schedulefree, kind)([parameter], **given)
    package.train()
    (group,) = package.param_groups
    stepwise = AveragingWeights(h)
    for step in range(1, 601):
        parameter.grad = torch.zeros(1)
        package.step()
        expected = pytest.approx((group["lr_max"], group["weight_sum"]), rel=1e-12)
        assert stepwise.after(step) == expected
        if step % 97 == 0:
            assert AveragingWeights(h).after(step) == expected
    # A run may go back.
    assert stepwise.after(0) == (-1.0, 0.0)


def test_a_run_of_any_number_of_steps_is_joined_at_once() -> None:
    """Counting them one by one would not end."""
    steps = 10**15
    for h in (SGDScheduleFree(lr=0.5), RAdamScheduleFree(lr=0.5)):
        lr_max, weight_sum = AveragingWeights(h).after(steps)
        assert (lr_max, weight_sum) == (0.5, pytest.approx(0.25 * steps, rel=1e-6))
