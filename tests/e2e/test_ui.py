"""The Prefect UI in a real browser: start a run, watch it, break it, repair it and resume it.

With DPNET_SCREENSHOTS=DIR the tests run the demo instead of a tiny config, and write the
screenshots of docs/ui.md to that folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from platforms import Platform, environment, platform

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Locator, Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists(CHROMIUM), reason="no chromium: install Debian's package of that name"
    ),
]

SHOTS = os.environ.get("DPNET_SCREENSHOTS")
STEPS, MORE_STEPS = (40, 60) if SHOTS else (8, 12)
SECOND = 1000.0  # Playwright counts milliseconds
LONG = 300 * SECOND  # enough for a training on a busy machine
NEW_YEAR = "0 0 1 1 *"
OF_PIPELINE = {"deployments": {"name": {"any_": ["dpnet-pipeline"]}}}  # no scheduled runs
CONFIG = """
name: tiny
images: {{source: {photos}, name: tiny, size: 32, val: 0.2, test: 0.3, workers: 1}}
masks: {{name: tiny, size: 32, recipes: {{box-random: 1.0}}, train: 30, eval_per_bin: 2,
  workers: 1}}
model: {{preset: tiny}}
losses: {{adversarial: 0.01}}
train: {{steps: 20, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 2, adversarial_from: 4,
  checkpoint_every: 4, validate_every: 4, ema_decay: 0.9, workers: 1}}
evaluate: {{max_pairs: 12}}
register: {{promote: always}}
"""
STAGES = ["prepare images", "prepare masks", "train", "evaluate", "register"]


def stages(up: Platform, run_url: str, attempt: int) -> dict[str, str]:
    """Return the last state of each stage in one attempt of a flow run."""
    about = {"flow_runs": {"id": {"any_": [run_url.rpartition("/")[2]]}}}
    found = {}
    for task in up.ask("/task_runs/filter", about):
        if task["flow_run_run_count"] == attempt:
            found[task["name"].rpartition("-")[0]] = task["state"]["name"]
    return {stage: found[stage] for stage in STAGES if stage in found}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Run `dpnet up` and deploy to it."""
    folder = tmp_path_factory.mktemp("ui")
    root = Path("/tmp/dpnet") if SHOTS else folder / "root"  # a short name for the screenshots
    if SHOTS:
        shutil.rmtree(root, ignore_errors=True)
    file = folder / "deploy.yaml"
    # The schedules create runs, but none of them is due during the test.
    tiny = f"config: {config(folder)}\nwatch: {NEW_YEAR}\nretrain: {NEW_YEAR}\n"
    file.write_text("config: demo\n" if SHOTS else tiny)
    deploy = [sys.executable, "-m", "dpnet", "deploy", str(file), "--root", str(root)]
    with platform(root) as found:
        subprocess.run(deploy, env=environment(), check=True)
        yield found


def config(folder: Path) -> Path:
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(photos / f"{number}.png")
    file = folder / "tiny.yaml"
    file.write_text(CONFIG.format(photos=photos))
    return file


@pytest.fixture(scope="module")
def page(up: Platform) -> Iterator[Page]:
    """A page of a browser that is logged in to everything."""
    user, _, password = up.password.partition(":")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page(
            viewport={"width": 1400, "height": 1200},
            http_credentials={"username": user, "password": password},
        )
        page.set_default_timeout(60 * SECOND)
        expect.set_options(timeout=60 * SECOND)
        page.goto(up.login_url)
        page.wait_for_url("**/dashboard*")
        # Prefect's page forgets the password if it is left while it checks it.
        expect(page.get_by_role("link", name="Flows").first).to_be_visible()
        yield page
        browser.close()


def shoot(page: Page, name: str) -> None:
    """Write a screenshot for the documentation, if the user requests it."""
    if SHOTS:
        expect(page.locator(".p-toast")).to_have_count(0)
        with Image.open(io.BytesIO(page.screenshot())) as image:
            palette = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        palette.save(Path(SHOTS, f"{name}.png"), optimize=True)


def open_form(page: Page, up: Platform) -> None:
    page.goto(f"{up.running.ui_url}/deployments")
    deployment = page.locator("a[href*='/deployments/deployment/']", has_text="dpnet-pipeline")
    expect(page.get_by_text("watch-raw-data").first).to_be_visible()
    shoot(page, "deployments")
    deployment.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()


def field(page: Page, name: str) -> Locator:
    label = page.get_by_text(f"{name} (Optional)", exact=True)
    return page.locator(".schema-form-property").filter(has=label).last.locator("input")


