"""The average x of the Schedule-Free methods: what the newest z weighs in it, and how much of it there is in y.

Equations 9 to 11 of arXiv 2405.15682 have a β that stays. A gradient that was taken at the y of τ steps ago needs
another one, which changes as the run goes on. With τ̂ the staleness that is expected, S = 1 + τ̂, β₀ and γ the user's,
and c as ever,

    u  = 1 - β₀ if τ̂ = 0 else min(u_max, max((1 - β₀)/S, κ τ̂ c_prev))        β' = 1 - u
    lr = γ min(1, max(a, 1 - β₀)/(S u))                                       from about γ a/u_max/S to γ

and y is z + β' (x - z). A change of z is u-fold in y at once, and z has been moved on S times before that shows in a
gradient: lr · u · S is to stay bounded, by γ a, which is twice what γ (1 - β) is without delay where β is 0.9. And as x
takes up z with weight c, u is to stay above τ̂ c, or early iterates grow. That is a heuristic reason and no proof; the
rule was found by experiment.

Where another staleness is expected than in the step before, which had τ̂_prev, z moves to where y stays,

    z <- x + q (z - x)        q = u(τ̂_prev, c_prev)/u(τ̂, c_prev)

before it takes the step. Else y would jump, as far as τ̂ has, to where z lies beside x; and a z that a fall of lr leaves
there would draw x after it.

With y and z alone it is Schedule-Free's own arithmetic with other coefficients. x = z + (y - z)/β does not change when
β' takes the place of β, and for a step direction d

    y <- y + (c + (1 - c)(1 - q β'/β) - (1 - q)/β) (z - y) + lr (β' (1 - c) - 1) d
    z <- z - (1 - q)/β (z - y) - lr d

where β is the one that made this y. It is a scalar of the state, as are c_prev and τ̂_prev.
"""

from __future__ import annotations

from typing import NamedTuple

from freestep.api.hyperparameters import LEAST_CORRECTED, ScheduleFree
from freestep_service.optimizers.method import Conditions, Scalars

__all__ = ["INITIAL", "Average", "averaged", "interpolation"]

INITIAL: Scalars = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}

_LARGEST_SHARE = 1 - LEAST_CORRECTED
"""u_max: of z in y."""
_KAPPA = 2.0
_LARGEST_MOVE = 0.2
"""a: chosen by trial, between (1 - β₀) for the usual β₀ and u_max."""


class Average(NamedTuple):
    """A step of the average.

    scalars: the next ones. taken: the step's conditions, with the correction in their damping.
    """

    scalars: dict[str, float]
    taken: Conditions
    z_share: float
    """What of z - y is added to y: c, where β stays."""
    y_share: float
    """β' (1 - c) - 1: what y moves by along lr · d."""
    z_pull: float
    """What of z - y is taken off z: 0, where τ̂ stays."""


def interpolation(h: ScheduleFree, scalars: Scalars) -> float:
    """The β that made the state's y: the user's, before the first step and in states that older versions have left."""
    return scalars.get("beta", h.beta)


def averaged(h: ScheduleFree, scalars: Scalars, lr: float, taken: Conditions) -> Average:
    """The average's part in a step. `lr` is the user's learning rate, after warmup.

    The averaging constant C makes c the smaller of 1 and c · (1 - β₀) · C (arXiv 2507.09846).
    """
    k = scalars["k"]
    lr_max = max(lr, scalars["lr_max"])
    weight: float = (k + 1) ** h.r * lr_max**h.weight_lr_power
    weight_sum = scalars["weight_sum"] + weight
    c = weight / weight_sum if weight_sum else 0.0
    if h.averaging_constant is not None:
        c = min(c * (1 - h.beta) * h.averaging_constant, 1.0)
    staleness, before, previous = taken.expected_staleness, interpolation(h, scalars), scalars.get("c", 1.0)
    share = _share(h.beta, staleness, previous)
    kept = _share(h.beta, scalars.get("staleness", 0.0), previous) / share
    beta = 1 - share if staleness else h.beta
    left = min(1.0, max(_LARGEST_MOVE, 1 - h.beta) / ((1 + staleness) * share))
    return Average(
        scalars={
            "k": k + 1,
            "weight_sum": weight_sum,
            "lr_max": lr_max,
            "beta": beta,
            # Before the first z with a weight, as in RAdam's silent steps, the average has not begun.
            "c": c if weight_sum else 1.0,
            "staleness": staleness,
        },
        taken=taken._replace(damping=taken.damping * left),
        z_share=c + (1 - c) * (1 - kept * beta / before) - (1 - kept) / before,
        y_share=beta * (1 - c) - 1,
        z_pull=(1 - kept) / before,
    )


def _share(beta: float, staleness: float, c: float) -> float:
    """u, of z in y, with the user's β and the c of the step before."""
    if not staleness:
        return 1 - beta
    return min(_LARGEST_SHARE, max((1 - beta) / (1 + staleness), _KAPPA * staleness * c))
