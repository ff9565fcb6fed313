"""The HTTP interface. Everything a request names is looked up among indexes and their items; no part of it becomes a path."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from mmref.retrieval.feedback import Judgements
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.backend import Backend
from mmref.retrieval.service.counters import Counters
from mmref.retrieval.service.guard import SEVERAL, Guard
from mmref.retrieval.service.judging import Judging
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.pools import Pool
from mmref.retrieval.service.problems import INTERNAL, Problem, Refused, refuse
from mmref.retrieval.service.queries import (
    EXPLAINED,
    ExplainBody,
    ExplainQuery,
    JudgedQuery,
    JudgementBody,
    SearchBody,
    SearchQuery,
    invalid,
    judged_sentence,
    read_json,
    read_object,
    to_ask,
)
from mmref.version import __version__

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/common.js": ("common.js", "text/javascript"),
    "/address.js": ("address.js", "text/javascript"),
    "/detail.js": ("detail.js", "text/javascript"),
    "/filters.js": ("filters.js", "text/javascript"),
    "/judge.js": ("judge.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
IMAGES_KEPT = {"cache-control": "private, max-age=600"}
# Limits that clients should know.
TOLD = ("text", "image_bytes", "pixels", "top", "depth", "candidates", "filters", "within", "within_bytes")
HEALTH_S = 5.0  # an index that does not answer within is not well
HEALTH_KEPT_S = 1.0  # however often it is asked for
PARSERS = 2  # bodies of JSON that are read at once, beside the loop
CANDIDATES = 1000  # refined or passed over by a search that costs one; more cost more


class AnyPath(PathConvertor):
    """A path of a URL that may hold line ends, as names of files may: Starlette's own would find no item for it."""

    regex = "(?s:.*)"


register_url_convertor("path", AnyPath())


class ProblemBody(BaseModel):
    """Every error."""

    error: str
    message: str
    fix: str


def _posted(query: type[BaseModel], body: type[BaseModel]) -> dict[str, Any]:
    """What the description of a POST says: it takes an image with parameters, or one JSON object."""
    schema = query.model_json_schema()
    content = {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": body.model_json_schema()},
    }
    description = "An image to search with, as it is (the rest then comes in the query), or everything as JSON."
    parameters = [{"name": name, "in": "query", "schema": of} for name, of in schema["properties"].items()]
    return {"parameters": parameters, "requestBody": {"description": description, "content": content}}


JUDGED = {"requestBody": {"content": {"application/json": {"schema": JudgementBody.model_json_schema()}}}}


