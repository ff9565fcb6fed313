"""An HTTP server on the loopback that gives byte ranges of a folder's files, or, as simple ones, whole files alone, or these in
pieces without saying how long they are. What stands behind a `?` and before an `@` is passed over."""

from __future__ import annotations

import email.utils
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@contextmanager
def range_server(folder: Path, ranges: bool = True, length: bool = True) -> Iterator[str]:
    """URL of the folder."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = folder / unquote(self.path.partition("?")[0].lstrip("/"))
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            part = data[int(wanted[1]) : int(wanted[2] or len(data)) + 1] if wanted else data
            self.send_response(206 if wanted else 200)
            if length:
                self.send_header("Content-Length", str(len(part)))
            else:
                self.send_header("Transfer-Encoding", "chunked")
                part = b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part)
            self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            if wanted:
                self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}")
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
