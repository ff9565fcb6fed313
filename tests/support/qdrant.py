"""The HTTP of a Qdrant server on the loopback, in front of Qdrant's own engine (the package `qdrant-edge-py`).

A collection is a shard of that engine, so vectors, filters and counts are Qdrant's. Routes, aliases and what a collection says of
itself are ours. So is what is true or false, which the package's filters take for 1 and 0: it lies there as a text.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONDITIONS = ("must", "should", "must_not")


@dataclass
class Collections:
    """What the server holds."""

    root: Path
    shards: dict[str, Any] = field(default_factory=dict)
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def shard(self, name: str) -> Any:
        return self.shards[self.aliases.get(name, name)]

    def create(self, name: str, asked: dict[str, Any]) -> bool:
        import qdrant_edge as edge

        assert asked["vectors"]["distance"] == "Dot" and name not in self.shards
        folder = self.root / name
        folder.mkdir()
        vectors = edge.EdgeVectorParams(size=asked["vectors"]["size"], distance=edge.Distance.Dot)
        self.shards[name] = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=vectors))
        self.said[name] = asked
        return True

    def delete(self, name: str) -> bool:
        self.shards.pop(name).close()
        return True

    def alias(self, actions: list[dict[str, Any]]) -> bool:
        for action in actions:
            if made := action.get("create_alias"):
                self.aliases[made["alias_name"]] = made["collection_name"]
            else:
                del self.aliases[action["delete_alias"]["alias_name"]]
        return True

    def info(self, name: str) -> dict[str, Any]:
        asked = self.said[self.aliases.get(name, name)]
        optimizers = {
            "deleted_threshold": 0.2,
            "vacuum_min_vector_number": 1000,
            "default_segment_number": 0,
            "flush_interval_sec": 5,
        }
        config = {
            "params": {"vectors": asked["vectors"]},
            "hnsw_config": {"m": 0, "ef_construct": 100, "full_scan_threshold": 10000},
            "optimizer_config": optimizers,
            "metadata": asked.get("metadata"),
        }
        return {"status": "green", "optimizer_status": "ok", "segments_count": 1, "config": config, "payload_schema": {}}

    def upsert(self, name: str, batch: dict[str, list[Any]]) -> dict[str, Any]:
        import qdrant_edge as edge

        payloads = [{key: _value(value) for key, value in payload.items()} for payload in batch["payloads"]]
        points = [edge.Point(*row) for row in zip(batch["ids"], batch["vectors"], payloads, strict=True)]
        self.shard(name).update(edge.UpdateOperation.upsert_points(points))
        return {"operation_id": 0, "status": "completed"}

    def index(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        import qdrant_edge as edge

        kind = {"keyword": "Keyword", "float": "Float", "bool": "Keyword", "datetime": "Datetime"}[asked["field_schema"]]
        schema = getattr(edge.PayloadSchemaType, kind)
        self.shard(name).update(edge.UpdateOperation.create_field_index(asked["field_name"], schema))
        return {"operation_id": 0, "status": "completed"}

    def query(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        import qdrant_edge as edge

        assert asked["params"]["exact"]
        found = self.shard(name).query(
            edge.QueryRequest(
                limit=asked["limit"],
                query=edge.Query.Nearest(asked["query"]["nearest"]),
                filter=_filter(asked.get("filter")),
                params=edge.SearchParams(exact=True),
                with_vector=asked["with_vector"],
                with_payload=asked["with_payload"],
            )
        )
        return {"points": [{"id": p.id, "version": 0, "score": p.score, "payload": p.payload, "vector": p.vector} for p in found]}

    def count(self, name: str, asked: dict[str, Any]) -> dict[str, int]:
        import qdrant_edge as edge

        return {"count": self.shard(name).count(edge.CountRequest(exact=True, filter=_filter(asked.get("filter"))))}


def _filter(asked: dict[str, Any] | None) -> Any:
    import qdrant_edge as edge

    if not asked:
        return None
    assert set(asked) <= set(CONDITIONS), asked
    return edge.Filter(**{name: [_condition(one) for one in asked[name]] for name in asked})


def _condition(asked: dict[str, Any]) -> Any:
    import qdrant_edge as edge

    if "has_id" in asked:
        return edge.HasIdCondition(set(asked["has_id"]))
    if "is_empty" in asked:
        return edge.IsEmptyCondition(asked["is_empty"]["key"])
    if "key" not in asked:
        return _filter(asked)
    if match := asked.get("match"):
        found = edge.MatchAny(match["any"]) if "any" in match else edge.MatchValue(_value(match["value"]))
        return edge.FieldCondition(asked["key"], match=found)
    bounds = {name: value for name, value in asked["range"].items() if value is not None}
    kind = edge.RangeDateTime if any(isinstance(value, str) for value in bounds.values()) else edge.RangeFloat
    return edge.FieldCondition(asked["key"], range=kind(**bounds))


def _value(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: Collections

    def _answer(self) -> Any:
        method, path, held = self.command, self.path.partition("?")[0].strip("/").split("/"), self.held
        size = int(self.headers.get("content-length") or 0)
        asked = json.loads(self.rfile.read(size)) if size else {}
        match method, path:
            case "GET", ["aliases"]:
                return {"aliases": [{"alias_name": a, "collection_name": c} for a, c in held.aliases.items()]}
            case "POST", ["collections", "aliases"]:
                return held.alias(asked["actions"])
            case "GET", ["collections", name, "exists"]:
                return {"exists": name in held.shards}
            case "GET", ["collections", name]:
                return held.info(name)
            case "PUT", ["collections", name]:
                return held.create(name, asked)
            case "DELETE", ["collections", name]:
                return held.delete(name)
            case "PUT", ["collections", name, "index"]:
                return held.index(name, asked)
            case "PUT", ["collections", name, "points"]:
                return held.upsert(name, asked["batch"])
            case "POST", ["collections", name, "points", "query", "batch"]:
                return [held.query(name, one) for one in asked["searches"]]
            case "POST", ["collections", name, "points", "count"]:
                return held.count(name, asked)
        raise LookupError(f"{method} {self.path}")

    def _handle(self) -> None:
        try:
            with self.held.lock:
                status, body = 200, {"result": self._answer(), "status": "ok", "time": 0.0}
        except Exception as error:  # as a server's own faults: the client is told
            status, body = 400, {"status": {"error": repr(error)}, "time": 0.0}
        said = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_PUT = do_POST = do_DELETE = _handle

    def log_message(self, *_: object) -> None:
        """Nothing: a test's output is its own."""


@contextlib.contextmanager
def qdrant() -> Iterator[str]:
    """URL of a server that ends with the context."""
    with tempfile.TemporaryDirectory() as root:
        held = Collections(Path(root))
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"held": held}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"qdrant://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            for name in list(held.shards):
                held.delete(name)
