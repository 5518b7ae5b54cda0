"""The errors that freestep raises.

    FreestepError
    ├── ProblemError              the service refused a call and named why (RFC 9457)
    │   ├── MalformedRequest      malformed-request
    │   ├── Unauthenticated       unauthenticated
    │   ├── Forbidden             forbidden
    │   ├── WorkerBanned          worker-banned
    │   ├── WorkerSuspended       worker-suspended
    │   ├── RunNotFound           run-not-found
    │   ├── CheckpointNotFound    checkpoint-not-found
    │   ├── TokenNotFound         token-not-found
    │   ├── DataNotFound          data-not-found
    │   ├── RunExists             run-exists
    │   ├── RunNotInitialized     run-not-initialized
    │   ├── RunPaused             run-paused
    │   ├── EpochChanged          epoch-changed
    │   ├── IdempotencyConflict   idempotency-conflict
    │   ├── DataExists            data-exists
    │   ├── UnitNotHeld           unit-not-held
    │   ├── MemoryNotShared       memory-not-shared
    │   ├── RequestTimeout        request-timeout
    │   ├── LeaseExpired          lease-expired
    │   ├── LengthRequired        length-required
    │   ├── AlreadyInitialized    already-initialized
    │   ├── BodyTooLarge          body-too-large
    │   ├── UnsupportedMediaType  unsupported-media-type
    │   ├── RangeNotSatisfiable   range-not-satisfiable
    │   ├── InvalidSpec           invalid-spec
    │   ├── MalformedTensors      malformed-tensors
    │   ├── NonFiniteGradient     non-finite-gradient
    │   ├── Overloaded            overloaded
    │   ├── HeadersTooLarge       headers-too-large
    │   ├── CoordinatorUnavailable  coordinator-unavailable
    │   ├── IssuerUnavailable     issuer-unavailable
    │   ├── ShardUnavailable      shard-unavailable
    │   ├── StepNotReached        step-not-reached
    │   └── StorageUnavailable    storage-unavailable
    ├── ServiceUnreachable        no answer came within the time allowed for retries
    ├── UnexpectedResponse        an answer that does not follow the protocol
    ├── InvalidSetting            a URL, a proxy or an environment variable cannot be used; a ValueError too
    ├── ManifestMismatch          the local parameters are not those of the run
    ├── EvalMode                  a training step was asked for while x is loaded
    ├── DtypeOverflow             a value is too large for F16, as which it was to be received or pushed
    ├── NoGradients               a step was asked for while no parameter has a gradient
    ├── WorkerNameTaken           another process has taken the lease of this worker's name
    ├── StateMismatch             a saved state is of a run that is gone, or of a later step than the run's
    └── Closed                    the optimizer was closed

The service raises these classes, and the client raises the class whose slug the service has answered. Status codes are
assigned by the service, in `web/problems.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "PROBLEMS",
    "AlreadyInitialized",
    "BodyTooLarge",
    "CheckpointNotFound",
    "Closed",
    "CoordinatorUnavailable",
    "DataExists",
    "DataNotFound",
    "DtypeOverflow",
    "EpochChanged",
    "EvalMode",
    "Forbidden",
    "FreestepError",
    "HeadersTooLarge",
    "IdempotencyConflict",
    "InvalidSetting",
    "InvalidSpec",
    "IssuerUnavailable",
    "LeaseExpired",
    "LengthRequired",
    "MalformedRequest",
    "MalformedTensors",
    "ManifestMismatch",
    "MemoryNotShared",
    "NoGradients",
    "NonFiniteGradient",
    "Overloaded",
    "ProblemError",
    "RangeNotSatisfiable",
    "RequestTimeout",
    "RunExists",
    "RunNotFound",
    "RunNotInitialized",
    "RunPaused",
    "ServiceUnreachable",
    "ShardUnavailable",
    "StateMismatch",
    "StepNotReached",
    "StorageUnavailable",
    "TokenNotFound",
    "Unauthenticated",
    "UnexpectedResponse",
    "UnitNotHeld",
    "UnsupportedMediaType",
    "WorkerBanned",
    "WorkerNameTaken",
    "WorkerSuspended",
]

URN = "urn:freestep:problem:"


class FreestepError(Exception):
    """The base class of the errors that freestep raises."""


class ProblemError(FreestepError):
    """A refusal by the service, as a problem document (RFC 9457).

    Attributes: `slug`, the problem's name, the end of the document's `type`; `title`, what it is in a few words;
    `detail`, what was wrong this time; `extensions`, other members of the document, for programs (`field`, `step`,
    `epoch`, ...); `retry_after`, seconds after which the service asks to repeat the request, or None.

    Args:
        detail: What was wrong; None takes the title.
        **extensions: Other members of the document.
    """

    slug: ClassVar[str]
    title: ClassVar[str]
    retry_after: float | None = None

    def __init__(self, detail: str | None = None, /, **extensions: Any) -> None:
        self.detail = detail or self.title
        self.extensions = extensions
        super().__init__(self.detail)

    def to_document(self, status: int) -> dict[str, Any]:
        """The `application/problem+json` document.

        Args:
            status: The HTTP status code.
        """
        return {
            **self.extensions,
            "type": URN + self.slug,
            "title": self.title,
            "status": status,
            "detail": self.detail,
        }

    @staticmethod
    def from_document(document: dict[str, Any]) -> ProblemError | None:
        """The error of a problem document, or None if its type is not one of freestep's.

        Args:
            document: The JSON document.
        """
        problem = PROBLEMS.get(str(document.get("type", "")).removeprefix(URN))
        if problem is None:
            return None
        standard = {"type", "title", "status", "detail", "instance"}
        extensions = {name: value for name, value in document.items() if name not in standard}
        return problem(str(document.get("detail") or problem.title), **extensions)


class MalformedRequest(ProblemError):
    """A request has a missing, wrong or out-of-range part: `extensions["field"]` names it. Nothing was changed."""

    slug = "malformed-request"
    title = "The request is not well formed"


class Unauthenticated(ProblemError):
    """The service needs a bearer token, and got none, a wrong one or one that has expired: see `Client(token=...)`."""

    slug = "unauthenticated"
    title = "A valid bearer token is needed"


class Forbidden(ProblemError):
    """The token is good, but not for this run or this kind of call."""

    slug = "forbidden"
    title = "The token does not allow this"


class WorkerBanned(ProblemError):
    """The worker gets no lease in this run: `extensions["outliers"]` of its pushes were outliers.

    `aggregation.ban_after` says how many are too many. A run that goes back to a checkpoint forgets what came later.
    """

    slug = "worker-banned"
    title = "Too many of the worker's pushes were outliers"


class WorkerSuspended(ProblemError):
    """The worker gets no lease in this run for some time: an operator has ended its lease and said so.

    `retry_after` is how long that is, in seconds. Clients do not wait for it: their process ends.
    """

    slug = "worker-suspended"
    title = "The worker gets no lease for some time"


class RunNotFound(ProblemError):
    """The service has no run of this name: it was not created yet, or was deleted."""

    slug = "run-not-found"
    title = "There is no such run"


class CheckpointNotFound(ProblemError):
    """The run has no checkpoint of this step: see `Run.checkpoints`."""

    slug = "checkpoint-not-found"
    title = "There is no such checkpoint"


class DataNotFound(ProblemError):
    """The run has no data set of this name."""

    slug = "data-not-found"
    title = "There is no such data set"


class DataExists(ProblemError):
    """The run has a data set of this name, with another length, unit, order or number of passes."""

    slug = "data-exists"
    title = "The data set exists with another spec"


class UnitNotHeld(ProblemError):
    """The push names units that its lease does not hold: others have them, or they have counted. It was not applied.

    `extensions["units"]` names them as `Freestep-Units` does. The lease still holds the push's other units.
    """

    slug = "unit-not-held"
    title = "The lease does not hold the unit"


class MemoryNotShared(ProblemError):
    """The service shares no such memory with the client, or none at all: the detail says why. Nothing was changed.

    The client then sends bodies over the connection, by itself.
    """

    slug = "memory-not-shared"
    title = "The memory is not shared"


class TokenNotFound(ProblemError):
    """The service has no token of this ID that is good: see `Client.tokens`."""

    slug = "token-not-found"
    title = "There is no such token"


class RunExists(ProblemError):
    """The run has another spec than `Run.create` or a state was given: see `Run.status().spec`.

    `extensions["differences"]` lists what differs, the first ten of each kind, as objects with `field` (such as
    `optimizer.lr`), `wanted` and `existing`. Parameters are `parameters.NAME` with `shape` and `group`; a value that
    one of the specs lacks is None.
    """

    slug = "run-exists"
    title = "The run exists with another spec"


class RunNotInitialized(ProblemError):
    """The run has no weights yet: call `Run.initialize`."""

    slug = "run-not-initialized"
    title = "The run has no parameters yet"


class RunPaused(ProblemError):
    """The run takes no pushes until it is resumed; this one was not applied. Points can be pulled meanwhile.

    Clients repeat the push until it is taken, however long that is.
    """

    slug = "run-paused"
    title = "The run is paused"


class EpochChanged(ProblemError):
    """The run went back to an earlier step, or was resharded, since the lease was granted; the push was not applied.

    Take a new lease and pull y. `extensions["epoch"]` is the run's epoch. A state that was to take the place of one
    that its sender had seen is refused with this too, if the run has moved on since.
    """

    slug = "epoch-changed"
    title = "The run was restored to an earlier step since the lease was granted"


class IdempotencyConflict(ProblemError):
    """The key was used before, for another gradient or another value. Nothing was changed."""

    slug = "idempotency-conflict"
    title = "The idempotency key was used for another push"


class RequestTimeout(ProblemError):
    """The head of a request, or a JSON body, did not come in the time allowed for it. Nothing was changed."""

    slug = "request-timeout"
    title = "The request did not come in time"


class LeaseExpired(ProblemError):
    """The lease has ended, or the same worker has a newer one; the push was not applied. Take a new lease."""

    slug = "lease-expired"
    title = "The lease is unknown, expired or superseded"


class LengthRequired(ProblemError):
    """A body of tensors was sent without a Content-Length."""

    slug = "length-required"
    title = "A Content-Length is needed"


class AlreadyInitialized(ProblemError):
    """The run has weights: another worker uploaded them first, so pull y instead. A state needs `replace=True`."""

    slug = "already-initialized"
    title = "The run already has its parameters"


class BodyTooLarge(ProblemError):
    """The body exceeds the service's `max_body_bytes`, which is `extensions["limit"]`."""

    slug = "body-too-large"
    title = "The body is larger than the service accepts"


