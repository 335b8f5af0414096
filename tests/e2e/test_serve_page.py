"""The page of `dpnet serve` in a real browser, with a real server and a real, tiny model.

A console error, a violation of the page's policy or a request to another server fails every test.
With DPNET_SCREENSHOTS=DIR the tests write the screenshots of docs/serve.md to that folder. With
DPNET_SCREENSHOT_ROOT=ROOT they are of a copy of that root, which has trained versions 1 and 2 and
champion 1. Choose the tests of the screenshots then: -k "slider or side_by_side or phone".
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_root
from painted import paint_box, paint_line
from PIL import Image, ImageCms, ImageOps
from recording_proxy import Recording, recording_proxy
from skimage import data

from data_prep.core.storage.local import LocalStore
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.mask_reader import white_of_image
from dpnet.registry.promotion import promote
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.registry.votes import read_votes

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists(CHROMIUM), reason="no chromium: install Debian's package of that name"
    ),
]

SHOTS = os.environ.get("DPNET_SCREENSHOTS")
TRAINED_ROOT = os.environ.get("DPNET_SCREENSHOT_ROOT")
SECOND = 1000.0  # Playwright counts milliseconds
LONG = 150 * SECOND  # on a busy machine
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
QUEUE = 2  # requests at once, so that a test can make the server busy
READABLE, SEEN = 4.5, 3.0  # contrast of text and of controls, WCAG 2.2 AA


class Served:
    """A running `dpnet serve` that can be killed and started again on the same port."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = ["serve", "--root", str(self.root), "--queue", str(QUEUE)]
        if self.url:
            command += ["--port", self.url.rpartition(":")[2]]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dpnet", *command, "--json"], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


def make_root(folder: Path) -> None:
    """Make a root with a champion, version 1, and a challenger, both real and untrained."""
    store = small_root.new_store(folder)
    small_root.champion(store)
    nothing = small_root.commit(store, "images", "images/x", {"a": b"a"})
    run = small_root.trained(store, seed=1, images=nothing, masks=nothing)
    evaluation = small_root.commit(
        store, "evaluate", "evaluations", {"report.json": b"{}"}, inputs={"run": run},
        summary={"hole_psnr": 21.0, "pairs_digest": "p" * 64, "figures": {}},
    )  # fmt: skip
    register(RegisterSettings(promote="never"), run, evaluation, store)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("serve") / "root"
    if TRAINED_ROOT:
        shutil.copytree(TRAINED_ROOT, root)
    else:
        make_root(root)
    found = Served(root)
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield made
        made.close()


@pytest.fixture
def allowed() -> list[str]:
    """Regular expressions of console errors that the test causes on purpose."""
    return []


Open = Callable[..., Page]


@pytest.fixture
def new_page(browser: Browser, served: Served, allowed: list[str]) -> Iterator[Open]:
    """Return a function that opens the page in a new context; check the consoles at the end."""
    problems: list[str] = []
    contexts: list[BrowserContext] = []

    def opened(**options: Any) -> Page:
        context = browser.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(
            f"{message.type}: {message.text} {message.location['url']}"))  # fmt: skip
        page.on("request", lambda sent: None if sent.url.startswith((served.url, "blob:"))
                else problems.append(f"request to {sent.url}"))  # fmt: skip
        page.goto(served.url)
        expect(page.get_by_label("Version")).to_contain_text("Champion: dpnet version")
        return page

    expect.set_options(timeout=LONG)
    yield opened
    for context in contexts:
        context.close()
    # A job is unknown until the server has its upload.
    known = [*allowed, r"404 \(Not Found\).*/api/jobs/"]
    assert [text for text in problems if not any(re.search(each, text) for each in known)] == []


@pytest.fixture
def page(new_page: Open) -> Page:
    return new_page()


@pytest.fixture
def recording() -> Iterator[Recording]:
    """Keep what the browser sends."""
    with recording_proxy() as found:
        yield found


@pytest.fixture
def recorded_page(new_page: Open, recording: Recording) -> Page:
    return new_page(proxy={"server": recording.url})


def photograph(width: int = 300, height: int = 200, seed: int = 0) -> Image.Image:
    """Return a smooth colourful photo."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, file: Path, **options: Any) -> Path:
    image.save(file, **options)
    return file


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return saved(photograph(), tmp_path / "photo.png")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A real photo, as the screenshots show it: a spoon on a saucer."""
    small = Image.fromarray(data.coffee()).resize((450, 300))  # it is filled without tiles
    return saved(small, tmp_path / "coffee.png")


def load(page: Page, file: Path) -> None:
    page.get_by_label("Photo", exact=True).set_input_files(file)
    expect(page.get_by_role("status")).to_contain_text("is open")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def at(page: Page, right: float, down: float) -> tuple[float, float]:
    """Return the page position at a share of the stage."""
    box = page.locator("#stage").bounding_box()
    assert box is not None
    return round(box["x"] + right * box["width"]), round(box["y"] + down * box["height"])


def drag(page: Page, *places: tuple[float, float], button: Any = "left") -> list[tuple[int, int]]:
    """Drag the mouse over shares of the stage. Return the photo's pixels that the page names."""
    passed = []
    for number, place in enumerate(places):
        page.mouse.move(*at(page, *place))
        x, y = page.locator("#place").inner_text().split(", ")
        passed.append((int(x), int(y)))
        if number == 0:
            page.mouse.down(button=button)
    page.mouse.up(button=button)
    return passed


