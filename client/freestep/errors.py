"""Every error that freestep raises on purpose.

    FreestepError
    ├── ProblemError              the service refused a call and named why (RFC 9457)
    │   ├── MalformedRequest      malformed-request
    │   ├── Unauthenticated       unauthenticated
    │   ├── Forbidden             forbidden
    │   ├── RunNotFound           run-not-found
    │   ├── CheckpointNotFound    checkpoint-not-found
    │   ├── RunExists             run-exists
    │   ├── RunNotInitialized     run-not-initialized
    │   ├── EpochChanged          epoch-changed
    │   ├── IdempotencyConflict   idempotency-conflict
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
    │   ├── CoordinatorUnavailable  coordinator-unavailable
    │   ├── ShardUnavailable      shard-unavailable
    │   ├── StepNotReached        step-not-reached
    │   └── StorageUnavailable    storage-unavailable
    ├── ServiceUnreachable        no answer came within the time allowed for retries
    ├── UnexpectedResponse        an answer that does not follow the protocol
    ├── ManifestMismatch          the local parameters are not those of the run
    └── EvalMode                  a training step was asked for while x is loaded

The service raises these classes and the client raises the very class that the service named, so a
slug is written down here and nowhere else. Status codes are the service's affair.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "PROBLEMS",
    "AlreadyInitialized",
    "BodyTooLarge",
    "CheckpointNotFound",
    "CoordinatorUnavailable",
    "EpochChanged",
    "EvalMode",
    "Forbidden",
    "FreestepError",
    "IdempotencyConflict",
    "InvalidSpec",
    "LeaseExpired",
    "LengthRequired",
    "MalformedRequest",
    "MalformedTensors",
    "ManifestMismatch",
    "NonFiniteGradient",
    "Overloaded",
    "ProblemError",
    "RangeNotSatisfiable",
    "RunExists",
    "RunNotFound",
    "RunNotInitialized",
    "ServiceUnreachable",
    "ShardUnavailable",
    "StepNotReached",
    "StorageUnavailable",
    "Unauthenticated",
    "UnexpectedResponse",
    "UnsupportedMediaType",
]

URN = "urn:freestep:problem:"


class FreestepError(Exception):
    """The root of every error that freestep raises on purpose."""


class ProblemError(FreestepError):
    """A refusal with a name: the problem detail of RFC 9457.

    `slug` names the problem, `title` says it in a few words, `detail` says what was wrong this time, and
    `extensions` are the members that a program can act on (`field`, `step`, `epoch`, ...).
    """

    slug: ClassVar[str]
    title: ClassVar[str]
    retry_after: float | None = None
    """Seconds after which the service wants to be asked again, where it says so."""

    def __init__(self, detail: str | None = None, /, **extensions: Any) -> None:
        self.detail = detail or self.title
        self.extensions = extensions
        super().__init__(self.detail)

    def to_document(self, status: int) -> dict[str, Any]:
        """The members of the `application/problem+json` document."""
        return {
            **self.extensions,
            "type": URN + self.slug,
            "title": self.title,
            "status": status,
            "detail": self.detail,
        }

    @staticmethod
    def from_document(document: dict[str, Any]) -> ProblemError | None:
        """The error that a problem document names, or None when the name is not one of ours."""
        problem = PROBLEMS.get(str(document.get("type", "")).removeprefix(URN))
        if problem is None:
            return None
        standard = {"type", "title", "status", "detail", "instance"}
        extensions = {name: value for name, value in document.items() if name not in standard}
        return problem(str(document.get("detail") or problem.title), **extensions)


class MalformedRequest(ProblemError):
    slug = "malformed-request"
    title = "The request is not well formed"


class Unauthenticated(ProblemError):
    slug = "unauthenticated"
    title = "A valid bearer token is needed"


class Forbidden(ProblemError):
    slug = "forbidden"
    title = "The token does not allow this"


class RunNotFound(ProblemError):
    slug = "run-not-found"
    title = "There is no such run"


class CheckpointNotFound(ProblemError):
    slug = "checkpoint-not-found"
    title = "There is no such checkpoint"


class RunExists(ProblemError):
    slug = "run-exists"
    title = "The run exists with another spec"


class RunNotInitialized(ProblemError):
    slug = "run-not-initialized"
    title = "The run has no parameters yet"


class EpochChanged(ProblemError):
    slug = "epoch-changed"
    title = "The run was restored to an earlier step since the lease was granted"


class IdempotencyConflict(ProblemError):
    slug = "idempotency-conflict"
    title = "The idempotency key was used for another push"


class LeaseExpired(ProblemError):
    slug = "lease-expired"
    title = "The lease is unknown, expired or superseded"


class LengthRequired(ProblemError):
    slug = "length-required"
    title = "A Content-Length is needed"


class AlreadyInitialized(ProblemError):
    slug = "already-initialized"
    title = "The run already has its parameters"


class BodyTooLarge(ProblemError):
    slug = "body-too-large"
    title = "The body is larger than the service accepts"


class UnsupportedMediaType(ProblemError):
    slug = "unsupported-media-type"
    title = "Tensors travel as application/vnd.safetensors"


class RangeNotSatisfiable(ProblemError):
    slug = "range-not-satisfiable"
    title = "The range lies outside the body"


class InvalidSpec(ProblemError):
    slug = "invalid-spec"
    title = "The run's spec is not valid"


class MalformedTensors(ProblemError):
    slug = "malformed-tensors"
    title = "The body is not the run's tensors in safetensors format"


class NonFiniteGradient(ProblemError):
    slug = "non-finite-gradient"
    title = "The gradient holds NaN or infinity, or its square would"


class Overloaded(ProblemError):
    slug = "overloaded"
    title = "Too many bodies are waiting for memory"


class CoordinatorUnavailable(ProblemError):
    slug = "coordinator-unavailable"
    title = "Redis does not answer"


class ShardUnavailable(ProblemError):
    """`missing` are the shards that nobody owns; or the shard is another process's by now (see the topology)."""

    slug = "shard-unavailable"
    title = "The shard has another owner"


class StepNotReached(ProblemError):
    slug = "step-not-reached"
    title = "The run did not reach the step in the time allowed"


class StorageUnavailable(ProblemError):
    """Nothing was changed: the medium that checkpoints are kept on is full, read-only or away."""

    slug = "storage-unavailable"
    title = "The storage cannot be read or written"


class ServiceUnreachable(FreestepError):
    """No answer came within the time allowed for retries; the cause is chained."""


class UnexpectedResponse(FreestepError):
    """The answer does not follow the protocol: another server, or a proxy in between."""


class ManifestMismatch(FreestepError):
    """The local parameters differ from the run's in name, shape or order of groups."""


class EvalMode(FreestepError):
    """`step()` was called while the model holds x; call `train()` first."""


def _problems(base: type[ProblemError]) -> dict[str, type[ProblemError]]:
    return {problem.slug: problem for problem in base.__subclasses__()}


PROBLEMS: dict[str, type[ProblemError]] = _problems(ProblemError)
"""Each problem class by its slug."""