class UnsupportedMediaType(ProblemError):
    """A body of tensors was sent with another Content-Type than application/vnd.safetensors."""

    slug = "unsupported-media-type"
    title = "Tensors travel as application/vnd.safetensors"


class RangeNotSatisfiable(ProblemError):
    """The request's Range is outside the body."""

    slug = "range-not-satisfiable"
    title = "The range lies outside the body"


class InvalidSpec(ProblemError):
    """The spec of a run is not valid: `extensions["field"]` names the field, such as `optimizer.lr`."""

    slug = "invalid-spec"
    title = "The run's spec is not valid"


class MalformedTensors(ProblemError):
    """A body is not the run's tensors: names, shapes, dtypes, offsets or lengths differ. Nothing was changed."""

    slug = "malformed-tensors"
    title = "The body is not the run's tensors in safetensors format"


class NonFiniteGradient(ProblemError):
    """A gradient contains NaN or infinity, or values whose squares overflow; the push was not applied."""

    slug = "non-finite-gradient"
    title = "The gradient contains NaN or infinity, or its square would"


class Overloaded(ProblemError):
    """The service had no memory free for the body in `queue_seconds`. Requests are repeated before this is raised."""

    slug = "overloaded"
    title = "Too many bodies are waiting for memory"


class HeadersTooLarge(ProblemError):
    """The head of a request is longer than the service's `head_bytes`, or has more fields than its `head_fields`."""

    slug = "headers-too-large"
    title = "The request has too many headers, or too long ones"


