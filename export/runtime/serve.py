"""m3vit serve: an exported package behind HTTP (FastAPI and uvicorn, an extra: m3vit[serve]). No torch.

A request holds one of `concurrency + queue` places from before its body is read until its answer has been taken; one
that finds none is refused with 503. Predictions run in `concurrency` threads. Memory is bounded by them, by the limits
on bytes and pixels and by two allowances, of bytes that come and of answers (`admission.py`); connections have limits
of their own (`connections.py`), and other sites' pages are kept out (`hosts.py`). Every refusal is JSON:
{"error": "..."}.
"""

import asyncio
import logging
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m3vit import __version__
from m3vit.errors import InputError
from m3vit.export.runtime.admission import Allowance, Place, Places
from m3vit.export.runtime.answers import Values, archive, picture, png
from m3vit.export.runtime.bodies import expected_bytes, read_image_bytes
from m3vit.export.runtime.connections import CloseUnfinished, Crowd, LimitedServer, listen, most_connections
from m3vit.export.runtime.drawing import colourise, overlay
from m3vit.export.runtime.hosts import ANY, Hosts, HostsOnly
from m3vit.export.runtime.metrics import Metrics
from m3vit.export.runtime.options import Address, Limits, Loading
from m3vit.export.runtime.package import ALL, MAX_PATCHES, NotFinite, Package, PackageChanged
from m3vit.export.runtime.summary import summarise
from m3vit.heap import give_memory_back
from m3vit.images import WEB_FORMATS, TooManyPixels, decode_image
from m3vit.kinds import KINDS
from m3vit.kinds.classes import class_names

BODY_S = 30.0  # for a request's body to arrive
SHUTDOWN_S = 60  # for requests in flight to finish
RETRY_S = 1
BODIES_BYTES = 48 << 20  # of images that come or wait for their prediction, together
ANSWERS_BYTES = 16 << 20  # of answers on their way, together, besides those that keep their prediction's thread
PIECE_BYTES = 1 << 16  # of an answer, handed on when the last one has been taken


class Format(str, Enum):
    """What `POST /predict/{task}` answers with."""

    PNG = "png"
    OVERLAY = "overlay"
    NPY = "npy"
    JSON = "json"


