"""`dpnet serve` as a real process: bad input, slow and cut clients, promotions, load, safety."""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_root
from PIL import Image
from sockets import interfaces, listening

from data_prep.core.storage.local import LocalStore
from dpnet.cli.main import main
from dpnet.model_store import packaged
from dpnet.registry.promotion import promote
from dpnet.serving.server import own_number

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SIZE = (96, 64)
TOKEN = "a-token-of-the-tests-2026"
WAIT_S = 120.0


class Reply(NamedTuple):
    """An answer of a server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """Return the sentence of an error."""
        found = json.loads(self.body)
        assert list(found) == ["error"]
        sentence = str(found["error"])
        assert sentence.endswith(".")
        assert "\n" not in sentence
        return sentence


class Served:
    """A running `dpnet serve`, whose output is in a file."""

    def __init__(self, folder: Path, *options: str, **environ: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log, temporary = folder / "serve.log", folder / "tmp"
        temporary.mkdir()
        env = {**os.environ, "TMPDIR": str(temporary), "HOME": str(folder / "home"), **environ}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpnet", "serve", *options],
                cwd=folder, stdout=log, stderr=log, env=env,
            )  # fmt: skip
        address = re.compile(r"^page and API +(http://\S+)$", re.MULTILINE)
        wait_for(lambda: address.search(self.text()) or self.process.poll() is not None)
        found = address.search(self.text())
        assert found is not None, self.text()
        self.login_url = found[1]
        self.url = found[1].partition("/login")[0]
        self.host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text("utf-8", "replace")

    def stop(self) -> None:
        """Stop the server as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
        """Send a request; header names have `_` in place of `-`."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            connection.request(method, path, body or None, given)
            answer = connection.getresponse()
            return Reply(
                answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
            )
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return the JSON of an address."""
        return json.loads(self.ask(path).body)

    def fill(self, image: bytes, mask: bytes, **fields: str) -> Reply:
        """Send a photo and its mask as a form."""
        return self.ask("/api/inpaint", "POST", form(image, mask, **fields), content_type=FORM)


def wait_for(found: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """Return what `found` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


FORM = "multipart/form-data; boundary=cut"


def form(image: bytes, mask: bytes, **fields: str) -> bytes:
    """Return a form with a photo whose name is an attack."""
    name = b'filename="../../<script>alert(1)</script>.png"'
    parts = [
        b'--cut\r\nContent-Disposition: form-data; name="%s"; %s\r\n\r\n%s\r\n' % (what, name, data)
        for what, data in ((b"image", image), (b"mask", mask))
    ]
    parts += [
        b'--cut\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (key.encode(), value.encode())
        for key, value in fields.items()
    ]
    return b"".join(parts) + b"--cut--\r\n"


def photo(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Return a photo of random colours."""
    made = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(made)


def hole(size: tuple[int, int] = SIZE, known: int = 20) -> Image.Image:
    """Return a mask that is white but for its first columns."""
    mask = Image.new("L", size, 255)
    mask.paste(0, (0, 0, known, size[1]))
    return mask


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes) -> Any:
    """Return the pixels of a file."""
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with two versions; version 1 is champion."""
    store = LocalStore(tmp_path_factory.mktemp("whole") / "root")
    small_root.two_versions(store)
    return store.folder


@pytest.fixture(scope="module")
def server(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a root for all tests that change nothing."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(whole, folder / "root")
    found = Served(folder, "--root", "root", "--max-pixels", "3000000", "--max-bytes", "9000000")
    yield found
    found.stop()


Start = Callable[..., Served]


@pytest.fixture
def start(whole: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that serves an own copy of the root in `root`."""
    started: list[Served] = []

    def starting(*options: str, copy: bool = True, **environ: str) -> Served:
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        if copy:
            shutil.copytree(whole, folder / "root")
        else:
            (folder / "root").mkdir()
        started.append(Served(folder, "--root", "root", *options, **environ))
        return started[-1]

    yield starting
    for each in started:
        each.stop()


def works(server: Served) -> None:
    """Check that the server fills a photo."""
    assert server.fill(saved(photo()), saved(hole())).status == 200