class CoordinatorUnavailable(ProblemError):
    """The service's Redis does not answer. Requests are repeated before this is raised."""

    slug = "coordinator-unavailable"
    title = "Redis does not answer"


class IssuerUnavailable(ProblemError):
    """The keys of the issuer of a token cannot be read now. Requests are repeated before this is raised."""

    slug = "issuer-unavailable"
    title = "The issuer of the token does not answer"


class ShardUnavailable(ProblemError):
    """A shard has no owner, or another one than was asked: see `Run.topology`.

    Requests are repeated before this is raised. `extensions["missing"]` are the shards without an owner.
    """

    slug = "shard-unavailable"
    title = "The shard has another owner"


class StepNotReached(ProblemError):
    """The run did not reach `min_step` in time, or went back to an earlier step meanwhile.

    `extensions["epoch"]` and `extensions["step"]` are those that it has reached.
    """

    slug = "step-not-reached"
    title = "The run did not reach the step in the time allowed"


class StorageUnavailable(ProblemError):
    """The disk or object store that checkpoints are kept in is full, read-only or away, or a newer version has written
    there. Nothing was changed."""

    slug = "storage-unavailable"
    title = "The storage cannot be read or written"


class ServiceUnreachable(FreestepError):
    """No answer came within the time for retries; `__cause__` is the last attempt's error."""


class UnexpectedResponse(FreestepError):
    """The answer is not freestep's: another server is at the URL, or a proxy answered."""


class InvalidSetting(FreestepError, ValueError):
    """An argument of Client, or an environment variable in its place, cannot be used: the message names it."""


class ManifestMismatch(FreestepError):
    """Local tensors differ from the run's in names or shapes, or unnamed ones in order, or a state is another run's.

    A state of a run does not fit an optimizer of another algorithm, or with other hyperparameters.
    """


class EvalMode(FreestepError):
    """`step()` was called while the model contains x: call `train()` first."""


class DtypeOverflow(FreestepError):
    """A value is too large for F16, as which it was to be received or pushed: use BF16 or F32."""


class NoGradients(FreestepError):
    """`step()` was called while no parameter has a gradient: call `backward()` first, or pass `allow_empty=True`."""


class WorkerNameTaken(FreestepError):
    """Another process has taken a lease of this worker's name, which ended this worker's lease."""


class StateMismatch(FreestepError):
    """A saved state is of a run that is gone, or of a later step than the one that the run has gone back to."""


class Closed(FreestepError):
    """The optimizer was closed, and its lease given back: make another one for the run."""


def _problems(base: type[ProblemError]) -> dict[str, type[ProblemError]]:
    return {problem.slug: problem for problem in base.__subclasses__()}


PROBLEMS: dict[str, type[ProblemError]] = _problems(ProblemError)
"""Each problem class by its slug."""
