"""The averaging weights of the Schedule-Free methods, and their correction for stale gradients.

In equations 9 to 11 of arXiv 2405.15682, β is constant. Gradients taken at the y of τ steps ago need another β, which
changes during the run. With the expected staleness τ̂, S = 1 + τ̂, the user's β₀ and γ, and c as in the paper, `auto` and
`constant` have

    u  = 1 - β₀ if τ̂ = 0 else min(u_max, max((1 - β₀)/S, κ τ̂ c_prev))        β' = 1 - u
    lr = γ min(1, max(a, 1 - β₀)/(S u))                                       from about γ a/u_max/S to γ

and y = z + β' (x - z). A change of z appears u-fold in y at once, and z moves S times before a gradient reflects it, so
lr · u · S must stay bounded: by γ a, twice the γ (1 - β) of β = 0.9 without delay. And since x takes up z with weight
c, u must stay above τ̂ c, or early iterates grow. This is a heuristic argument and no proof; the rule was found by
experiment. `ahead` lets lr · u · S be up to γ u_max, and keeps to the user's β₀ where that allows it:

    u  = min(u_max, 1 - β₀ + κ_a τ̂ c_prev)                                    β' = 1 - u
    lr = γ min(1, u_max/(S u))                                                from γ/S up

For x moves by c (z - x) in a step, so this y lies, beside the user's share of z, about where x will be in κ_a τ̂ steps.
A smaller u than the user's lets learning rates be larger, but where gradients are noisy, x and z then swing about the
minimum for long.

Where the expected staleness changes from τ̂_prev to τ̂, z moves before the step such that x and y stay:

    z <- x + q (z - x)        q = u(τ̂_prev, c_prev)/u(τ̂, c_prev)

Otherwise the new β' would move y along the line through x and z at once, and a z that lies far from x while lr falls
would pull x after it.

Written in y and z alone, this is Schedule-Free's arithmetic with other coefficients. x = z + (y - z)/β does not change
when β' replaces β, and for a step direction d

    y <- y + (c + (1 - c)(1 - q β'/β) - (1 - q)/β) (z - y) + lr (β' (1 - c) - 1) d
    z <- z - (1 - q)/β (z - y) - lr d

where β is the one that this y was formed with. It is a scalar of the state, as are c_prev and τ̂_prev.
"""

from __future__ import annotations

from typing import NamedTuple

from freestep.api.delay import Ahead
from freestep.api.hyperparameters import LEAST_CORRECTED, ScheduleFree
from freestep_service.optimizers.method import Conditions, Scalars

__all__ = ["INITIAL", "Average", "averaged", "interpolation"]

INITIAL: Scalars = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}

_LARGEST_SHARE = 1 - LEAST_CORRECTED
"""u_max, the bound of the share u of z in y."""
_KAPPA = 2.0
_LARGEST_MOVE = 0.2
"""a, chosen by experiment: between 1 - β₀ for the usual β₀ and u_max."""
_KAPPA_AHEAD = 1.5
"""κ_a, chosen by experiment."""


class Average(NamedTuple):
    """The averaging weights of one step.

    scalars: the next scalars. conditions: the step's, with the correction of the learning rate in their damping.
    """

    scalars: dict[str, float]
    conditions: Conditions
    z_share: float
    """The coefficient of z - y in the change of y: c, where β is constant."""
    y_share: float
    """β' (1 - c) - 1: the coefficient of lr · d in the change of y."""
    z_pull: float
    """(1 - q)/β: z decreases by this share of z - y; 0 where τ̂ is constant."""


def interpolation(h: ScheduleFree, scalars: Scalars) -> float:
    """The β that y was formed with: the user's before the first step, and in states written by older versions."""
    return scalars.get("beta", h.beta)


def averaged(h: ScheduleFree, scalars: Scalars, lr: float, conditions: Conditions) -> Average:
    """The averaging weights of the next step. lr: the user's learning rate after warmup.

    With an averaging constant C, c is replaced by min(1, c (1 - β₀) C) (arXiv 2507.09846).
    """
    k = scalars["k"]
    lr_max = max(lr, scalars["lr_max"])
    weight: float = (k + 1) ** h.r * lr_max**h.weight_lr_power
    weight_sum = scalars["weight_sum"] + weight
    c = weight / weight_sum if weight_sum else 0.0
    if h.averaging_constant is not None:
        c = min(c * (1 - h.beta) * h.averaging_constant, 1.0)
    staleness, beta_prev, c_prev = conditions.expected_staleness, interpolation(h, scalars), scalars.get("c", 1.0)
    u = _z_share_in_y(h, staleness, c_prev)
    q = _z_share_in_y(h, scalars.get("staleness", 0.0), c_prev) / u
    beta = 1 - u if staleness else h.beta
    largest_move = _LARGEST_SHARE if isinstance(h.delay_correction, Ahead) else _LARGEST_MOVE
    lr_factor = min(1.0, max(largest_move, 1 - h.beta) / ((1 + staleness) * u))
    return Average(
        scalars={
            "k": k + 1,
            "weight_sum": weight_sum,
            "lr_max": lr_max,
            "beta": beta,
            # Before the first weight, as in RAdam's steps without an update, the average has not begun.
            "c": c if weight_sum else 1.0,
            "staleness": staleness,
        },
        conditions=conditions._replace(damping=conditions.damping * lr_factor),
        z_share=c + (1 - c) * (1 - q * beta / beta_prev) - (1 - q) / beta_prev,
        y_share=beta * (1 - c) - 1,
        z_pull=(1 - q) / beta_prev,
    )


def _z_share_in_y(h: ScheduleFree, staleness: float, c: float) -> float:
    """u. c: that of the previous step."""
    share = 1 - h.beta
    if not staleness:
        return share
    if isinstance(h.delay_correction, Ahead):
        return min(_LARGEST_SHARE, share + _KAPPA_AHEAD * staleness * c)
    return min(_LARGEST_SHARE, max(share / (1 + staleness), _KAPPA * staleness * c))
