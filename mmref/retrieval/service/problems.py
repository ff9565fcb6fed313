"""What a request is told when it cannot be answered: always {error, message, fix}."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mmref.errors import MMRefError


@dataclass(frozen=True)
class Problem:
    """An answer that is an error."""

    status: int
    error: str  # a name to test for, CamelCase
    message: str  # what was found
    fix: str  # what to do
    retry_after_s: int | None = None

    def body(self) -> dict[str, str]:
        """As JSON says it."""
        return {name: value for name, value in asdict(self).items() if name in ("error", "message", "fix")}

    def headers(self) -> dict[str, str]:
        """What goes beside it: when to come again; an end of the connection where the rest of a body is not read."""
        found = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return found | ({"connection": "close"} if self.status in (408, 413) else {})


class Refused(MMRefError):
    """A request that is answered with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)  # the argument of exceptions that travel between processes
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem.message} {self.problem.fix}"


def refuse(status: int, error: str, message: str, fix: str, retry_after_s: int | None = None) -> Refused:
    """The exception to raise."""
    return Refused(Problem(status, error, message, fix, retry_after_s))


INTERNAL = Problem(500, "InternalError", "the service failed to answer.", "Look into the log of `mmref serve`.")
LEAVING = Problem(503, "Leaving", "the service is being stopped.", "Ask again in a moment, or another one.", 5)