class Resize(str, Enum):
    """Whether images run at the size trained at instead of their own; `auto`: only those that cannot otherwise."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Service:
    """Answers prediction requests for some of a package's tasks."""

    def __init__(self, package: Package, tasks: list[str], limits: Limits) -> None:
        self.package, self.tasks, self.limits = package, tasks, limits
        self.metrics = Metrics()
        self.pool = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="predict")
        self.places = Places(limits.concurrency + limits.queue, self.metrics.cut)
        self._running, self._waiting = asyncio.Semaphore(limits.concurrency), 0
        self._bodies, self._answers = Allowance(BODIES_BYTES), Allowance(ANSWERS_BYTES)

    async def predict(self, request: Request, task: str, answer: "Answer") -> Response:
        """Answer one request, or raise HTTPException. The place it takes goes to `request.state.held`."""
        if task not in self.tasks and task != ALL:
            raise HTTPException(404, f"no task {task!r}: this service has {', '.join(self.tasks)}")
        require_effect(request.query_params, answer)
        if task == ALL and answer.format in (Format.PNG, Format.OVERLAY):
            raise HTTPException(422, f"{answer.format.value} is of one task: give format=json or npy for all of them")
        try:
            self.package.of(answer.budget)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        expected = expected_bytes(request, self.limits.max_bytes)
        place = self.places.take()
        if place is None:
            raise self._busy(f"{self.limits.concurrency + self.limits.queue} requests are in hand already")
        request.state.held.take(place)
        try:
            give_back = await asyncio.wait_for(place.reserve(self._bodies, expected, "body"), BODY_S)
        except asyncio.TimeoutError:
            raise self._busy("too many large images are coming") from None
        data = await self._receive(request, place)
        self._waiting += 1
        try:
            await self._running.acquire()
        finally:
            self._waiting -= 1
        if answer.budget is None and self.limits.fallback and self._waiting:
            answer = replace(answer, budget=self.limits.fallback, fallback=True)
            self.metrics.fallbacks.inc()
        free_thread = place.holds(self._running.release)
        if await request.is_disconnected():
            raise ClientDisconnect
        response = await asyncio.get_running_loop().run_in_executor(self.pool, self._work, data, task, answer)
        give_back()
        if name := self.package.of(answer.budget).manifest.get("budget"):
            response.headers["M3vit-Budget"] = name + ("; fallback" if answer.fallback else "")

        async def let_next_begin() -> None:
            await place.reserve(self._answers, int(response.headers["content-length"]), "answer")
            free_thread()

        place.holds(asyncio.ensure_future(let_next_begin()).cancel)
        return response

    def _busy(self, why: str) -> HTTPException:
        self.metrics.rejected.inc()
        return HTTPException(503, f"{why}: try again later", {"Retry-After": str(RETRY_S)})

    async def _receive(self, request: Request, place: Place) -> bytes:
        """Return the image, or raise HTTPException if it does not come in time."""
        reading: asyncio.Task[bytes] | None = None
        with place.transfer("body", lambda: reading and reading.cancel()) as transfer:
            reading = asyncio.ensure_future(read_image_bytes(request, self.limits.max_bytes, transfer.move))
            try:
                return await asyncio.wait_for(reading, BODY_S)
            except asyncio.TimeoutError:
                late = f"the image did not arrive within {BODY_S:.0f} s: send it again"
            except asyncio.CancelledError:
                if not transfer.stopped:
                    raise
                late = "the image came too slowly: send it again"
            raise HTTPException(408, late)

    def _work(self, data: bytes, task: str, answer: "Answer") -> Response:
        """Decode, predict and encode: what takes time, in a thread."""
        try:
            image = decode_image(data, "the image", self.limits.max_pixels, WEB_FORMATS)
        except TooManyPixels as error:
            raise HTTPException(413, str(error)) from None
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        entry = self.package.entry(self.tasks[0] if task == ALL else task)
        resize = answer.resize is Resize.ALWAYS or (
            answer.resize is Resize.AUTO and must_resize(entry, image.shape[0], image.shape[1])
        )
        start = time.perf_counter()
        try:
            predictions = self._predictions(image, task, resize, self.package.of(answer.budget))
        except (NotFinite, PackageChanged) as error:  # the package's fault, not the image's
            raise HTTPException(500, str(error)) from None
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        elapsed = time.perf_counter() - start
        manifest = self.package.manifest
        if task == ALL:
            if answer.format is Format.NPY:
                return archive(predictions)
            figures = self._common(ALL, image, resize, elapsed, answer)
            figures["tasks"] = {name: self._figures(one, name, answer) for name, one in predictions.items()}
            return JSONResponse(figures)
        prediction = predictions[task]
        if answer.format is Format.NPY:
            return Values(prediction)
        if answer.format is Format.PNG:
            return Response(png(colourise(prediction, task, manifest)), media_type="image/png")
        if answer.format is Format.OVERLAY:
            return Response(png(overlay(image, prediction, task, manifest)), media_type="image/png")
        common = self._common(task, image, resize, elapsed, answer)
        return JSONResponse(common | self._figures(prediction, task, answer))

    def _predictions(
        self, image: NDArray[np.uint8], task: str, resize: bool, package: Package
    ) -> dict[str, NDArray[Any]]:
        """Return the predictions of a task, or of all that are served: at once where the package can."""
        if task != ALL:
            return {task: package.predict(image, task, resize=resize)}
        if set(self.tasks) == set(package.tasks):
            return package.predict(image, ALL, resize=resize)
        return {one: package.predict(image, one, resize=resize) for one in self.tasks}

    def _common(
        self, task: str, image: NDArray[np.uint8], resized: bool, elapsed: float, answer: "Answer"
    ) -> dict[str, Any]:
        """Return what an answer in figures says of any task."""
        height, width = image.shape[:2]
        took = round(1000 * elapsed, 3)
        found = {"task": task, "height": height, "width": width, "resized": resized, "milliseconds": took}
        if self.package.budgets:
            budget = self.package.of(answer.budget).manifest["budget"]
            found |= {"budget": budget, "fallback": answer.fallback}
        return found

    def _figures(self, prediction: NDArray[Any], task: str, answer: "Answer") -> dict[str, Any]:
        """Return a prediction in figures, and its picture if that is asked for."""
        figures = summarise(prediction, self.package.entry(task))
        return figures | (picture(prediction, task, self.package.manifest) if answer.picture else {})


@dataclass(frozen=True)
class Answer:
    """What a request asks for."""

    format: Format
    resize: Resize
    picture: bool
    budget: str | None = None  # of the package; None: the one it is served with
    fallback: bool = False  # the budget is the service's choice


