"""Fill the photo of one request: read the upload, decode, wait, compute, write the file."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from PIL import Image

from data_prep.core.apart import Apart, DeathError
from data_prep.core.errors import PipelineError
from dpnet.inpainting.api import Hole, find_hole
from dpnet.inpainting.read_file import TooLargeError
from dpnet.serving.form import SAME, Form, parse_form
from dpnet.serving.limits import RequestError, ServeLimits
from dpnet.serving.models import Version
from dpnet.serving.pictures import MASK, PHOTO, File, Photo, check_format, decode, encode
from dpnet.serving.upload import ClientGoneError, Place, Room, read_upload
from dpnet.serving.work import CancelledError, Filled, Job, Work

DECODE_S = 60.0  # the longest time of decoding one photo and its mask; ours

Result = TypeVar("Result")


class Answer(NamedTuple):
    """A filled photo."""

    file: File
    version: Version
    seconds: float
    as_json: bool


class Filling:
    """The parts that all requests share: room, jobs, the decoder and threads for files."""

    def __init__(self, work: Work, limits: ServeLimits) -> None:
        self.work, self._limits = work, limits
        self.room = Room(limits)
        # A decoder that crashes must not end the server: it has a process of its own.
        self._decode = Apart(decode, DECODE_S)
        self._one_decodes = threading.Lock()
        self._threads = ThreadPoolExecutor(3, "dpnet-files")

    def close(self) -> None:
        """End the threads and the decoder's process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._decode.__exit__(None, None, None)

    async def answer(self, request: Request) -> Answer:
        """Fill the photo of a request.

        Raises:
            RequestError: the request cannot be answered.
            CancelledError: the job was cancelled.
            ClientGoneError: the client has closed the connection.
        """
        with self.room.place() as place:
            body = await read_upload(
                request.receive, request.headers.get("content-length"), self._limits, place
            )
            kind = request.headers.get("content-type", "")
            form = await self._in_thread(parse_form, kind, body)
            job = self.work.begin(form.job or f"server-{uuid.uuid4()}", form.model)
            filling = self._fill(form, job, place)
            del body, form  # only `filling` keeps the upload, until it is decoded
            try:
                return await while_connected(request, filling)
            except BaseException as error:
                gone = isinstance(error, CancelledError | ClientGoneError | asyncio.CancelledError)
                self.work.cancel(job)
                job.finish("cancelled" if gone else "failed")
                raise

    async def _fill(self, form: Form, job: Job, place: Place) -> Answer:
        photo, hole = await self._in_thread(self._read, form)
        same, as_json = form.format == SAME, form.as_json
        del form
        place.release_bytes()
        place.add_pixels(photo.image.width * photo.image.height)
        if job.cancelled.is_set():
            raise CancelledError
        filled = await asyncio.wrap_future(self.work.put(job, hole))
        file = await self._in_thread(_write, filled, photo, hole, same)
        if job.cancelled.is_set():
            raise CancelledError
        job.finish("done")
        return Answer(file, filled.version, filled.seconds, as_json)

    def _read(self, form: Form) -> tuple[Photo, Hole]:
        try:
            with self._one_decodes:
                photo, mask = self._decode(form.image, form.mask, self._limits.pixels)
        except DeathError as error:
            raise RequestError(
                400, f"{PHOTO} or {MASK} cannot be decoded: {error}. Send undamaged PNG files."
            ) from None
        except TooLargeError as error:
            raise RequestError(413, str(error)) from None
        except PipelineError as error:
            raise RequestError(400, str(error)) from None
        return photo, _checked(photo, mask, form)

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def _checked(photo: Photo, mask: Image.Image, form: Form) -> Hole:
    """Return the hole of a photo. Raises RequestError if it cannot be filled."""
    try:
        if form.format == SAME:
            check_format(photo)
        hole = find_hole(photo.image, mask, PHOTO, MASK, lambda sentence: None)
    except PipelineError as error:
        raise RequestError(400, str(error)) from None
    if hole is None:
        raise RequestError(
            400, f"{MASK} has no hole: paint the part of the photo to fill in white."
        )
    return hole


def _write(filled: Filled, photo: Photo, hole: Hole, same: bool) -> File:
    return encode(hole.back(filled.colours), photo, same=same)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; cancel it and raise ClientGoneError if the client goes.

    The body of the request was read to its end, so the next message is the end of the connection.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for each in (working, leaving):
            each.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
