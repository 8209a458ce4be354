"""Errors a client of tetriserve can meet; the HTTP edge maps each class to a status."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Of what an error says: Ray's and torch's go on for pages."""
    return str(error).strip().split("\n", 1)[0]


class TetriserveError(Exception):
    """Base class. `code` is the machine-readable code of the HTTP error body."""

    code = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(TetriserveError):
    """The request cannot be served as asked; `field` names the culprit (HTTP 400)."""

    code = "invalid_value"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.field, self.message.removeprefix(f"{self.field}: "))


class NotFound(InvalidRequest):
    """`field` names something that is not there, or not any more (HTTP 404)."""

    code = "not_found"


class ModelNotFound(NotFound):
    """`model` names something this server does not serve (HTTP 404)."""

    code = "model_not_found"


class Unauthorized(TetriserveError):
    """The server asks for an API key and got none of its own (HTTP 401)."""

    code = "invalid_api_key"


class Overloaded(TetriserveError):
    """The queue is full (HTTP 503 with Retry-After)."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (self.message, self.retry_after_s)


class NotReady(Overloaded):
    """No GPU group can run steps right now (HTTP 503)."""

    code = "not_ready"


class DeadlineInfeasible(TetriserveError):
    """The deadline cannot be met, and `drop_late` or `reject_infeasible` was asked (HTTP 503).

    Attributes:
        earliest_slo_s: with this one it would have been accepted; None when that is not known.
    """

    code = "deadline_infeasible"

    def __init__(self, message: str, earliest_slo_s: float | None = None) -> None:
        super().__init__(message)
        self.earliest_slo_s = earliest_slo_s

    def __reduce__(self) -> tuple[type, tuple[str, float | None]]:
        return type(self), (self.message, self.earliest_slo_s)


class GenerationFailed(TetriserveError):
    """The request was accepted but could not be finished; the message says why (HTTP 500)."""

    code = "generation_failed"


class Cancelled(GenerationFailed):
    """Somebody ended the request while others waited for it (HTTP 409)."""

    code = "cancelled"


class OutOfMemory(GenerationFailed):
    """A phase did not fit into memory at any degree that it may run at (HTTP 500)."""

    code = "out_of_memory"


class CellLost(GenerationFailed):
    """The cell failed under an accepted request, which is no fault of the request: it is submitted again."""


class ConfigError(TetriserveError):
    """A configuration value is wrong; the command line ends with exit code 2."""

    code = "config_error"