def require_effect(query: QueryParams, answer: Answer) -> None:
    """Refuse what would have no effect: a name that is not known, a second value, a picture beside a picture."""
    taken = [one.name for one in fields(Answer) if one.name != "fallback"]
    for name, times in Counter(name for name, _ in query.multi_items()).items():
        if name not in taken:
            raise HTTPException(422, f"{name[:40]!r} is no parameter: choose from {', '.join(taken)}")
        if times > 1:
            raise HTTPException(422, f"{name} is given {times} times: give one value")
    if answer.picture and answer.format is not Format.JSON:
        raise HTTPException(422, f"picture=true adds one to format=json, not to {answer.format.value}: leave it out")


def must_resize(entry: dict[str, Any], height: int, width: int) -> bool:
    """Return whether a task's graph cannot run an image at its own size; see `Package.predict`."""
    if entry["input_size"]:
        return tuple(entry["input_size"]) != (height, width)
    patch = entry["patch_multiple"]
    return min(height, width) < patch or round(height / patch) * round(width / patch) > MAX_PATCHES


# ------------------------------------------------------------------------------------------------------------- app


class _Held:
    """The place of one request, once it has one, and the connection that the request came on."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.place: Place | None = None

    def take(self, place: Place) -> None:
        """Hold a place until `release`."""
        self.place = place
        if self.connection:
            self.connection.held = True

    def release(self) -> None:
        """Release what is held."""
        if self.place:
            self.place.release()
        if self.connection:
            self.connection.held = False

    def cut(self) -> None:
        """Drop the client."""
        if self.connection:
            self.connection.cut()


class _Measured:
    """ASGI middleware of the requests to /predict/...: counts and times them, whatever answers them, hands answers on
    in pieces, as they are taken, and releases the request's place when the last one is."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/predict/"):
            await self.app(scope, receive, send)
            return
        name = scope["path"].removeprefix("/predict/")
        task = name if name in (*self.service.tasks, ALL) else "unknown"  # strangers do not choose the names of series
        status = 500
        state = scope.setdefault("state", {})
        held = state["held"] = _Held(state.get("connection"))

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] != "http.response.body" or held.place is None:
                await send(message)
                return
            body, more = memoryview(message.get("body", b"")), message.get("more_body", False)
            with held.place.transfer("answer", held.cut) as transfer:
                for start in range(0, max(1, len(body)), PIECE_BYTES):
                    piece = body[start : start + PIECE_BYTES]
                    last = start + PIECE_BYTES >= len(body)
                    await send({"type": "http.response.body", "body": bytes(piece), "more_body": more or not last})
                    transfer.move(len(piece))

        metrics, start = self.service.metrics, time.perf_counter()
        try:
            with metrics.in_flight.track_inprogress():
                await self.app(scope, receive, noted)
        finally:
            held.release()
            metrics.requests.labels(task, str(status)).inc()
            metrics.seconds.labels(task).observe(time.perf_counter() - start)


