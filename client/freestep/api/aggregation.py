"""The aggregation policy of a run: which pushes become an update, and what becomes of pushes that spoil it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from freestep.api.validation import LARGEST_INTEGER, Count, Positive, Steps, StrictModel, fault

__all__ = ["MOST_COMPARED", "AggregationSpec"]

MOST_COMPARED = 256
"""The largest number of pushes that a robust rule compares."""

_GATHERING = ("sync", "quorum", "buffered", "rennala")
"""The policies whose updates are made of several pushes."""
_OWN_PARAMETERS = {
    "clip_factor": ("clip",),
    "beta": ("trimmed_mean",),
    "f": ("krum",),
    "m": ("krum",),
    "outlier_factor": ("clip", "trimmed_mean", "coordinate_median", "krum"),
    "ban_after": ("clip", "trimmed_mean", "coordinate_median", "krum"),
}
"""The parameters of robust rules, and the rules that take them."""


class AggregationSpec(StrictModel):
    """How pushes become updates: a named policy, and fields that replace the policy's own values.

    An update is made of `batch` pushes, and its gradient is their mean, weighted by samples if they are given. A push's
    staleness is the run's step minus the step of the y at which the gradient was computed; staler pushes than
    `max_staleness` are dropped. The policies, with M live workers:

    - `async`: batch 1, any staleness.
    - `ringmaster`: batch 1, staleness at most 4 · M, at least 4, unless `max_staleness` is given (arXiv 2501.16168).
    - `buffered`: `batch` pushes, any staleness (FedBuff, arXiv 2106.06639).
    - `rennala`: `batch` pushes of staleness 0 (arXiv 2305.12387).
    - `sync`: one push of every live worker, of staleness 0.
    - `quorum`: pushes of `batch` different workers, of staleness 0; later ones are dropped.
    - `ssp`: batch 1, any staleness; a worker that is more than `slack` pushes ahead of the slowest live one waits.

    `robust` bounds what workers can do whose gradients are wrong, as long as they are fewer than the others:

    - `clip`: no push is longer than `clip_factor` times the running median of norms. Under any policy.
    - `trimmed_mean`: of each coordinate, the mean without the fraction `beta` of largest and of smallest values (Yin et
      al., arXiv 1803.01498).
    - `coordinate_median`: of each coordinate, the median (the same paper).
    - `krum`: of n pushes the one, or the mean of the `m`, with the least sum of squared distances to the n - `f` - 2
      nearest others (Blanchard et al., arXiv 1703.02757). Several shards exchange what each has of the distances.

    The last three compare the pushes of an update, of which a worker then gives one at most. Under each rule all pushes
    weigh the same, whatever samples they give, and an outlier is a push whose norm exceeds `outlier_factor` times the
    running median. That is the median over workers of the median of each one's five newest norms, as far as they are
    among the run's newest 128; or a worker's own median, if it is smaller and there are five. Until three workers (or
    all live ones, if there are fewer) or 16 pushes are known, nothing is an outlier, and `clip` drops pushes as
    `norms-unknown`.

    Example:
        >>> freestep.AggregationSpec(policy="buffered", batch=8, max_staleness=20)

    Raises:
        ValidationError: A field that the policy needs is missing, or a value is out of range.
    """

    policy: Literal["async", "ringmaster", "sync", "quorum", "buffered", "rennala", "ssp"] = "ringmaster"
    """The policy's name."""
    batch: Annotated[int, Field(strict=True, ge=1, le=LARGEST_INTEGER)] | None = None
    """How many pushes make an update; `quorum`, `buffered` and `rennala` need it. None is the policy's own."""
    max_staleness: Count | None = None
    """The largest staleness, in steps, of a push that is not dropped; None is the policy's own."""
    slack: Count | None = None
    """How many pushes a worker may be ahead of the slowest live one before it waits; `ssp` needs it. None: any."""
    staleness_damping: Literal["none", "delay_adaptive", "inverse_sqrt", "fadas"] = "none"
    """How staleness τ reduces the learning rate of a step. `delay_adaptive`: times min(1, M/τ), with M live workers
    (arXiv 2206.07638). `inverse_sqrt`: times 1/sqrt(1 + τ). `fadas`: at most 1/τ if τ exceeds `staleness_threshold`
    (arXiv 2407.18365)."""
    staleness_threshold: Count | None = None
    """τ_c of `fadas`, in steps; `fadas` needs it, and no other damping takes it."""
    robust: Literal["none", "clip", "trimmed_mean", "coordinate_median", "krum"] = "none"
    """The rule against pushes that spoil the run; `none` takes the mean of what is pushed."""
    clip_factor: Positive | None = None
    """The norm to which `clip` clips a push, in running medians; None is 1."""
    beta: Annotated[float, Field(strict=True, gt=0, lt=0.5)] | None = None
    """β of `trimmed_mean`, the fraction of spoilt pushes that it withstands: it trims β · n values at each end, rounded
    up, as far as values are left. `trimmed_mean` needs it."""
    f: Annotated[int, Field(strict=True, ge=1, le=MOST_COMPARED)] | None = None
    """f of `krum`, the number of spoilt pushes in an update that it withstands. `krum` needs it, and a batch of at
    least 2 · f + 3."""
    m: Annotated[int, Field(strict=True, ge=1, le=MOST_COMPARED)] | None = None
    """m of `krum`, the number of pushes that it takes the mean of, at most the batch less `f`; None is 1."""
    max_batch: Annotated[int, Field(strict=True, ge=3, le=MOST_COMPARED)] | None = None
    """The most pushes of an update of `sync` under a rule that compares them, since they are kept in memory until then;
    of more live workers the first make the update, and the late are dropped. `sync` needs it under such a rule."""
    outlier_factor: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] | None = None
    """The norm beyond which a push is an outlier, in running medians; None is 10."""
    ban_after: Steps | None = None
    """How many outliers of a worker among the run's newest 128 pushes end its lease; from then on it gets none. When
    all norms jump, honest workers have up to three. None bans nobody."""

    @property
    def compares(self) -> bool:
        """Whether the rule compares the pushes of an update, which are kept apart until then."""
        return self.robust in ("trimmed_mean", "coordinate_median", "krum")

    @property
    def takes_one_each(self) -> bool:
        """Whether a worker gives an update one push at most, and so waits for the update before it pushes again."""
        return self.policy in ("sync", "quorum") or self.compares

    @property
    def most_pushes(self) -> int | None:
        """The most pushes of an update; None for all live workers' without a bound."""
        if self.batch is not None:
            return self.batch
        return self.max_batch if self.policy == "sync" else 1

    @model_validator(mode="after")
    def _complete(self) -> AggregationSpec:
        if self.policy in ("quorum", "buffered", "rennala") and self.batch is None:
            raise fault(("batch",), f"the policy {self.policy!r} needs a batch")
        if self.policy == "ssp" and self.slack is None:
            raise fault(("slack",), "the policy 'ssp' needs a slack")
        if (self.staleness_damping == "fadas") != (self.staleness_threshold is not None):
            raise fault(("staleness_threshold",), "needed by the staleness damping 'fadas', and by no other")
        return self

    @model_validator(mode="after")
    def _robust(self) -> AggregationSpec:
        for name, rules in _OWN_PARAMETERS.items():
            if getattr(self, name) is not None and self.robust not in rules:
                raise fault((name,), f"only for robust {', '.join(map(repr, rules))}")
        if self.compares and self.policy not in _GATHERING and self.batch in (None, 1):
            raise fault(
                ("robust",),
                f"an update of the policy {self.policy!r} is made of one push, and {self.robust!r} compares several; "
                "'clip' bounds single pushes",
            )
        if (self.max_batch is not None) != (self.compares and self.policy == "sync" and self.batch is None):
            raise fault(("max_batch",), "needed by 'sync' under a robust rule that compares pushes, and by no other")
        if self.beta is None and self.robust == "trimmed_mean":
            raise fault(("beta",), "needed by robust 'trimmed_mean'")
        if self.f is None and self.robust == "krum":
            raise fault(("f",), "needed by robust 'krum'")
        if self.compares:
            self._require_enough()
        return self

    def _require_enough(self) -> None:
        most, field = self.most_pushes, "batch" if self.max_batch is None else "max_batch"
        least = 3 if self.f is None else 2 * self.f + 3
        assert most is not None
        if not least <= most <= MOST_COMPARED:
            raise fault((field,), f"{self.robust!r} compares from {least} to {MOST_COMPARED} pushes, and not {most}")
        if self.f is not None and (self.m or 1) > most - self.f:
            raise fault(("m",), f"at most the {field} less f, {most - self.f}")
