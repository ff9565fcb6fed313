"""What a request may ask of the service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused (4xx)."""

    text: int = 1000  # characters of a query
    image_bytes: int = 10_000_000
    pixels: int = 40_000_000  # of an image that is searched with
    top: int = 100  # results
    filters: int = 16
    rate: float = 50.0  # searches a second of one client; 0: any number
    burst: int = 100  # searches at once before the rate counts
    in_flight: int = 256  # requests of all clients being answered
    timeout_s: float = 60.0  # to send a request, and to be answered

    @property
    def body_bytes(self) -> int:
        """A body may hold the image in base64, and words beside it."""
        return self.image_bytes * 4 // 3 + 65_536