def test_a_photo_is_filled_as_the_command_fills_it_and_known_pixels_stay(
    server: Served, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = saved(photo()), saved(hole())
    answer = server.fill(image, mask, job="the-first-job")
    assert answer.status == 200
    assert answer.headers["x-dpnet-model"] == "dpnet@1"
    assert answer.headers["content-type"] == "image/png"
    assert float(answer.headers["x-dpnet-seconds"]) > 0
    assert (pixels(answer.body)[:, :20] == pixels(image)[:, :20]).all()
    assert (pixels(answer.body)[:, 20:] != pixels(image)[:, 20:]).any()
    (tmp_path / "photo.png").write_bytes(image)
    (tmp_path / "mask.png").write_bytes(mask)
    monkeypatch.chdir(tmp_path)
    assert main(["inpaint", "photo.png", "mask.png", "-o", "out.png", "--root", str(whole)]) == 0
    assert (pixels((tmp_path / "out.png").read_bytes()) == pixels(answer.body)).all()
    state = server.get("/api/jobs/the-first-job")
    assert state == {"state": "done", "position": 0, "done": 1, "total": 1}


def test_json_is_answered_with_json_and_the_same_pixels(server: Served) -> None:
    import base64

    image, mask = saved(photo()), saved(hole())
    values = {"image": base64.b64encode(image).decode(), "mask": base64.b64encode(mask).decode()}
    body = json.dumps({**values, "model": "dpnet@2"}).encode()
    answer = json.loads(
        server.ask("/api/inpaint", "POST", body, content_type="application/json").body
    )
    assert (answer["model"], answer["media_type"]) == ("dpnet@2", "image/png")
    by_form = server.fill(image, mask, model="dpnet@2")
    assert (pixels(base64.b64decode(answer["image"])) == pixels(by_form.body)).all()
    assert not (pixels(server.fill(image, mask).body) == pixels(by_form.body)).all()


def test_a_turned_photo_comes_back_upright_in_its_own_format(server: Served) -> None:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "Camera"
    image = saved(photo(), "JPEG", exif=tags, quality=95)
    assert "size" in server.fill(image, saved(hole())).error  # the mask is that of the stored photo
    answer = server.fill(image, saved(hole(SIZE[::-1])), format="same")
    with Image.open(io.BytesIO(answer.body)) as found:
        assert (found.format, found.size) == ("JPEG", SIZE[::-1])
        assert (found.getexif()[0x0112], found.getexif()[0x010F]) == (1, "Camera")


MOVING = saved(photo(), "GIF", save_all=True, append_images=[photo(seed=1)])
IMAGE, MASK = saved(photo()), saved(hole())
BAD = {
    "no hole": (IMAGE, saved(Image.new("L", SIZE)), {}, 400, "has no hole"),
    "all hole": (IMAGE, saved(Image.new("L", SIZE, 255)), {}, 400, "white everywhere"),
    "another size": (IMAGE, saved(hole((20, 20))), {}, 400, "20 x 20 pixels but the image is 96"),
    "cut photo": (IMAGE[:-500], MASK, {}, 400, "truncated"),
    "cut mask": (IMAGE, MASK[:-20], {}, 400, "the mask cannot be decoded"),
    "no picture": (b"<svg onload=alert(1)>", MASK, {}, 400, "not an image"),
    "a program": (b"\x7fELF" * 100, MASK, {}, 400, "not an image"),
    "a pickle": (b"\x80\x04cos\nsystem\n", MASK, {}, 400, "not an image"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(60), MASK, {}, 400, "export it as JPEG"),
    "animated": (MOVING, MASK, {}, 400, "not animated"),
    "16 bits": (saved(photo().convert("L").convert("I;16")), MASK, {}, 400, "8 bits"),
    "CMYK": (saved(photo().convert("CMYK"), "JPEG"), MASK, {}, 400, "convert it to 8-bit RGB"),
    "a photo as mask": (IMAGE, saved(Image.new("L", SIZE, 128)), {}, 400, "mostly grey"),
    "own format": (saved(photo(), "BMP"), MASK, {"format": "same"}, 400, "cannot be written"),
    "pixels": (saved(Image.new("RGB", (3001, 1000))), MASK, {}, 413, "too large"),
    "model": (IMAGE, MASK, {"model": "../../etc/passwd"}, 404, "no such model"),
    "format": (IMAGE, MASK, {"format": "exe"}, 400, "png or same"),
    "job": (IMAGE, MASK, {"job": "<b>"}, 400, "8 to 64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_with_one_sentence_and_the_server_goes_on(
    server: Served, name: str
) -> None:
    image, mask, fields, status, said = BAD[name]
    answer = server.fill(image, mask, **fields)
    assert (answer.status, said in answer.error) == (status, True), answer.body
    assert answer.headers["content-type"] == "application/json"
    assert "<" not in answer.error
    works(server)


def test_an_upload_that_ends_early_is_answered_with_a_sentence(server: Served) -> None:
    body = form(IMAGE, MASK)[:-30]
    answer = server.ask("/api/inpaint", "POST", body, content_type=FORM)
    assert (answer.status, "ended before its end" in answer.error) == (400, True)
    assert server.ask("/api/inpaint", "POST", b"x", content_type="text/plain").status == 415
    assert server.ask("/api/inpaint").status == 405
    assert server.ask("/static/..%2f..%2fapp.py").status == 404
    assert "no such page" in server.ask("/etc/passwd").error


def raw(server: Served, head: str) -> socket.socket:
    """Open a connection and send the head of a request."""
    connection = socket.create_connection(("127.0.0.1", server.port), WAIT_S)
    connection.sendall(head.replace("\n", "\r\n").encode())
    return connection


def received(connection: socket.socket) -> bytes:
    """Return a whole answer, which can come in several pieces; b"" if the connection is closed."""
    answer = b""
    while some := connection.recv(65_536):
        answer += some
        head, _, body = answer.partition(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if body and size and len(body) >= int(size[1]):
            break
    return answer


HEAD = (
    "POST /api/inpaint HTTP/1.1\nHost: 127.0.0.1:{port}\nContent-Type: " + FORM + "\n"
    "Content-Length: {size}\n\n"
)


def test_ten_gigabytes_that_are_announced_are_refused_before_anything_is_sent(
    server: Served,
) -> None:
    with raw(server, HEAD.format(port=server.port, size=10**10)) as connection:
        answer = received(connection)  # nothing was sent
    assert b" 413 " in answer.splitlines()[0]
    assert b"more than 9,000,000 bytes" in answer
    works(server)


def test_an_upload_without_an_announced_size_is_cut_off_at_the_limit(server: Served) -> None:
    head = HEAD.replace("Content-Length: {size}", "Transfer-Encoding: chunked")
    sent = 0
    with raw(server, head.format(port=server.port)) as connection:
        connection.settimeout(0.05)
        answer = b""
        while not answer and sent < 60_000_000:
            try:
                connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                sent += 65_536
            except TimeoutError:
                pass
            except OSError:  # the server has closed the connection
                break
            try:
                answer = connection.recv(4000)
            except TimeoutError:
                pass
    assert b" 413 " in answer.splitlines()[0]
    works(server)


def test_slow_clients_are_ended_and_hold_up_nobody(server: Served) -> None:
    head = HEAD.format(port=server.port, size=1000)
    half = [raw(server, head[:40]) for _ in range(5)]
    silent = [raw(server, head + "--cut") for _ in range(5)]
    works(server)
    for connection in silent:
        answer = received(connection)
        assert b" 408 " in answer.splitlines()[0]
        assert b"send it again over a faster connection" in answer
    for connection in half:
        assert connection.recv(4000) == b""
    for connection in half + silent:
        connection.close()
    assert server.get("/healthz")["ok"]
    wait_for(lambda: b"dpnet_serve_open_requests 0.0" in server.ask("/metrics").body)


LARGE = (1400, 1400)


def large_job(server: Served, job: str) -> tuple[threading.Thread, list[Reply], socket.socket]:
    """Send a photo of many tiles over a connection that can be cut."""
    body = form(saved(photo(LARGE), compress_level=1), saved(hole(LARGE, 600)), job=job)
    connection = raw(server, HEAD.format(port=server.port, size=len(body)))
    replies: list[Reply] = []

    def send() -> None:
        connection.sendall(body)
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
            replies.append(Reply(answer.status, {}, answer.read()))
        except (OSError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=send)
    thread.start()
    return thread, replies, connection


def state(server: Served, job: str) -> dict[str, Any]:
    answer = server.ask(f"/api/jobs/{job}")
    return dict(json.loads(answer.body)) if answer.status == 200 else {"done": 0, "state": ""}


def test_a_cut_connection_stops_computing(server: Served) -> None:
    thread, replies, connection = large_job(server, "cut-connection")
    wait_for(lambda: state(server, "cut-connection")["done"] >= 1)
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    thread.join(WAIT_S)
    wait_for(lambda: state(server, "cut-connection")["state"] == "cancelled")
    works(server)  # it would wait for all tiles
    found = state(server, "cut-connection")
    assert found["done"] < found["total"]
    assert replies == []


def test_a_job_is_cancelled_by_its_id(server: Served) -> None:
    thread, replies, _ = large_job(server, "cancelled-by-id")
    wait_for(lambda: state(server, "cancelled-by-id")["done"] >= 1)
    other = "a-small-photo"
    # A small photo is filled between the tiles of the large one.
    between = server.fill(IMAGE, MASK, job=other)
    assert state(server, "cancelled-by-id")["state"] == "running"
    assert server.ask("/api/jobs/cancelled-by-id", "DELETE").status == 204
    assert (pixels(between.body) == pixels(server.fill(IMAGE, MASK).body)).all()
    thread.join(WAIT_S)
    assert replies[0].status == 409
    assert "cancelled" in replies[0].error
    assert state(server, "cancelled-by-id")["state"] == "cancelled"
    assert server.ask("/api/jobs/unknown-job-1", "DELETE").status == 404


def test_two_clients_at_once_get_their_own_photos(server: Served) -> None:
    photos = [saved(photo(seed=seed)) for seed in range(6)]
    alone = [pixels(server.fill(each, MASK).body) for each in photos]
    with ThreadPoolExecutor(2) as clients:
        both = list(clients.map(lambda each: pixels(server.fill(each, MASK).body), photos))
    assert all((a == b).all() for a, b in zip(alone, both, strict=True))


def test_a_promotion_is_followed_without_a_restart_and_gone_files_leave_the_old_champion(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    root = LocalStore(tmp_path / "server0" / "root")
    assert server.fill(IMAGE, MASK).headers["x-dpnet-model"] == "dpnet@1"
    promote(root, "dpnet", 2, "better")
    wait_for(lambda: server.fill(IMAGE, MASK).headers["x-dpnet-model"] == "dpnet@2")
    small_root.another_version(root, 7)
    promote(root, "dpnet", 3, "better still")
    folder = json.loads((root.folder / "registry/dpnet/v3.json").read_text())["run"]["folder"]
    (root.folder / folder / "model/generator.safetensors").unlink()
    wait_for(lambda: "is missing" in server.get("/healthz")["problem"])
    assert server.fill(IMAGE, MASK).headers["x-dpnet-model"] == "dpnet@2"
    gone = server.fill(IMAGE, MASK, model="dpnet@3")
    assert (gone.status, "is missing" in gone.error) == (503, True)


def test_without_a_model_the_page_opens_and_says_what_to_do(start: Start, tmp_path: Path) -> None:
    server = start(copy=False)
    assert server.ask("/").status == 200
    wait_for(lambda: "no photo can be filled yet" in server.text())
    for answer in (server.ask("/healthz"), server.fill(IMAGE, MASK)):
        assert answer.status == 503
    assert "run the pipeline there first" in server.fill(IMAGE, MASK).error
    assert server.get("/api/models")["models"] == []
    assert "run the pipeline there first" in server.get("/api/models")["problem"]
    small_root.champion(LocalStore(tmp_path / "server0" / "root"))
    wait_for(lambda: server.ask("/healthz").status == 200)
    works(server)
    assert server.get("/api/models")["problem"] == ""


def test_a_root_that_is_no_folder_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPNET_ROOT", raising=False)
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "no-weights")
    for options, said in (
        ([], "dpnet-demo does not exist: name the folder"),
        (["--root", "none"], "none does not exist: name the folder"),
        (["--root", "none", "--model", "models:/dpnet/1"], "none does not exist: name the folder"),
        (["--root", "file"], "file is a file: name the folder"),
    ):
        assert main(["serve", *options]) == 2
        assert said in capsys.readouterr().err


def test_s3_that_does_not_answer_is_said_at_the_start_and_on_the_page(tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # it never listens, and no other test gets the port
        server = Served(
            tmp_path / "server", "--root", "s3://bucket/root",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{nobody.getsockname()[1]}", **keys,
        )  # fmt: skip
        try:
            wait_for(lambda: "no photo can be filled yet" in server.text())
            found = server.get("/api/models")
            assert (found["models"], "S3 server 127.0.0.1" in found["problem"]) == ([], True)
        finally:
            server.stop()


def test_a_full_queue_asks_to_come_back(start: Start) -> None:
    server = start("--queue", "1")
    thread, _, connection = large_job(server, "the-only-place")
    wait_for(lambda: state(server, "the-only-place")["done"] >= 1)
    answer = server.fill(IMAGE, MASK)
    assert (answer.status, answer.headers["retry-after"]) == (429, "5")
    assert "try again soon" in answer.error
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    thread.join(WAIT_S)
    wait_for(lambda: server.fill(IMAGE, MASK).status == 200)


def test_a_photo_that_takes_too_long_ends_with_504(start: Start) -> None:
    server = start("--max-seconds", "0.001")
    big = form(saved(photo((600, 600))), saved(hole((600, 600))))
    answer = server.ask("/api/inpaint", "POST", big, content_type=FORM)
    assert (answer.status, "not filled within 0.001 s" in answer.error) == (504, True)


def test_it_listens_on_loopback_only_and_answers_its_own_pages_only(server: Served) -> None:
    assert interfaces([server.process.pid]) == {"127.0.0.1"}
    assert listening([server.process.pid]) == {f"127.0.0.1:{server.port}"}
    own = f"127.0.0.1:{server.port}"
    for headers in (
        {"host": f"evil.example:{server.port}"},
        {"host": own, "origin": "http://evil.example"},
        {"host": own, "sec_fetch_site": "cross-site"},
    ):
        for method, path in (("GET", "/api/models"), ("POST", "/api/inpaint")):
            answer = server.ask(path, method, b"x" if method == "POST" else b"", **headers)
            assert (answer.status, "own" in answer.error) == (403, True)
    works(server)


def test_every_answer_has_the_protective_headers(server: Served) -> None:
    for path in ("/", "/docs", "/openapi.json", "/metrics", "/api/models", "/nothing"):
        headers = server.ask(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert not [name for name in headers if name.startswith("access-control-")]
    page = server.ask("/docs").body
    assert b"POST /api/inpaint" in page
    assert b"<script" not in page


def test_bound_elsewhere_every_request_needs_the_token(start: Start, tmp_path: Path) -> None:
    server = start("--host", "0.0.0.0")
    token = server.login_url.partition("#")[2]
    assert len(token) > 30
    kept = tmp_path / "server0/home/.cache/dpnet/serve/password"
    assert (kept.read_text().strip(), kept.stat().st_mode & 0o777) == (token, 0o600)
    for path in ("/api/models", "/metrics", "/openapi.json", "/static/app.js"):
        answer = server.ask(path)
        assert (answer.status, "the token is missing or wrong" in answer.error) == (401, True)
        assert server.ask(path, authorization=f"Bearer {token[:-1]}").status == 401
    page = server.ask("/", accept="text/html")
    assert (page.status, b"Log in" in page.body) == (401, True)
    assert server.ask("/api/models", authorization=f"Bearer {token}").status == 200
    assert server.ask("/healthz").status in (200, 503)
    assert server.ask("/login").status == server.ask("/login.js").status == 200
    assert server.ask("/login", "POST").status == 401
    entered = server.ask("/login", "POST", authorization=f"Bearer {token}")
    cookie = entered.headers["set-cookie"].partition(";")[0]
    assert (entered.status, token in cookie) == (204, False)
    assert server.ask("/api/models", cookie=cookie).status == 200
    assert server.ask("/api/models", cookie=cookie, host="evil.example").status == 403
    shown = re.findall(r"^(?:page and API|or) +http://(\S+)/login#", server.text(), re.MULTILINE)
    assert server.text().count(token) == len(shown)  # in the addresses, and nowhere else
    assert len(shown) == (2 if own_number() else 1)
    for host in shown:
        assert server.ask("/api/models", cookie=cookie, host=host).status == 200
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert token.encode() not in command


def test_a_token_of_the_environment_is_in_no_child_and_no_output(start: Start) -> None:
    server = start(DPNET_SERVE_TOKEN=TOKEN)
    assert server.ask("/api/models").status == 401
    body = form(IMAGE, MASK)
    headers = {"content_type": FORM, "authorization": f"Bearer {TOKEN}"}
    assert server.ask("/api/inpaint", "POST", body, **headers).status == 200
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    for pid in children.split():  # the decoder
        assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert TOKEN not in server.text()


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_written_to_disk_and_no_name_is_repeated(start: Start, tmp_path: Path) -> None:
    server = start()
    works(server)
    before = files_of(tmp_path)
    large = saved(photo((900, 700)), compress_level=0)  # above what a form keeps in memory
    assert len(large) > 1_500_000
    small = Image.new("L", (900, 700))
    small.paste(255, (100, 100, 120, 120))
    assert server.fill(large, saved(small)).status == 200
    assert server.fill(large[:-9], MASK).status == 400
    assert files_of(tmp_path) == before
    assert "script" not in server.text()


def test_votes_are_kept_in_the_root_and_shown_in_the_history(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start()
    root = tmp_path / "server0" / "root"
    vote = {"winner": "dpnet@2", "loser": "dpnet@1", "blind": True, "reason": "sharper\n\x1b[31m"}
    post = {"method": "POST", "content_type": "application/json"}
    assert server.get("/api/models")["votes"] is True
    kept = server.ask("/api/votes", body=json.dumps(vote).encode(), **post)
    assert kept.status == 201
    assert main(["registry", "history", "--root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "vote for version 2 over 1, without knowing which was which" in shown
    assert "sharper" in shown
    assert "\x1b" not in shown
    assert main(["verify", str(root)]) in (0, 1)
    assert "votes" not in capsys.readouterr().out
    for wrong in (
        vote | {"winner": "dpnet@1"}, vote | {"loser": "dpnet@9"}, vote | {"winner": 2},
        vote | {"reason": "x" * 501}, vote | {"blind": "yes"}, {},
    ):  # fmt: skip
        refused = server.ask("/api/votes", body=json.dumps(wrong).encode(), **post)
        assert refused.status == 400, wrong
        assert refused.error
    assert server.ask("/api/votes", body=b"x" * 9000, **post).status == 413
    assert len(list((root / "registry/dpnet/votes").iterdir())) == 1


def resident(pid: int) -> float:
    """Return the memory of a process in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) / 1024


def test_two_hundred_requests_of_twenty_clients_are_all_answered_and_memory_stays(
    start: Start,
) -> None:
    # Each large block goes back to the system when it is freed, so what grows is what is kept.
    # Without these settings memory goes up and down by 45 MB; with them by less than 1 MB.
    server = start(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536")
    size = (256, 256)
    mask = saved(hole(size))
    photos = [saved(photo(size, seed), compress_level=1) for seed in range(10)]
    expected = [pixels(server.fill(each, mask).body) for each in photos]
    numbers = [n % 10 for n in range(100)]

    def client(some: list[int]) -> list[tuple[int, Reply]]:
        found = []
        for number in some:
            while (answer := server.fill(photos[number], mask)).status == 429:
                time.sleep(0.1)
            found.append((number, answer))
        return found

    def hundred() -> float:
        """Send a hundred requests of twenty clients, and return by how many MB memory grew."""
        before = resident(server.process.pid)
        random.Random(0).shuffle(numbers)
        with ThreadPoolExecutor(20) as clients:
            parts = list(clients.map(client, [numbers[n::20] for n in range(20)]))
        answers = [each for some in parts for each in some]
        assert len(answers) == 100
        assert {answer.status for _, answer in answers} == {200}
        assert all((pixels(answer.body) == expected[number]).all() for number, answer in answers)
        return resident(server.process.pid) - before

    hundred()
    # The uploads and results of a hundred have 60 MB and more.
    assert hundred() < 6
    metrics = server.ask("/metrics").body.decode()
    assert "dpnet_serve_queue 0.0" in metrics
    assert 'dpnet_serve_model{model="dpnet@1"} 1.0' in metrics


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_computes_ends_with_one_sentence_for_everybody(
    start: Start, sent: signal.Signals
) -> None:
    server = start()
    thread, replies, connection = large_job(server, "until-the-end")
    wait_for(lambda: state(server, "until-the-end")["done"] >= 1)
    # An upload that never ends: its answer is cut off.
    other = raw(server, HEAD.format(port=server.port, size=1000) + "--cut")
    server.process.send_signal(sent)
    assert server.process.wait(WAIT_S) == 130
    thread.join(WAIT_S)
    connection.close()
    assert (replies[0].status, "the server is stopping" in replies[0].error) == (503, True)
    with other:
        assert b"the server is stopping" in received(other)
    _, _, printed = server.text().partition("Ctrl-C stops the server.\n")
    assert printed == "dpnet: stopped serving. The same command starts it again.\n"