def brush(page: Page, size: int) -> None:
    page.get_by_label("Size in pixels").fill(str(size))
    page.get_by_label("Size in pixels").press("Tab")


def tool(page: Page, name: str) -> None:
    page.get_by_role("radio", name=name).check()


def download(page: Page, button: str) -> bytes:
    with page.expect_download() as found:
        page.get_by_role("button", name=button, exact=True).click()
    return found.value.path().read_bytes()


def mask_of(page: Page) -> np.ndarray:
    """Return the mask that the page would send."""
    with Image.open(io.BytesIO(download(page, "Download"))) as image:
        assert image.format == "PNG"
        assert image.mode == "1"
        return np.asarray(image.convert("L"))


def fill(page: Page) -> None:
    """Press Fill and wait for the result."""
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.get_by_role("button", name="Change the hole").first).to_be_visible()


def metric(url: str, name: str) -> float:
    """Return a value that the server counts."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


def until(url: str, name: str, value: float) -> None:
    """Wait until the server counts so much."""
    for _ in range(2000):
        if metric(url, name) == value:
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} is {metric(url, name)}, not {value}")


def shoot(page: Page, name: str) -> None:
    """Write a screenshot for the documentation, if the user requests it."""
    if SHOTS:
        with Image.open(io.BytesIO(page.screenshot())) as image:
            # This method keeps the colours of small parts, such as buttons.
            octree = Image.Quantize.FASTOCTREE
            palette = image.convert("RGB").quantize(128, octree, dither=Image.Dither.NONE)
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        palette.save(Path(SHOTS, f"{name}.png"), optimize=True)


def test_the_mask_is_what_was_painted_and_only_the_hole_changes(
    recorded_page: Page, recording: Recording, photo: Path
) -> None:
    page = recorded_page
    load(page, photo)
    expected = np.zeros((200, 300), np.uint8)
    brush(page, 25)
    passed = drag(page, (0.3, 0.3), (0.5, 0.6), (0.7, 0.35))
    for start, end in pairwise(passed):
        paint_line(expected, start, end, 25)
    brush(page, 12)
    tool(page, "Eraser")
    start, end = drag(page, (0.5, 0.5), (0.55, 0.7))
    paint_line(expected, start, end, 12, 0)
    tool(page, "Box")
    paint_box(expected, *drag(page, (0.6, 0.75), (0.45, 0.65)))
    paint_box(expected, *drag(page, (0.5, 0.68), (0.53, 0.72), button="right"), 0)
    assert np.array_equal(mask_of(page), expected)

    kept = download(page, "Download")
    fill(page)
    (fields,) = recording.forms
    assert fields["mask"] == kept
    assert fields["image"] == photo.read_bytes()
    with Image.open(io.BytesIO(download(page, "Download PNG"))) as result, Image.open(photo) as own:
        before, after = np.asarray(own), np.asarray(result)
    assert np.array_equal(before[expected == 0], after[expected == 0])
    assert not np.array_equal(before, after)


def test_undo_redo_invert_and_clear(page: Page, photo: Path) -> None:
    load(page, photo)
    drag(page, (0.3, 0.3), (0.4, 0.4))
    one = mask_of(page)
    drag(page, (0.6, 0.3), (0.7, 0.4))
    two = mask_of(page)
    page.keyboard.press("Control+z")
    assert np.array_equal(mask_of(page), one)
    page.keyboard.press("Control+Shift+Z")
    assert np.array_equal(mask_of(page), two)
    page.get_by_role("button", name="Invert the hole").click()
    assert np.array_equal(mask_of(page), 255 - two)
    page.get_by_role("button", name="Clear the hole").click()
    assert not mask_of(page).any()
    expect(page.get_by_text("No hole", exact=True)).to_be_visible()
    for before in (255 - two, two, one):
        page.get_by_role("button", name="Undo").click()
        assert np.array_equal(mask_of(page), before)
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    assert not mask_of(page).any()


def test_random_steps_and_bounded_undo(page: Page) -> None:
    """The logic of the mask, step by step against an independent one."""
    rng = np.random.default_rng(3)
    width, height = 333, 217
    expected, steps, known = np.zeros((height, width), np.uint8), [], []
    for _ in range(60):
        ends = [(int(rng.integers(-40, 370)), int(rng.integers(-40, 260))) for _ in range(2)]
        size, value = int(rng.integers(1, 90)), int(rng.choice([0, 255]))
        if rng.random() < 0.7:
            paint_line(expected, *ends, size, value)
        else:
            paint_box(expected, *ends, value)
            size = 0
        steps.append([*(dict(zip("xy", end, strict=True)) for end in ends), size, value])
        known.append(int((expected == 255).sum()))
    found = page.evaluate(
        """async ([width, height, steps]) => {
          const { Mask } = await import("/static/mask.js");
          const mask = new Mask(width, height);
          const totals = [];
          for (const [from, to, size, value] of steps) {
            mask.begin();
            if (size) mask.line(from, to, size, value);
            else mask.box(from, to, value);
            mask.end();
            totals.push(mask.total);
          }
          const last = [...mask.pixels];
          while (mask.undo());
          const empty = mask.pixels.every((pixel) => pixel === 0) && mask.total === 0;
          while (mask.redo());
          const again = mask.pixels.every((pixel, place) => pixel === last[place]);
          return { totals, last, empty, again };
        }""",
        [width, height, steps],
    )
    assert found["totals"] == known
    assert np.array_equal(np.array(found["last"], np.uint8).reshape(height, width), expected)
    assert found["empty"]
    assert found["again"]

    most = page.evaluate(
        """async () => {
          const { Mask } = await import("/static/mask.js");
          const mask = new Mask(6000, 4000);
          for (let x = 0; x < 6000; x += 128) mask.line({x, y: 0}, {x, y: 3999}, 9, 255);
          for (let y = 0; y < 4000; y += 128) mask.line({x: 0, y}, {x: 5999, y}, 9, 255);
          let most = 0;
          for (let step = 0; step < 40; step++) {
            mask.invert();
            most = Math.max(most, mask.undoBytes());
          }
          return most;
        }"""
    )
    assert 2**20 < most <= 64 * 2**20


def test_a_photo_of_24_megapixels_is_painted_exactly(
    recorded_page: Page, recording: Recording, tmp_path: Path
) -> None:
    page = recorded_page
    load(page, saved(photograph(6000, 4000), tmp_path / "large.jpg", quality=60))
    expected = np.zeros((4000, 6000), np.uint8)
    for size, places in ((173, ((0.3, 0.3), (0.42, 0.5))), (64, ((0.6, 0.2), (0.5, 0.25)))):
        brush(page, size)
        paint_line(expected, *drag(page, *places), size)
    tool(page, "Box")
    paint_box(expected, *drag(page, (0.5, 0.6), (0.55, 0.66)))
    page.mouse.move(*at(page, 0.6, 0.7))
    page.mouse.wheel(0, -1600)  # about ten times as large
    expect(page.locator("#zoom")).not_to_have_text(re.compile(r"^[1-3]?\d %"))
    tool(page, "Brush")
    brush(page, 7)
    paint_line(expected, *drag(page, (0.5, 0.5), (0.7, 0.6)), 7)
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.locator("#busy-text")).to_contain_text("tiles")  # so the server has the mask
    page.get_by_role("button", name="Cancel").click()
    (fields,) = recording.forms
    with Image.open(io.BytesIO(fields["mask"])) as mask:
        assert mask.size == (6000, 4000)
        assert np.array_equal(np.asarray(mask.convert("L")), expected)
    assert download(page, "Download") == fields["mask"]


def test_30_megapixels_show_tiles_and_can_be_cancelled(
    page: Page, served: Served, tmp_path: Path
) -> None:
    until(served.url, "dpnet_serve_open_requests", 0)
    cancelled = metric(served.url, 'dpnet_serve_requests_total{outcome="cancelled"}')
    load(page, saved(photograph(6720, 4480), tmp_path / "large.jpg", quality=60))
    tool(page, "Box")
    drag(page, (0.25, 0.2), (0.7, 0.8))
    share = page.locator("#share").inner_text()
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.locator("#busy-text")).to_contain_text(re.compile(r"\d+ of \d\d+ tiles"))
    assert int(page.get_by_role("progressbar").get_attribute("max") or 0) > 9
    left = re.compile(r"\d+ of \d\d+ tiles, about \d+ (s|minutes) left$")
    expect(page.locator("#busy-text")).to_have_text(left)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("Cancelled.")
    expect(page.locator("#share")).to_have_text(share)
    until(served.url, 'dpnet_serve_requests_total{outcome="cancelled"}', cancelled + 1)
    until(served.url, "dpnet_serve_open_requests", 0)


def test_drop_and_paste(page: Page, photo: Path) -> None:
    content = list(photo.read_bytes())
    page.evaluate(
        """(content) => {
          const file = new File([new Uint8Array(content)], "dropped.png", { type: "image/png" });
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(file);
          for (const name of ["dragover", "drop"]) {
            const options = { dataTransfer, bubbles: true, cancelable: true };
            document.getElementById("stage").dispatchEvent(new DragEvent(name, options));
          }
        }""",
        content,
    )
    expect(page.get_by_role("status")).to_have_text("dropped.png is open: 300 x 200 pixels.")

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """(content) => navigator.clipboard.write([
          new ClipboardItem({ "image/png": new Blob([new Uint8Array(content)],
            { type: "image/png" }) }),
        ])""",
        content,
    )
    drag(page, (0.4, 0.4), (0.5, 0.5))
    page.keyboard.press("Control+v")
    expect(page.get_by_role("status")).to_have_text(re.compile(r"image.png is open: 300 x 200"))
    expect(page.get_by_text("No hole", exact=True)).to_be_visible()


def test_a_name_is_never_html(page: Page, photo: Path) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    load(page, Path(shutil.copy(photo, photo.parent / name)))
    expect(page.locator("#photo-name")).to_have_text(name)
    assert page.locator("img").count() == 1  # the icon
    drag(page, (0.4, 0.4), (0.5, 0.5))
    fill(page)
    with page.expect_download() as found:
        page.get_by_role("button", name="Download PNG").click()
    assert found.value.suggested_filename.endswith("-filled.png")


def test_the_slider_shows_before_and_after(page: Page, picture: Path) -> None:
    load(page, picture)
    drag(page, (0.45, 0.3), (0.55, 0.4), (0.62, 0.32))
    page.mouse.move(*at(page, 0.4, 0.6))
    shoot(page, "paint")
    fill(page)
    page.mouse.move(*at(page, 0.4, 0.6))
    shoot(page, "result")
    left, top = at(page, 0.53, 0.3)
    right, bottom = at(page, 0.62, 0.42)
    clip: Any = {"x": left, "y": top, "width": right - left, "height": bottom - top}

    def shown() -> bytes:
        with Image.open(io.BytesIO(page.screenshot(clip=clip))) as image:
            return image.convert("RGB").tobytes()

    after = shown()
    slider = page.get_by_role("slider", name="Share of the photo before the fill")
    page.mouse.move(*at(page, 0.5, 0.5))
    page.mouse.down()
    page.mouse.move(*at(page, 0.9, 0.5), steps=3)
    page.mouse.up()
    expect(slider).to_have_attribute("aria-valuenow", "90")
    assert shown() != after
    slider.press("Home")
    expect(slider).to_have_attribute("aria-valuenow", "0")
    assert shown() == after
    slider.press("End")
    assert shown() != after
    slider.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuenow", "98")


def test_fill_again_on_the_result_and_go_back(
    recorded_page: Page, recording: Recording, photo: Path
) -> None:
    page = recorded_page
    load(page, photo)
    drag(page, (0.3, 0.3), (0.4, 0.4))
    first = mask_of(page)
    fill(page)
    result = download(page, "Download PNG")
    page.get_by_role("button", name="Fill again on this").click()
    assert not mask_of(page).any()
    drag(page, (0.6, 0.5), (0.7, 0.6))
    fill(page)
    assert recording.forms[-1]["image"] == result
    page.get_by_role("button", name="Change the hole").first.click()
    page.keyboard.press("Control+z")
    expect(page.get_by_text("No hole", exact=True)).to_be_visible()
    page.keyboard.press("Control+z")
    expect(page.get_by_role("status")).to_contain_text("as it was before the last fill")
    assert np.array_equal(mask_of(page), first)
    fill(page)
    assert recording.forms[-1]["image"] == recording.forms[0]["image"] == photo.read_bytes()


def test_a_turned_jpeg_keeps_format_profile_and_exif(page: Page, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"  # turned by a quarter
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"exif": exif, "icc_profile": profile, "quality": 95, "subsampling": 0}
    file = saved(photograph(400, 240), tmp_path / "turned.jpg", **options)
    load(page, file)
    expect(page.get_by_role("status")).to_have_text("turned.jpg is open: 240 x 400 pixels.")
    drag(page, (0.45, 0.3), (0.5, 0.5))
    mask = mask_of(page)
    assert mask.shape == (400, 240)
    fill(page)
    with (
        Image.open(io.BytesIO(download(page, "Download JPEG"))) as made,
        Image.open(file) as given,
        Image.open(io.BytesIO(download(page, "Download PNG"))) as exact,
    ):
        assert (made.format, exact.format) == ("JPEG", "PNG")
        assert made.info["icc_profile"] == exact.info["icc_profile"] == profile
        assert made.getexif()[0x010F] == "Maker"
        upright = np.asarray(ImageOps.exif_transpose(given)).astype(int)
        for result, most in ((made, 8), (exact, 0)):
            assert result.getexif().get(0x0112, 1) == 1
            change = np.abs(np.asarray(result).astype(int) - upright).max(2)
            far = np.pad(mask, 8, mode="edge")  # JPEG blocks near the hole change with it
            near = np.max([np.roll(far, (y, x), (0, 1)) for y in (-8, 0, 8) for x in (-8, 0, 8)], 0)
            assert change[near[8:-8, 8:-8] == 0].max() <= most


def test_a_mask_is_opened_again_and_that_of_another_photo_is_refused(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    load(page, photo)
    brush(page, 30)
    drag(page, (0.3, 0.3), (0.6, 0.5))
    kept = tmp_path / "mask.png"
    kept.write_bytes(download(page, "Download"))
    page.get_by_role("button", name="Clear the hole").click()
    page.get_by_label("Mask", exact=True).set_input_files(kept)
    expect(page.get_by_role("status")).to_contain_text("The mask is open.")
    assert download(page, "Download") == kept.read_bytes()

    soft = np.tile(np.clip(3 * np.arange(-100, 200), 0, 255).astype(np.uint8), (200, 1))
    page.get_by_label("Mask", exact=True).set_input_files(
        saved(Image.fromarray(soft), tmp_path / "soft.png")
    )
    expect(page.locator("#share")).to_have_text("Hole 52.3 %")
    assert np.array_equal(mask_of(page) == 255, soft >= 128)

    other = saved(Image.new("L", (120, 90), 255), tmp_path / "other.png")
    page.get_by_label("Mask", exact=True).set_input_files(other)
    expect(page.get_by_role("alert")).to_have_text(
        "The mask is 120 x 90 pixels but the photo is 300 x 200: open the mask of this photo."
    )
    assert np.array_equal(mask_of(page) == 255, soft >= 128)


def masks_at_the_bounds() -> dict[str, Image.Image]:
    """Return masks of all kinds, 300 x 200, and pictures that are nearly masks."""

    def palette(*colours: int) -> Image.Image:
        image = Image.new("P", (300, 200))
        image.putpalette(colours)
        image.paste(1, (20, 20, 90, 90))
        image.paste(2, (100, 20, 120, 190))
        return image

    def drawn(outside: int) -> Image.Image:
        image = Image.new("RGBA", (300, 200), (0, 0, 0, outside))
        image.paste((0, 0, 0, 255), (50, 60, 90, 99))
        return image

    half = np.zeros((200, 300), np.uint8)
    half[:100] = 128
    more = half.copy()
    more[100, 0] = 128
    edges = np.tile(np.repeat(np.array([31, 224], np.uint8), 150), (200, 1))
    arrays = {"half grey": half, "more grey": more, "edges": edges, "ones": half // 128}
    return {
        "labels": palette(0, 0, 0, 128, 0, 0, 0, 0, 90),
        "no black": palette(9, 0, 0, 128, 0, 0, 255, 255, 255),
        "unused colour": palette(0, 0, 0, 90, 90, 90, 200, 200, 200, 255, 0, 0),
        "alpha": drawn(0),
        "grey alpha": drawn(100),
        "photo": photograph(),
        **{name: Image.fromarray(values) for name, values in arrays.items()},
    }


DECODE_MASKS = """async (files) => {
  const { decodeMask } = await import("/static/png.js");
  const found = {};
  for (const [name, content] of Object.entries(files)) {
    const file = new File([new Uint8Array(content)], "mask.png");
    found[name] = await decodeMask(file, 300, 200).then(
      (pixels) => pixels.reduce((text, pixel) => text + (pixel ? 1 : 0), ""),
      (error) => error.message,
    );
  }
  return found;
}"""


def test_masks_are_read_by_the_rule_of_the_command(page: Page) -> None:
    masks = masks_at_the_bounds()
    found = page.evaluate(DECODE_MASKS, {name: list(as_png(m)) for name, m in masks.items()})
    refused = set()
    for name, mask in masks.items():
        try:
            white = white_of_image(mask).white
        except PhotoError:
            refused.add(name)
            assert "is mostly grey" in found[name], name
        else:
            assert found[name] == "".join(map(str, white.astype(int).ravel())), name
    assert refused == {"more grey", "grey alpha", "photo"}


def test_a_grey_picture_and_an_empty_file_are_no_masks(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    load(page, photo)
    drag(page, (0.4, 0.4), (0.5, 0.5))
    share = page.locator("#share").inner_text()
    empty = tmp_path / "empty.png"
    empty.touch()
    for file, sentence in {
        saved(Image.new("L", (300, 200), 128), tmp_path / "grey.png"): "The mask is mostly grey",
        empty: "The file empty.png is empty: choose another file.",
    }.items():
        page.get_by_label("Mask", exact=True).set_input_files(file)
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        expect(page.locator("#share")).to_have_text(share)
    black = saved(Image.new("L", (300, 200)), tmp_path / "black.png")
    page.get_by_label("Mask", exact=True).set_input_files(black)
    expect(page.get_by_role("status")).to_have_text(
        "The mask is open. It has no hole: nothing in it is white."
    )
    white = saved(Image.new("L", (300, 200), 255), tmp_path / "white.png")
    page.get_by_label("Mask", exact=True).set_input_files(white)
    expect(page.get_by_role("alert")).to_contain_text("The hole is the whole photo")


def test_a_promotion_while_the_page_is_open(page: Page, photo: Path, served: Served) -> None:
    store = LocalStore(served.root)
    load(page, photo)
    drag(page, (0.4, 0.4), (0.5, 0.5))
    fill(page)
    expect(page.get_by_text("After: dpnet version 1")).to_be_visible()
    page.get_by_role("button", name="Change the hole").first.click()
    try:
        promote(store, "dpnet", 2, "a test")
        page.wait_for_timeout(1.2 * SECOND)  # the server looks once a second
        fill(page)
        expect(page.get_by_text("After: dpnet version 2")).to_be_visible()
        expect(page.get_by_role("status")).to_have_text(
            re.compile(r"Filled by dpnet version 2 in .* It is the new champion\.")
        )
        expect(page.get_by_label("Version")).to_contain_text("Champion: dpnet version 2")
    finally:
        promote(store, "dpnet", 1, "the test is over")


def wait_for_the_next_look(page: Page) -> None:
    """Let the page ask for the models again."""
    time.sleep(1.2)  # the server looks once a second
    page.clock.run_for(10 * SECOND)


def test_an_open_page_shows_a_new_champion_and_a_broken_root(page: Page, served: Served) -> None:
    page.clock.install()
    page.reload()
    version, problem = page.get_by_label("Version"), page.locator("#problem")
    expect(version).to_contain_text("Champion: dpnet version 1")
    expect(problem).to_be_hidden()
    registry, away = served.root / "registry", served.root / "away"
    try:
        promote(LocalStore(served.root), "dpnet", 2, "a test")
        wait_for_the_next_look(page)
        expect(version).to_contain_text("Champion: dpnet version 2")
        registry.rename(away)
        wait_for_the_next_look(page)
        expect(problem).to_contain_text(re.compile("[A-Z].+"))
        page.reload()
        expect(problem).to_contain_text(re.compile("[A-Z].+"))
    finally:
        if away.exists():
            away.rename(registry)
        promote(LocalStore(served.root), "dpnet", 1, "the test is over")
    wait_for_the_next_look(page)
    expect(version).to_contain_text("Champion: dpnet version 1")
    expect(problem).to_be_hidden()


def test_two_versions_side_by_side_with_a_blind_vote(
    page: Page, picture: Path, served: Served
) -> None:
    load(page, picture)
    drag(page, (0.45, 0.3), (0.55, 0.4), (0.62, 0.32))
    rival = page.get_by_label("Compare with")
    assert rival.locator("option").all_inner_texts() == ["Nothing", "dpnet version 2"]
    rival.select_option(label="dpnet version 2")
    page.get_by_label("Version").select_option(label="dpnet version 2")
    expect(rival).to_have_value("")  # nothing to compare with itself
    assert rival.locator("option").all_inner_texts() == ["Nothing", "dpnet version 1"]
    rival.select_option(label="dpnet version 1")
    press_fill = page.get_by_role("button", name="Fill", exact=True)
    models: list[str] = []
    page.on("response", lambda answer: models.append(answer.headers["x-dpnet-model"])
            if answer.url.endswith("/api/inpaint") else None)  # fmt: skip
    press_fill.click()
    better = page.get_by_role("button", name="B is better")
    expect(better).to_be_visible()
    for name in ("version 1", "version 2"):
        expect(page.locator("main").get_by_text(name)).to_have_count(0)
    shoot(page, "side-by-side")
    page.get_by_label("Why").fill("The <b>edge</b> is sharper.")
    better.click()
    expect(page.get_by_role("status")).to_contain_text("Your vote is stored")
    assert sorted(models) == ["dpnet@1", "dpnet@2"]
    loser, winner = (int(model.rpartition("@")[2]) for model in models)
    *_, vote = read_votes(LocalStore(served.root), "dpnet")
    assert (vote.winner, vote.loser, vote.blind) == (winner, loser, True)
    assert vote.reason == "The <b>edge</b> is sharper."
    page.get_by_role("button", name="Continue with A").click()
    expect(page.get_by_text(f"After: dpnet version {loser}")).to_be_visible()


def test_two_clients_at_once(new_page: Open, tmp_path: Path) -> None:
    pages = [new_page(), new_page()]
    for number, page in enumerate(pages):
        load(page, saved(photograph(seed=number), tmp_path / f"{number}.png"))
        drag(page, (0.4, 0.4), (0.5, 0.5))
    for page in pages:
        page.get_by_role("button", name="Fill", exact=True).click()
    for number, page in enumerate(pages):
        expect(page.get_by_role("status")).to_contain_text("Filled by dpnet version 1")
        with Image.open(io.BytesIO(download(page, "Download PNG"))) as result:
            corner = np.asarray(result)[:20, :20]
        assert np.array_equal(corner, np.asarray(photograph(seed=number))[:20, :20])


def post(url: str, image: bytes, mask: bytes) -> None:
    """Send a photo as a program does."""
    parts = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in (("image", image), ("mask", mask))
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{url}/api/inpaint", parts + b"--x--\r\n", kind)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_a_busy_server_is_asked_again(
    page: Page, photo: Path, served: Served, allowed: list[str]
) -> None:
    allowed.append(r"429 \(Too Many Requests\)")
    load(page, photo)
    drag(page, (0.4, 0.4), (0.5, 0.5))
    image = as_png(photograph(480, 360))
    mask = as_png(ImageOps.expand(Image.new("L", (440, 320), 255), 20))
    others = [threading.Thread(target=post, args=(served.url, image, mask)) for _ in range(QUEUE)]
    for each in others:
        each.start()
    until(served.url, "dpnet_serve_open_requests", QUEUE)
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.locator("#busy-text")).to_contain_text("The server is busy: trying again in")
    expect(page.get_by_role("status")).to_contain_text("Filled by dpnet version 1")
    for each in others:
        each.join()


def test_a_cut_connection_loses_nothing(
    page: Page, tmp_path: Path, served: Served, allowed: list[str]
) -> None:
    allowed.append("Failed to load resource: net::")
    load(page, saved(photograph(600, 200), tmp_path / "wide.jpg"))
    tool(page, "Box")
    drag(page, (0.08, 0.48), (0.92, 0.52))
    painted = mask_of(page)
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.locator("#busy-text")).to_contain_text("tiles")
    served.kill()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    assert np.array_equal(mask_of(page), painted)
    page.get_by_role("button", name="Fill", exact=True).click()  # there is still no server
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    served.start()
    expect(page.get_by_role("status")).to_have_text("The server is back: press Fill.")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert np.array_equal(mask_of(page), painted)
    fill(page)


def strange_files(folder: Path) -> dict[Path, str]:
    """Return files that are refused when they are opened, with a part of the sentence."""
    text, empty = folder / "text.png", folder / "empty.jpg"
    text.write_text("This is no picture.")
    empty.touch()
    moments = [photograph(30, 20, number) for number in range(3)]
    moving = {"save_all": True, "append_images": moments[1:]}
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    four = moments[0].convert("CMYK")
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    return {
        text: "cannot be decoded",
        empty: "The file empty.jpg is empty: choose another file.",
        **{saved(moments[0], folder / f"moving.{kind}", **moving): "not animated"
           for kind in ("gif", "webp", "png")},
        saved(deep, folder / "deep.png"): "more than 8 bits",
        saved(four, folder / "print.jpg", exif=exif, progressive=True): "CMYK",
    }  # fmt: skip


def usual_files(folder: Path) -> list[Path]:
    image = photograph(30, 20)
    palette = image.quantize(8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return [
        saved(image, folder / "still.gif"),
        saved(image, folder / "still.webp", icc_profile=profile),
        saved(palette, folder / "palette.png", transparency=0),
        saved(image.convert("L"), folder / "grey.jpg", progressive=True, icc_profile=profile),
    ]


def test_a_strange_file_shows_the_sentence_of_the_server(
    page: Page, tmp_path: Path, allowed: list[str]
) -> None:
    allowed.append(r"400 \(Bad Request\)")
    for file, sentence in strange_files(tmp_path).items():
        page.get_by_label("Photo", exact=True).set_input_files(file)
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        expect(page.get_by_role("button", name="Choose a photo")).to_be_visible()
        page.get_by_role("button", name="Close this message").click()
        expect(page.get_by_role("alert")).to_be_hidden()
    for file in usual_files(tmp_path):
        page.get_by_label("Photo", exact=True).set_input_files(file)
        expect(page.get_by_role("status")).to_have_text(f"{file.name} is open: 30 x 20 pixels.")


def test_a_page_with_a_hole_asks_before_it_is_closed(page: Page, photo: Path) -> None:
    kinds: list[str] = []

    def stay(dialog: Any) -> None:
        kinds.append(dialog.type)
        dialog.dismiss()

    page.on("dialog", stay)
    load(page, photo)
    drag(page, (0.4, 0.4), (0.5, 0.5))
    with page.expect_event("dialog"):
        page.close(run_before_unload=True)
    assert kinds == ["beforeunload"]
    expect(page.locator("#share")).to_contain_text("Hole")


def test_no_hole_and_all_hole(page: Page, photo: Path) -> None:
    load(page, photo)
    press_fill, alert = page.get_by_role("button", name="Fill", exact=True), page.locator("#alert")
    press_fill.click()
    expect(alert).to_contain_text("There is no hole")
    page.get_by_role("button", name="Invert the hole").click()
    expect(alert).to_contain_text("The hole is the whole photo")
    expect(page.locator("#share")).to_have_text("Hole 100.0 %")
    page.get_by_role("button", name="Close this message").click()
    press_fill.click()
    expect(alert).to_contain_text("The hole is the whole photo")
    drag(page, (0.4, 0.4), (0.5, 0.5), button="right")
    expect(alert).to_be_hidden()


def test_ctrl_enter_fills_while_the_size_has_the_focus(page: Page, photo: Path) -> None:
    load(page, photo)
    drag(page, (0.4, 0.4), (0.5, 0.5))
    size = page.get_by_label("Size in pixels")
    size.press("Enter")
    expect(page.get_by_role("button", name="Fill", exact=True)).to_be_visible()
    size.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Filled by dpnet version 1")


def test_the_keyboard_alone(recorded_page: Page, recording: Recording, photo: Path) -> None:
    page = recorded_page
    with page.expect_file_chooser() as chooser:
        page.evaluate("0")  # until the browser has heard that a chooser is expected
        page.keyboard.press("o")
    chooser.value.set_files(photo)
    expect(page.get_by_role("status")).to_contain_text("is open")
    stage = page.get_by_role("application")
    for _ in range(12):
        if stage.evaluate("(stage) => stage === document.activeElement"):
            break
        page.keyboard.press("Tab")
    expect(stage).to_be_focused()
    for key in ("[", "[", "]"):
        page.keyboard.press(key)
    size = int(page.get_by_label("Size in pixels").input_value())

    def cursor() -> tuple[int, int]:
        x, y = page.locator("#place").inner_text().split(", ")
        return int(x), int(y)

    expected = np.zeros((200, 300), np.uint8)
    passed = [cursor()]
    page.keyboard.down(" ")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        passed.append(cursor())
    page.keyboard.up(" ")
    page.keyboard.press("ArrowUp")  # the brush is up
    page.keyboard.press("r")
    passed.append(cursor())
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    paint_box(expected, passed.pop(), cursor())
    page.keyboard.press("Enter")
    for start, end in pairwise(passed):
        paint_line(expected, start, end, size)
    expect(page.get_by_role("status")).to_have_text(re.compile("The hole is .* %|Cursor at"))
    # Escape leaves the cursor: then arrow keys move the photo.
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#place")).to_have_text("")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Filled by dpnet version 1")
    with Image.open(io.BytesIO(recording.forms[0]["mask"])) as mask:
        assert np.array_equal(np.asarray(mask.convert("L")), expected)
    page.keyboard.press("Tab")
    slider = page.get_by_role("slider", name="Share of the photo before the fill")
    expect(slider).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuenow", "52")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Fill", exact=True)).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Help and keys")).to_be_visible()
    page.get_by_label("Use keys without Ctrl").uncheck()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Zoom in").focus()
    page.keyboard.press("e")
    expect(page.get_by_role("radio", name="Eraser")).not_to_be_checked()
    page.get_by_role("application").focus()
    page.keyboard.press("e")
    expect(page.get_by_role("radio", name="Eraser")).to_be_checked()


def touch(client: Any, kind: str, *fingers: tuple[float, float]) -> None:
    """Touch the screen with fingers at these positions; `client` is a session of CDP."""
    points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(fingers)]
    client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_a_phone_paints_with_one_finger_and_zooms_with_two(new_page: Open, picture: Path) -> None:
    page = new_page(viewport=PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
    expect(page.get_by_text("Drop a photo here")).to_be_hidden()
    expect(page.get_by_text("Ctrl+V")).to_be_hidden()
    page.get_by_role("button", name="Help and keys").click()
    expect(page.locator("#help p:visible").first).to_contain_text("one finger paints")
    page.get_by_role("button", name="Close", exact=True).click()
    load(page, picture)
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("There is no hole")
    client = page.context.new_cdp_session(page)
    (x, y) = at(page, 0.4, 0.5)
    touch(client, "touchStart", (x, y))
    touch(client, "touchMove", (x + 40, y + 10))
    touch(client, "touchEnd")
    share = page.locator("#share").inner_text()
    assert share.startswith("Hole ")
    expect(page.get_by_role("alert")).to_be_hidden()
    zoom = page.locator("#zoom").inner_text()
    y += 60  # where nothing is painted
    touch(client, "touchStart", (x, y))
    touch(client, "touchStart", (x, y), (x + 40, y))
    touch(client, "touchMove", (x - 40, y), (x + 80, y))
    touch(client, "touchEnd")
    expect(page.locator("#zoom")).not_to_have_text(zoom)
    expect(page.locator("#share")).to_have_text(share)  # the first finger did not paint
    page.get_by_role("button", name="Show the whole photo").click()
    shoot(page, "phone")
    page.get_by_role("button", name="Model and mask").click()
    expect(page.get_by_label("Compare with")).to_be_visible()
    page.get_by_role("button", name="Model and mask").click()
    expect(page.get_by_label("Compare with")).to_be_hidden()
    fill(page)
    for state in ("result", "paint"):
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        small = page.locator("button:visible").evaluate_all(
            """(all) => all.filter((one) => {
              const box = one.getBoundingClientRect();
              return box.height < 36 || box.width < 36 || box.right > innerWidth;
            }).map((one) => one.id)"""
        )
        assert small == [], state
        if state == "result":
            page.get_by_role("button", name="Change the hole").first.click()


LUMINANCE = """
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const isSolid = (colour) => colour.length < 4 || colour[3] > 0.7;
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = numbers(getComputedStyle(one).backgroundColor);
      if (isSolid(colour)) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (one, other) => {
    const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
"""
UNREADABLE = (
    "([readable, seen]) => {"
    + LUMINANCE
    + """
  const bad = [];
  for (const one of document.querySelectorAll("body *")) {
    if (!one.checkVisibility() || one.matches(":disabled, .unseen, svg *")) continue;
    const style = getComputedStyle(one);
    const text = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const name = one.id || one.textContent.trim().slice(0, 30);
    if (text && contrast(numbers(style.color), behind(one)) < readable) bad.push(`text ${name}`);
    if (one.tagName === "svg" && contrast(numbers(style.color), behind(one)) < seen) {
      bad.push(`icon ${name}`);
    }
    const border = numbers(style.borderTopColor);
    if (one.matches("button, select, input[type=text], input[type=number]") && isSolid(border) &&
        contrast(border, behind(one.parentElement)) < seen) bad.push(`border ${name}`);
  }
  return bad;
}"""
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_control_has_enough_contrast(
    new_page: Open, photo: Path, scheme: Any
) -> None:
    page = new_page(color_scheme=scheme, reduced_motion="reduce")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 100) == (scheme == "dark")
    limits = [READABLE, SEEN]
    assert page.evaluate(UNREADABLE, limits) == []
    load(page, photo)
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate(UNREADABLE, limits) == []
    page.keyboard.press("?")
    assert page.evaluate(UNREADABLE, limits) == []
    page.keyboard.press("Escape")
    drag(page, (0.4, 0.4), (0.5, 0.5))
    fill(page)
    assert page.evaluate(UNREADABLE, limits) == []


def test_a_screen_reader_finds_a_name_for_everything(page: Page, photo: Path) -> None:
    load(page, photo)
    for role in ("button", "radio", "combobox", "checkbox", "slider", "spinbutton"):
        for each in page.get_by_role(role).all():
            assert re.search(rf'{role} ".+"', each.aria_snapshot()), each.evaluate("e => e.id")
    expect(page.get_by_role("application")).to_have_accessible_name(
        "Photo, 300 x 200 pixels. No hole yet."
    )
    drag(page, (0.4, 0.4), (0.5, 0.5))
    expect(page.get_by_role("application")).to_have_accessible_name(
        re.compile(r"The hole is .* of the photo")
    )
    expect(page.get_by_role("application")).to_have_accessible_description(
        re.compile("Space paints")
    )
    assert page.evaluate("Object.keys(localStorage).length") == 0
