"""The application of `dpnet serve`: the page, the HTTP API and its errors."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

import dpnet
from data_prep.core.asgi_guard import Guard
from data_prep.core.errors import PipelineError
from dpnet.model_store.records import CHAMPION
from dpnet.serving import schema
from dpnet.serving.filling import Answer, Filling
from dpnet.serving.form import JOB, json_object
from dpnet.serving.limits import CLIENT_CLOSED, STOPPED, RequestError, ServeLimits
from dpnet.serving.login import LOGIN, LOGIN_PAGE, LOGIN_PAGES, WRONG, has_token, login_cookie
from dpnet.serving.metrics import Metrics
from dpnet.serving.models import Models
from dpnet.serving.pages import HEADERS, INDEX, api_page, page_files
from dpnet.serving.upload import ClientGoneError, Room, read_upload
from dpnet.serving.votes import Votes
from dpnet.serving.work import CancelledError, Job, Work

Endpoint = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)

HEALTH, ALIVE = "/healthz", "/livez"  # they need no token
_VOTE_BYTES = 8_000
_ADVICE = {
    404: "there is no such page: open / for the page, or /docs for the API.",
    405: "this address does not take this method: /docs lists the API.",
}
_CANCELLED = "the request was cancelled: nothing was filled."


class Service:
    """The parts that the endpoints use."""

    def __init__(
        self, models: Models, limits: ServeLimits, votes: Votes, *, batches: bool | None = None
    ) -> None:
        self.models, self.limits, self.votes = models, limits, votes
        self.work = Work(models, limits, batches=batches)
        self.filling = Filling(self.work, limits)
        self.metrics = Metrics(lambda: self.work.waiting, lambda: self.filling.room.requests)
        self.files = page_files()


def create_app(service: Service, *, token: str = "", port: int = 0) -> FastAPI:
    """Return the application.

    Args:
        service: what the endpoints use.
        token: the token that the login page's cookie gets; empty for none.
        port: the port that the server listens on.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.work.start()
        yield
        await asyncio.to_thread(service.work.stop)
        service.filling.close()

    app = FastAPI(
        title="DPNet: fill a hole in a photo",
        version=dpnet.__version__,
        description=schema.ABOUT,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_pages(app, service)
    _add_filling(app, service)
    _add_state(app, service)
    if token:
        headers = {"Set-Cookie": login_cookie(token, port)}
        _post(app, LOGIN, lambda request: _empty(headers), include_in_schema=False)
    for status in _ADVICE:
        app.add_exception_handler(status, _http_error)
    return app


def guarded_app(
    service: Service, port: int, *, token: str = "", names: Collection[str] = ()
) -> Guard:
    """Return the application behind its guard.

    Args:
        service: what the endpoints use.
        port: the port that the server listens on.
        token: what every request needs but those for health; empty for none.
        names: names of this server if other machines reach it, for the check of `Host`.
    """
    return Guard(
        create_app(service, token=token, port=port),
        port,
        may_enter=has_token(token, port) if token else lambda headers: True,
        unguarded=(HEALTH, ALIVE),
        pages=LOGIN_PAGES if token else {},
        ask=LOGIN_PAGE if token else None,
        names=names,
        wrong=WRONG,
        as_json=True,
        protective=HEADERS,
    )


def _answered(endpoint: Endpoint) -> Endpoint:
    """Return an endpoint that turns every error into JSON with one sentence."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            retry = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            return _error(error.status, str(error), retry)
        except CancelledError:
            return _error(409, _CANCELLED)
        except asyncio.CancelledError:  # only the end of the server cancels an answer
            return _error(503, STOPPED)
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED)
        except (PipelineError, OSError) as error:
            sentence = str(error) if isinstance(error, PipelineError) else "the storage fails."
            log.warning("serve: %s", error)
            return _error(503, sentence)
        except HTTPException:
            raise
        except Exception:
            log.exception("serve: a request failed")
            return _error(500, "the server has failed: its log says why. Try again.")

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(status, _ADVICE[status])


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, dict(headers or {}))


async def _empty(headers: dict[str, str]) -> Response:
    return Response(status_code=204, headers=headers)


def _get(app: FastAPI, path: str, endpoint: Endpoint, **about: Any) -> None:
    answer = _answered(endpoint)
    app.add_api_route(path, answer, methods=["GET"], response_model=None, **about)
    # The same without a body, as HTTP asks for. The server drops the body.
    app.add_api_route(path, answer, methods=["HEAD"], response_model=None, include_in_schema=False)


def _post(app: FastAPI, path: str, endpoint: Endpoint, **about: Any) -> None:
    app.add_api_route(path, _answered(endpoint), methods=["POST"], response_model=None, **about)


def _add_pages(app: FastAPI, service: Service) -> None:
    """Add the page, its files and the list of the API."""

    async def page(request: Request) -> Response:
        found = service.files.get(request.path_params.get("name", INDEX))
        if found is None:
            raise HTTPException(404)
        return Response(found.data, media_type=found.media_type)

    async def docs(request: Request) -> Response:
        return Response(api_page(app.openapi()), media_type="text/html; charset=utf-8")

    _get(app, "/", page, include_in_schema=False)
    _get(app, "/static/{name}", page, include_in_schema=False)
    _get(app, "/docs", docs, include_in_schema=False)


def _add_filling(app: FastAPI, service: Service) -> None:
    """Add the endpoints that fill a photo, and that show and cancel a job."""

    async def inpaint(request: Request) -> Response:
        outcome = "failed"
        try:
            answer = await service.filling.answer(request)
            outcome = "done"
            service.metrics.observe(answer.seconds)
            return await asyncio.to_thread(_filled, answer)  # base64 of a photo takes time
        except (CancelledError, ClientGoneError):
            outcome = "cancelled"
            raise
        except RequestError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        finally:
            service.metrics.count(outcome)

    def job_of(request: Request) -> Job:
        id = request.path_params["job"]
        job = service.work.find(id) if JOB.fullmatch(id) else None
        if job is None:
            raise RequestError(404, "there is no such job: it was not sent yet, or ended long ago.")
        return job

    async def state(request: Request) -> Response:
        job = job_of(request)
        position = service.work.position(job)
        facts: dict[str, Any] = {"state": job.state, "position": position}
        facts |= {"done": job.done, "total": job.total}
        if (left := job.seconds_left) is not None:
            facts["seconds_left"] = round(left, 1)
        return JSONResponse(facts)

    async def cancel(request: Request) -> Response:
        service.work.cancel(job_of(request))
        return Response(status_code=204)

    _post(app, "/api/inpaint", inpaint, **schema.INPAINT)
    _get(app, "/api/jobs/{job}", state, **schema.JOB_STATE)
    app.add_api_route(
        "/api/jobs/{job}", _answered(cancel), methods=["DELETE"], response_model=None,
        **schema.JOB_CANCEL,
    )  # fmt: skip


def _filled(answer: Answer) -> Response:
    seconds = f"{answer.seconds:.3f}"
    if answer.as_json:
        values = {
            "image": base64.b64encode(answer.file.data).decode(),
            "media_type": answer.file.media_type,
            "model": answer.version.id,
            "seconds": float(seconds),
        }
        return JSONResponse(values)
    headers = {
        "X-DPNet-Model": answer.version.id,
        "X-DPNet-Seconds": seconds,
        "Content-Disposition": f'attachment; filename="filled{answer.file.extension}"',
    }
    return Response(answer.file.data, media_type=answer.file.media_type, headers=headers)


def _add_state(app: FastAPI, service: Service) -> None:
    """Add the endpoints for models, votes, health and metrics."""

    async def models(request: Request) -> Response:
        found, problem = await asyncio.to_thread(service.models.listed)
        follows = service.models.source.follows
        limits = service.limits
        default = next((each["id"] for each in found if each["champion"]), CHAMPION)
        return JSONResponse({
            "models": found,
            "default": CHAMPION if follows else default,
            "limits": {"bytes": limits.bytes, "pixels": limits.pixels, "seconds": limits.seconds},
            "votes": service.votes.why_not() == "",
            "problem": problem,
        })  # fmt: skip

    async def vote(request: Request) -> Response:
        limits = replace(service.limits, bytes=_VOTE_BYTES)
        with Room(limits).place() as place:
            announced = request.headers.get("content-length")
            body = await read_upload(request.receive, announced, limits, place)
        values = json_object(body)
        kept = await asyncio.to_thread(service.votes.keep, values)
        return JSONResponse(kept, 201)

    async def health(request: Request) -> Response:
        version, problem = await asyncio.to_thread(service.models.health)
        if version is None:
            return _error(503, problem)
        return JSONResponse({"ok": True, "model": version.id, "problem": problem})

    async def alive(request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def metrics(request: Request) -> Response:
        current = service.models.current
        text = service.metrics.text("" if current is None else current.version.id)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    _get(app, "/api/models", models, **schema.MODELS)
    _post(app, "/api/votes", vote, **schema.VOTES)
    _get(app, HEALTH, health, **schema.HEALTH)
    _get(app, ALIVE, alive, **schema.ALIVE)
    _get(app, "/metrics", metrics, **schema.METRICS)
