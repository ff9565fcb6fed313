"""What ended a training, in a line."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """A line that says what ended a training: our own error, however deep inside Ray's, else the line of Ray's that says
    most."""
    cause = getattr(error, "cause", None) or error
    cause = next(iter(getattr(cause, "worker_failures", {}).values()), None) or getattr(cause, "controller_failure", cause)
    lines = [line for line in str(cause).splitlines() if line.strip()] or [""]
    if named := [line for line in lines if line.startswith("mmref.errors.")]:
        return named[-1].removeprefix("mmref.errors.")
    if lines[0].startswith("Traceback"):  # of a worker: its last line is the error
        return lines[-1]
    return f"{type(cause).__name__}: {lines[0]}"