class Service:
    """The endpoints, over backends by the names of their indexes."""

    def __init__(
        self, backends: Mapping[str, Backend], access: Access, limits: Limits, judgements: Mapping[str, Judgements]
    ) -> None:
        self.backends, self.access, self.limits, self.metrics = dict(backends), access, limits, Counters()
        self.judging = Judging(judgements, limits)
        self._parsing = Pool(PARSERS, "mmref json")
        self._items: dict[str, int] = {}  # of each index, as its last answer said
        self._answered: dict[tuple[str, str], float] = {}  # when an index last did for a method
        self._health: tuple[float, dict[str, str]] = float("-inf"), {}  # when, and what was found
        self._looking: asyncio.Task[dict[str, str]] | None = None

    # -- searching ---------------------------------------------------------------------------------------------------

    async def search(self, request: Request, query: Annotated[SearchQuery, Query()]) -> Response:
        """Items for a sentence."""
        return await self._search(request, query, None)

    async def search_by_body(self, request: Request) -> Response:
        """Items for an image, or an image and a sentence, or a sentence that comes as JSON."""
        return await self._search(request, *await self._read(request, SearchQuery, SearchBody))

    async def _search(self, request: Request, query: SearchQuery, image: bytes | None) -> Response:
        name, backend = self._backend(query.index)
        ask = to_ask(query, image, self.limits)
        wanted = ask.offset
        if ask.refine and ask.candidates is not None:
            wanted = max(wanted, ask.candidates or self.limits.candidates)
        wanted = min(wanted, self._items.get(name, wanted))
        request.scope["charge"](max(0.0, wanted / CANDIDATES - 1))  # one has been paid
        answer = await self._within(name, "search", backend.search(ask))
        self._items[name] = answer["items"]
        self.metrics.searched(name, answer)
        return JSONResponse(answer)

    async def explain(self, query: Annotated[ExplainQuery, Query()]) -> Response:
        """Where in an item's image a sentence matches, and the references that the two resemble."""
        return await self._explain(query, None)

    async def explain_by_body(self, request: Request) -> Response:
        """The same for an image, or both."""
        return await self._explain(*await self._read(request, ExplainQuery, ExplainBody))

    async def _explain(self, query: SearchQuery, image: bytes | None) -> Response:
        item_id = query.id  # type: ignore[attr-defined]
        return JSONResponse(await self._call(query.index, "explain", to_ask(query, image, self.limits), item_id))

    async def _read(self, request: Request, query: Any, body: Any) -> tuple[SearchQuery, bytes | None]:
        """Parameters and image of a POST. Raises Refused."""
        kind, data = _kind_of(request), await request.body()
        if kind == "application/json":
            return await self._parsing.run(read_json, data, body, self.limits)
        if kind.startswith("image/") or kind == "application/octet-stream":
            given: dict[str, Any] = dict(request.query_params)
            given |= {name: request.query_params.getlist(name) for name in SEVERAL if name in given}
            try:
                return query.model_validate(given), data
            except ValidationError as error:
                raise Refused(invalid(error.errors())) from None
        message = f"a body of type {kind[:100] or 'unknown'!r} cannot be searched with."
        raise refuse(415, "UnknownBody", message, "Send an image (image/png, ...) or application/json.")

    def _backend(self, name: str | None) -> tuple[str, Backend]:
        if name is None:
            name = next(iter(self.backends))
        if name not in self.backends:
            fix = f"Choose one of: {', '.join(self.backends)}."
            raise refuse(404, "UnknownIndex", f"there is no index {name[:100]!r}.", fix)
        return name, self.backends[name]

    async def _call(self, index: str | None, method: str, *args: Any) -> Any:
        """What a method of an index's engine returns, in time. Raises Refused."""
        name, backend = self._backend(index)
        return await self._within(name, method, backend.call(method, *args))

    async def _within(self, name: str, method: str, work: Any) -> Any:
        """What a backend answers, in time. Raises Refused: 429 where it has answered others meanwhile, so that this request
        has only waited for its turn, 503 where it has answered nobody."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                answer = await work
        except TimeoutError:
            if self._answered.get((name, method), -math.inf) >= began:
                message = f"others have been answered meanwhile, this one not within {self.limits.timeout_s:g} s."
                raise refuse(429, "Busy", message, "Ask again in a moment.", 5) from None
            raise refuse(503, "Overloaded", "no answer in time.", "Ask again in a moment.", 5) from None
        except Refused as refused:
            if refused.problem.status < 500:  # an answer too
                self._answered[name, method] = time.monotonic()
            raise
        self._answered[name, method] = time.monotonic()
        return answer

    # -- judging -----------------------------------------------------------------------------------------------------

    async def judged(self, query: Annotated[JudgedQuery, Query()]) -> Response:
        """What was judged right or wrong for a sentence, and how many sentences something was judged for."""
        self.judging.check()
        (name, _), text = self._backend(query.index), judged_sentence(query, self.limits)
        found = await self._within(name, "judged", self.judging.judged(name, text))
        return JSONResponse({"index": name, "text": text} | found)

    async def judge(self, request: Request) -> Response:
        """Keep whether an item is right for a sentence."""
        self.judging.check()
        # A form of another page can send everything else without asking first.
        if (kind := _kind_of(request)) != "application/json":
            message = f"a body of type {kind[:100] or 'unknown'!r} is no judgement."
            raise refuse(415, "UnknownBody", message, "Send application/json.")
        body = await self._parsing.run(read_object, await request.body(), JudgementBody, self.limits)
        (name, _), text = self._backend(body.index), judged_sentence(body, self.limits)
        item = await self._call(name, "item", body.id)
        found = await self._within(name, "judge", self.judging.judge(name, text, item, body.relevant))
        return JSONResponse({"index": name, "text": text} | found)

    # -- items -------------------------------------------------------------------------------------------------------

    async def indexes(self) -> Response:
        """The indexes, and the columns each can be filtered by."""
        found = []
        for name, backend in self.backends.items():
            info = await self._within(name, "info", backend.call("info"))
            self.metrics.holds(name, info)
            found.append(info | {"name": name})
        limits = self.limits
        allowed = {name: getattr(limits, name) for name in TOLD}
        told = {"indexes": found, "limits": allowed, "judging": self.judging.on, "version": __version__}
        return JSONResponse(told)

    async def item(self, item_id: str, index: str | None = None) -> Response:
        """What is known of an item."""
        return JSONResponse(await self._call(index, "item", item_id))

    async def thumbnail(self, item_id: str, index: str | None = None) -> Response:
        """A small picture of an item (WebP)."""
        data = await self._call(index, "thumbnail", item_id)
        return Response(data, media_type="image/webp", headers=IMAGES_KEPT)

    async def image(self, item_id: str, index: str | None = None) -> Response:
        """The image of an item."""
        data, kind = await self._call(index, "image", item_id)
        return Response(data, media_type=kind, headers=IMAGES_KEPT)

    # -- the service itself ------------------------------------------------------------------------------------------

    async def healthz(self) -> Response:
        """Whether every index answers."""
        when, states = self._health
        if time.monotonic() - when > HEALTH_KEPT_S:
            looking = self._looking
            if looking is None or looking.done() or looking.get_loop() is not asyncio.get_running_loop():
                looking = self._looking = asyncio.ensure_future(self._look())
            states = await asyncio.shield(looking)  # one look for all who ask meanwhile
        healthy = all(state == "ok" for state in states.values())
        return JSONResponse({"status": "ok" if healthy else "failing", "indexes": states}, 200 if healthy else 503)

    async def _look(self) -> dict[str, str]:
        """How every index is."""

        async def well(backend: Backend) -> str:
            try:
                async with asyncio.timeout(HEALTH_S):
                    await backend.call("health")
            except Exception as error:  # whatever it is, the index does not answer
                return type(error).__name__
            return "ok"

        states = dict(zip(self.backends, await asyncio.gather(*(well(b) for b in self.backends.values()))))
        self._health = time.monotonic(), states
        return states

    async def prometheus(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def session(self, request: Request) -> Response:
        """Take the token once and give a browser a cookie for it: images of a page cannot send a header."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if self.access.token is None:
            return Response(status_code=204)
        if kind.lower() != "bearer" or not self.access.accepts(token.strip()):
            raise refuse(401, "WrongToken", "this is not the token of the service.", "Ask whoever runs it.")
        response = Response(status_code=204)
        response.set_cookie(self.access.cookie_name, self.access.cookie(), httponly=True, samesite="strict")
        return response