def create_app(package: Package, tasks: list[str], limits: Limits, hosts: Hosts | None = None) -> FastAPI:
    """Return the ASGI application. `hosts`: those it answers for (default: any).

    Raises InputError for a task that the package lacks.
    """
    for task in tasks:
        package.entry(task)
    service = Service(package, tasks, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.pool.shutdown()

    # No docs_url: FastAPI's page loads its scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="m3vit", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.metrics = service.metrics
    app.add_middleware(HostsOnly, hosts=hosts or Hosts([ANY]))
    app.add_middleware(_Measured, service=service)  # it counts refusals too
    app.add_middleware(CloseUnfinished)
    app.add_exception_handler(StarletteHTTPException, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _defect)
    page = (files("m3vit.export.runtime") / "page.html").read_text()

    @app.get("/", response_class=HTMLResponse, summary="A page to drop an image on.")
    async def index() -> HTMLResponse:
        policy = "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        return HTMLResponse(page, headers={"Content-Security-Policy": f"{policy}; connect-src 'self'"})

    @app.get("/health", summary="Whether the service is up.")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/tasks", summary="The tasks, and what their predictions are.")
    async def list_tasks() -> dict[str, Any]:
        return {
            "tasks": [describe(package, task) for task in tasks],
            "train_size": package.manifest["image"]["train_size"],
            "max_bytes": limits.max_bytes,
            "max_pixels": limits.max_pixels,
            "budgets": package.budgets,
            "budget": package.manifest.get("budget"),
            "fallback": limits.fallback,
            "macs": {name: sum(package.of(name).entry(task)["macs"] for task in tasks) for name in package.budgets},
        }

    @app.get("/metrics", summary="Prometheus metrics.")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.post(
        "/predict/{task}",
        summary="Predict a task, or all, for an image: the body, or a form's field `image`.",
        response_class=Response,
    )
    async def predict(
        request: Request,
        task: str,
        format: Format = Query(Format.PNG, description="picture, picture over the image, values, figures"),  # noqa: B008
        resize: Resize = Query(Resize.AUTO, description="run at the size trained at"),  # noqa: B008
        picture: bool = Query(False, description="json only: add the picture and its legend"),
        budget: str | None = Query(None, description="one of the package's"),
    ) -> Response:
        try:
            return await service.predict(request, task, Answer(format, resize, picture, budget))
        except ClientDisconnect:
            return Response(status_code=499)  # nginx's number; nobody reads it but the metrics

    return app


def describe(package: Package, task: str) -> dict[str, Any]:
    """Return what `GET /tasks` says about a task."""
    entry = package.entry(task)
    described = {"name": task, "decode": entry["decode"], "unit": entry.get("unit"), "input_size": entry["input_size"]}
    described["dark_on_white"] = KINDS[entry["decode"]].dark_on_white
    if "palette" in entry:
        palette = [list(colour) for colour in entry["palette"]]
        described["classes"] = [
            {"id": index, "name": name, "colour": colour}
            for index, (name, colour) in enumerate(zip(class_names(entry), palette, strict=False))
        ]
    return described


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    message = str(error.detail)
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}: see the header Allow"
    elif error.status_code == 404 and message == "Not Found":
        message = f"{request.url.path} is not here: /, /health, /tasks, /metrics and /predict/{{task}} are"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{first['loc'][-1]} is {first.get('input')!r}: {first['msg']}"}, 422)


async def _defect(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "internal error; the service's log has the details"}, 500)


# ---------------------------------------------------------------------------------------------------------- server


def serve(
    package_dir: Path,
    address: Address = Address(),
    *,
    tasks: Sequence[str] = (),
    loading: Loading = Loading(),
    limits: Limits = Limits(),
    say: Callable[[str], None] = print,
) -> None:
    """Serve a package until SIGINT or SIGTERM; requests in flight are then answered first.

    No `tasks`: all of the package. `say` gets a line with the address as soon as requests are taken. Raises InputError
    for a bad package or task, an address that cannot be had, and fewer files than the limits need.
    """
    give_memory_back()
    package = Package.load(package_dir, **vars(loading))
    tasks = list(dict.fromkeys(tasks or package.tasks))
    check_fallback(package, limits.fallback)
    for one in [package.of(budget) for budget in package.budgets] or [package]:
        warm_up(one, tasks)
    listening = listen(address.host, address.port)
    bound = listening.getsockname()
    app = create_app(package, tasks, limits, Hosts.of(address.host, bound[0], address.allowed_hosts))
    crowd = Crowd(most_connections(limits.concurrency + limits.queue), app.state.metrics.cut)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        ws="none",
        log_level="error",  # defects; what strangers send is in the metrics
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of every damaged form
    server = LimitedServer(config, crowd)

    def stop(_: int, __: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn catches the signals while it serves and raises them again at the end, when these handlers are back: being
    # asked to stop is not a failure, and the exit code is 0.
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop)
    shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    say(f"serving {', '.join(tasks)} on http://{shown}:{bound[1]}/ (Ctrl-C stops)")
    with listening:
        server.run(sockets=[listening])


def check_fallback(package: Package, fallback: str | None) -> None:
    """Raise InputError for a fallback that is no budget of the package, or takes no less than the one it is for."""
    if fallback is None:
        return
    smaller = package.of(fallback)
    less, whole = (sum(entry["macs"] for entry in one.manifest["tasks"].values()) for one in (smaller, package))
    if less >= whole:
        raise InputError(
            f"--fallback {fallback} takes {less:,} MACs, and the budget {package.manifest['budget']} that it relieves "
            f"{whole:,}: give a smaller one"
        )


def warm_up(package: Package, tasks: list[str]) -> None:
    """Run every task once: graphs that cannot be loaded or run are noticed now, and no request waits for loading."""
    height, width = package.manifest["image"]["train_size"]
    names = [*tasks, ALL] if package.all_at_once and set(tasks) == set(package.tasks) else tasks
    for task in names:
        package.predict(np.zeros((height, width, 3), np.uint8), task, resize=True)