def start(page: Page, up: Platform, steps: int) -> str:
    """Fill in and send the form. Return the address of the run's page, which is open now."""
    open_form(page, up)
    field(page, "steps").fill(str(steps))
    shoot(page, "form")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**tab=Runs*")
    newest = {"sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    (run,) = up.ask("/flow_runs/filter", newest | OF_PIPELINE)
    # The page reloads the list only from time to time.
    page.locator(f"a[href*='/flow-run/{run['id']}']").first.click(timeout=LONG)
    page.wait_for_url("**/flow-run/*")
    return page.url.partition("?")[0]


def tab(page: Page, name: str) -> None:
    page.locator(".p-tab", has_text=name).click()


def expect_state(page: Page, state: str) -> None:
    badge = page.locator(".state-badge").first
    expect(badge).to_have_text(re.compile(f"{state}|Failed|Crashed|Completed"), timeout=LONG)
    expect(badge).to_have_text(state)


@pytest.fixture(scope="module")
def completed(page: Page, up: Platform) -> str:
    """Start a run in the form, watch it until it completes, and return its address."""
    url = start(page, up, STEPS)
    expect_state(page, "Running")
    tab(page, "Artifacts")
    progress = page.get_by_text(re.compile(rf"train: \d+ of {STEPS} steps"))
    progress.wait_for(timeout=LONG)
    before = progress.inner_text()
    if SHOTS:
        page.get_by_text(re.compile(r"train: [1-9]\d of .* left")).wait_for(timeout=LONG)
        shoot(page, "running")
    expect_state(page, "Completed")
    expect(progress).to_contain_text(f"train: {STEPS} of {STEPS} steps")
    assert not before.startswith(f"train: {STEPS} of"), "the progress did not change"
    return url


def artifact(page: Page, run: str, key: str) -> None:
    """Open one artifact of a run."""
    page.goto(run)
    link = page.locator("a[href*='/artifacts/artifact/']", has_text=key)
    for _ in range(12):
        tab(page, "Artifacts")
        with contextlib.suppress(sync_api.TimeoutError):
            link.wait_for(timeout=5 * SECOND)
            break  # else the page has gone back to its first tab when it had loaded the run
    link.click()
    page.wait_for_url("**/artifacts/artifact/*")


def widths(page: Page) -> list[int]:
    """Return the width of each image on the page; 0 for an image that cannot be rendered."""
    page.locator("img").first.wait_for()
    return page.locator("img").evaluate_all(
        "all => Promise.all(all.map(e => e.decode().then(() => e.naturalWidth, () => 0)))"
    )


def test_a_value_out_of_range_is_refused_before_anything_starts(page: Page, up: Platform) -> None:
    open_form(page, up)
    field(page, "steps").fill("0")
    page.get_by_role("button", name="Submit").click()
    error = page.get_by_text("Validation failed for field 'train.steps'").first
    expect(error).to_contain_text("0 is less than the minimum of 1")
    assert up.ask("/flow_runs/filter", OF_PIPELINE) == []


def test_the_name_of_a_run_has_the_changed_options_and_every_stage_completes(
    page: Page, up: Platform, completed: str
) -> None:
    page.goto(completed)
    heading = page.get_by_text(re.compile(rf"(tiny\.yaml|demo), train\.steps={STEPS}$")).first
    expect(heading).to_be_visible()
    assert stages(up, completed, 1) == dict.fromkeys(STAGES, "Completed")


def test_the_summary_has_digests_and_figures(page: Page, up: Platform, completed: str) -> None:
    artifact(page, completed, "summary")
    expect(page.get_by_text("hole PSNR, dB, by hole")).to_be_visible()
    for manifest in up.root.glob("*/*/*/manifest.json"):
        digest = json.loads(manifest.read_text())["content_digest"][:12]
        expect(page.get_by_text(digest)).to_be_visible()
    expect(page.get_by_text("dpnet version 1, champion")).to_be_visible()
    shoot(page, "summary")


def test_the_result_images_are_rendered(page: Page, completed: str) -> None:
    artifact(page, completed, "pictures")
    found = widths(page)
    shoot(page, "pictures")
    assert len(found) >= 6
    assert min(found) > 0


def test_the_link_to_the_report_opens_the_report(page: Page, completed: str) -> None:
    artifact(page, completed, "summary")
    page.goto(page.get_by_role("link", name="/report.html").get_attribute("href") or "")
    expect(page.get_by_text("Telea").first).to_be_visible()
    assert min(widths(page)) > 0


def test_the_link_to_mlflow_opens_the_run_of_the_training(
    page: Page, up: Platform, completed: str
) -> None:
    artifact(page, completed, "summary")
    link = page.get_by_role("link", name=up.running.mlflow_url).get_attribute("href") or ""
    (training,) = (up.root / "runs").iterdir()
    page.goto(link)
    expect(page.get_by_text(training.name).first).to_be_visible()
    expect(page.get_by_text("hole_psnr").first).to_be_visible()


def test_a_failed_stage_is_explained_in_a_sentence_and_retry_runs_only_unfinished_stages(
    page: Page, up: Platform, completed: str
) -> None:
    folder, aside = up.root / "evaluations", up.root / "aside"
    folder.rename(aside)
    folder.write_text("in the way")  # the stage needs a folder of this name
    run = start(page, up, MORE_STEPS)
    expect_state(page, "Failed")
    assert stages(up, run, 1) == {
        "prepare images": "Skipped",
        "prepare masks": "Skipped",
        "train": "Completed",
        "evaluate": "Failed",
    }
    expect(page.locator(".logs, main").first).not_to_contain_text("Traceback")
    # The line of the stage. The line of the task begins with the same sentence.
    sentence = page.get_by_text(re.compile(f"^cannot use {folder}.*: ")).first
    expect(sentence).to_be_visible()
    sentence.scroll_into_view_if_needed()
    shoot(page, "failed")

    folder.unlink()
    aside.rename(folder)
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    expect_state(page, "Completed")
    assert stages(up, run, 2) == {
        "prepare images": "Skipped",
        "prepare masks": "Skipped",
        "train": "Skipped",
        "evaluate": "Completed",
        "register": "Completed",
    }
    page.goto(run)
    tab(page, "Task Runs")
    expect(page.get_by_text("Skipped").first).to_be_visible()
    shoot(page, "retried")
    artifact(page, run, "summary")
    expect(page.get_by_role("row", name="train").first).to_contain_text("skipped")
