"""What a request, a client, and all clients together may ask of the service: every limit there is."""

from __future__ import annotations

from dataclasses import dataclass

from mmref.cluster.resources import raise_file_limit

CHARACTER = 12  # bytes of JSON that a character may take: "\ud83d\ude00"
FILES_KEPT = 256  # descriptors that are left to indexes, images and Ray


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused (4xx), or its connection given up. A client is an address; an IPv6 one, its /64."""

    # of one request
    text: int = 1000  # characters of a query
    image_bytes: int = 10_000_000
    pixels: int = 12 * 1024 * 1024  # of an image that is searched with: 4096 x 3072, a photograph of a phone
    json_bytes: int = 65_536  # of a JSON body without its image, and without the ids of `within`
    top: int = 100  # results
    candidates: int = 10_000  # that are refined
    depth: int = 10_000  # rank of the last result that may be asked for
    filters: int = 16
    filter_text: int = 500  # characters of a filter's column, and of its values
    within: int = 1000  # items that a search is of
    within_bytes: int = 512_000  # of their ids as a list of JSON: 512 for each
    parameters: int = 64  # of a URL
    timeout_s: float = 60.0  # to be answered
    remote_s: float = 10.0  # for an image that lies behind a URL
    keep_metadata: bool = False  # whether an image is given out with its camera data, places and texts
    decode_s: float = 10.0  # for other images to be decoded first

    # of time: who moves less is given up
    headers_s: float = 15.0  # from the first byte of a request, or the connection, to the end of its headers
    stalled_s: float = 10.0  # to send, or to take, so many
    stalled_bytes: int = 65_536  # (the rest, where it is less)
    pressed_bytes_s: int = 100_000  # while room is short for others

    # of one client
    rate: float = 50.0  # searches a second; 0: any number
    burst: int = 100  # searches at once before the rate counts
    client_in_flight: int = 128  # requests being answered
    client_uploads: int = 32  # bodies that have begun to arrive
    client_bytes: int = 128_000_000  # of bodies, and of answers that are being taken
    client_connections: int = 256

    # of all clients
    in_flight: int = 256
    uploads: int = 256
    bytes: int = 256_000_000
    connections: int = 4096
    judgements_bytes: int = 50_000_000  # of a file of judgements, 250,000 of them: more are not written
    remote_images: int = 8  # of one index, being fetched from behind URLs

    @property
    def body_bytes(self) -> int:
        """A body may hold the image in base64, and words and ids beside it."""
        return self.image_bytes * 4 // 3 + self.json_bytes + self.within_bytes

    def most(self) -> dict[str, int]:
        """The most that a limit may be raised to: beyond, another one would refuse what it allows."""
        image = (min(self.client_bytes, self.bytes) - self.json_bytes - self.within_bytes) * 3 // 4
        return {"text": self.json_bytes // CHARACTER, "image_bytes": image, "top": self.depth}


def room_for_connections() -> int:
    """The most connections for which there are files, with the process's limit raised as far as the system allows it."""
    files = raise_file_limit()
    return max(files - FILES_KEPT, files // 2)