def build_app(
    backends: Mapping[str, Backend],
    access: Access | None = None,
    limits: Limits | None = None,
    judgements: Mapping[str, Judgements] | None = None,
) -> Guard:
    """The application, guarded.

    Args:
        backends: indexes by name; the first answers where a request names none.
        access: who may ask; by default this machine alone.
        limits: what may be asked.
        judgements: where those of each index are kept; by default nobody may judge.
    """
    access, limits = access or Access(), limits or Limits()
    service = Service(backends, access, limits, judgements or {})
    # FastAPI's own pages of documentation would load scripts from other hosts.
    app = FastAPI(title="mmref", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors: Any = {"4XX": {"model": ProblemBody}, "503": {"model": ProblemBody}}

    def add(path: str, method: str, endpoint: Any, **more: Any) -> None:
        app.add_api_route(path, endpoint, methods=[method], responses=errors, **more)

    add("/search", "GET", service.search)
    add("/search", "POST", service.search_by_body, openapi_extra=_posted(SearchQuery, SearchBody))
    add("/explain", "GET", service.explain)
    add("/explain", "POST", service.explain_by_body, openapi_extra=_posted(ExplainQuery, ExplainBody))
    add("/judgements", "GET", service.judged)
    add("/judgements", "POST", service.judge, openapi_extra=JUDGED)
    add("/indexes", "GET", service.indexes)
    add("/items/{item_id:path}", "GET", service.item)
    add("/thumbnail/{item_id:path}", "GET", service.thumbnail)
    add("/image/{item_id:path}", "GET", service.image)
    add("/healthz", "GET", service.healthz)
    add("/metrics", "GET", service.prometheus)
    add("/session", "POST", service.session, status_code=204)
    for path, (file, kind) in PAGE.items():
        app.add_api_route(path, _static(file, kind), methods=["GET"], include_in_schema=False)
    app.exception_handler(Refused)(lambda _, refused: as_response(refused.problem))
    app.exception_handler(RequestValidationError)(lambda _, error: as_response(invalid(error.errors())))
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(lambda _, error: as_response(INTERNAL))  # the guard logs it
    return Guard(app, access, limits, service.metrics)


def _kind_of(request: Request) -> str:
    """Media type of a body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _static(file: str, kind: str) -> Any:
    """An endpoint for a file of the page, read once."""
    content = resources.files("mmref.retrieval.service").joinpath("page", file).read_bytes()
    headers = {"cache-control": "no-cache"}

    async def page() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return page


def as_response(problem: Problem) -> Response:
    """A problem as an answer."""
    return JSONResponse(problem.body(), problem.status, problem.headers())


async def _http_error(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router."""
    names = {404: "NotFound", 405: "MethodNotAllowed"}
    message = f"{request.method} {request.url.path[:200]}: {error.detail}."
    problem = Problem(error.status_code, names.get(error.status_code, "HTTPError"), message, EXPLAINED)
    return JSONResponse(problem.body(), problem.status, error.headers)
