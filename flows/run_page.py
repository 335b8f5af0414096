"""The page of a flow run in the Prefect UI: the log, the progress, the plan and the results.

A thread sends the progress, so no stage waits for the Prefect server or fails with it. An update
that cannot be sent is sent again at the next interval. Progress is sent as artifacts, which the
page shows as bars, and as the event `dpnet.progress`. An automation reports a run as stuck when
this event does not come.
"""

from __future__ import annotations

import base64
import contextvars
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event

from data_prep.core import progress
from data_prep.core.errors import PipelineError
from data_prep.core.logs import start_logging
from data_prep.core.manifest import StageRef
from data_prep.core.progress import Moment
from data_prep.core.redact import redact
from data_prep.core.storage.store import Store
from data_prep.core.text import duration, markdown_code, markdown_text, printable
from data_prep.pictures.limits import STORED, PhotoError
from data_prep.pictures.open_image import opened
from dpnet.evaluation.report import STRIP_WORDS
from dpnet.pipeline.config import Config
from dpnet.pipeline.summary import as_markdown
from dpnet.training.job import TrainRequest
from dpnet.training.ray.launch import show_facts
from dpnet.training.stage import train
from flows.deployments import PROGRESS, TAG
from flows.flow_run import log_to_run, run_as_task
from flows.local_server.process_tree import survive_closed_output

SEND_EVERY_S = 2.0
EVENT_EVERY_S = 30.0
LAST_SEND_S = 5.0  # how long the end of the run waits for the last update
MAX_IMAGE_BYTES = 400_000  # of all result images together

_ADDRESS = re.compile(r"(https?://[\w.:/%-]+)")

log = logging.getLogger(__name__)


@dataclass
class _Bar:
    """The progress of one stage, and the last update of it that the server has."""

    moment: Moment
    task_run: UUID | None
    artifact: UUID | None = None
    sent: Moment | None = None


@dataclass
class _Training:
    """The sentences about where training runs, and those that the server has."""

    facts: list[str] = field(default_factory=list)
    task_run: UUID | None = None
    artifact: UUID | None = None
    sent: list[str] = field(default_factory=list)


class RunPage:
    """The page of the current flow run, kept up to date inside a `with` block."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        context = FlowRunContext.get()
        self._flow_run = context.flow_run.id if context and context.flow_run else None
        self._bars: dict[str, _Bar] = {}
        self._training = _Training()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._last_event = 0.0
        self._log = log_to_run()
        # The thread needs the settings of the flow run's context to find the server.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._send_until_ended,), daemon=True
        )

    def __enter__(self) -> RunPage:
        if "PREFECT__FLOW_RUN_ID" in os.environ:  # a worker started this process
            survive_closed_output()
            start_logging()
        progress.watchers.append(self._note_progress)
        self._before = show_facts.set(self.show_training)
        self._log.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        progress.watchers.remove(self._note_progress)
        show_facts.reset(self._before)
        self._log.__exit__(kind, value, traceback)
        self._ended.set()
        self._thread.join(LAST_SEND_S)

    def show_plan(self, images: StageRef | None = None, masks: StageRef | None = None) -> None:
        """Show the config, the root, and what the run takes, as far as it is known.

        Args:
            images: The image shards, if they are made.
            masks: The mask shards, if they are made. With both, finished steps do not count.
        """
        from dpnet.pipeline.plan_facts import plan_here
        from dpnet.pipeline.plan_text import plan_markdown

        lines = [f"**{markdown_text(self.config.name)}** in {markdown_code(self.store.label)}", ""]
        try:
            plan = plan_here(self.config, self.store, images, masks)
        except PipelineError as error:  # the stage itself fails with it, or nothing is wrong
            lines.append(markdown_text(f"There is no plan: {error}"))
        else:
            unknown = ["The plan follows when the images are prepared: their number is unknown."]
            lines += unknown if plan is None else plan_markdown(plan)
        _publish("\n".join(lines), "plan", "The plan of this run")

    def run_stage(self, title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
        """Run a stage as a Prefect task. Show the plan again before a training."""
        if stage is train:
            request: TrainRequest = arguments[0]
            self.show_plan(request.images, request.masks)
        return run_as_task(title, stage, *arguments)

    def show_training(self, facts: list[str]) -> None:
        """Show where training runs, and how its earlier attempts ended."""
        context = TaskRunContext.get()
        with self._lock:
            self._training.facts = facts
            self._training.task_run = context.task_run.id if context else None

    def show_results(self, refs: Sequence[StageRef]) -> None:
        """Show a table of the stages, the figures, the links and the result images."""
        summary = as_markdown(
            self.config.name,
            self.store,
            refs,
            self._measured_cost(refs),
            links(self.config, self.store, refs),
        )
        _publish(summary, "summary", printable(f"Run of {self.config.name} in {self.store.label}"))
        images = result_images(self.store, refs)
        if images:
            _publish(
                f"Left to right: {STRIP_WORDS}.\n\n" + "\n\n".join(images),
                "pictures",
                "Results on frozen pairs",
            )

    def _measured_cost(self, refs: Sequence[StageRef]) -> str:
        from dpnet.pipeline.cost import cost_text, measured

        for ref in refs:
            if ref.stage == "train":
                return cost_text(measured(self.store, ref.folder, self.config.cost))
        return ""

    def _note_progress(self, moment: Moment) -> None:
        with self._lock:
            if moment.title in self._bars:
                self._bars[moment.title].moment = moment
                return
            context = TaskRunContext.get()
            task_run = context.task_run.id if context else None
            self._bars[moment.title] = _Bar(moment, task_run)

    def _send_until_ended(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(SEND_EVERY_S)
            with self._lock:
                bars = [bar for bar in self._bars.values() if bar.sent != bar.moment]
            try:
                self._send(bars)
                self._send_training()
            except Exception:  # the server does not answer: try again at the next interval
                continue

    def _send(self, bars: Iterable[_Bar]) -> None:
        moved = False
        for bar in bars:
            moment = bar.moment
            percent = 100.0 * moment.count / max(moment.total, 1)
            with get_client(sync_client=True) as client:
                if bar.artifact is None:
                    new = ArtifactCreate(
                        key=moment.title.replace(" ", "-"),
                        type="progress",
                        description=progress_line(moment),
                        data=percent,
                        flow_run_id=self._flow_run,
                        task_run_id=bar.task_run,
                    )
                    bar.artifact = client.create_artifact(new).id
                else:
                    update = ArtifactUpdate(description=progress_line(moment), data=percent)
                    client.update_artifact(bar.artifact, update)
            moved = moved or bar.sent is None or bar.sent.count != moment.count
            bar.sent = moment
        if moved and self._flow_run and time.monotonic() - self._last_event >= EVENT_EVERY_S:
            self._last_event = time.monotonic()
            tag = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
            run = {"prefect.resource.id": f"prefect.flow-run.{self._flow_run}"}
            emit_event(PROGRESS, run, related=[tag])

    def _send_training(self) -> None:
        with self._lock:
            training, facts = self._training, self._training.facts
        if facts == training.sent:
            return
        text = training_text(facts)
        with get_client(sync_client=True) as client:
            if training.artifact is None:
                new = ArtifactCreate(
                    key="training",
                    type="markdown",
                    description="Where training runs",
                    data=text,
                    flow_run_id=self._flow_run,
                    task_run_id=training.task_run,
                )
                training.artifact = client.create_artifact(new).id
            else:
                client.update_artifact(training.artifact, ArtifactUpdate(data=text))
        training.sent = facts


def training_text(facts: Sequence[str]) -> str:
    """Return the sentences about a training as Markdown, with links for its addresses."""
    return "\n".join(f"* {_with_links(printable(redact(fact)))}" for fact in facts)


def _with_links(text: str) -> str:
    parts = _ADDRESS.split(text)  # every second one is an address
    shown = [markdown_text(part) for part in parts]
    shown[1::2] = (f"[{markdown_text(part)}]({part})" for part in parts[1::2])
    return "".join(shown)


def progress_line(moment: Moment) -> str:
    """Return the progress of a stage in one line, with its speed and the time left if known."""
    text = f"{moment.title}: {moment.count} of {moment.total} {moment.unit}"
    if moment.per_second:
        text += f", {moment.per_second:.1f}/s"
    if moment.seconds_left is not None and moment.count < moment.total:
        text += f", {duration(moment.seconds_left)} left"
    return printable(redact(f"{text}, {moment.note}" if moment.note else text))


def _publish(text: str, key: str, description: str) -> None:
    """Create a markdown artifact. If the server does not accept it, warn and continue."""
    try:
        shown = printable(redact(text), newlines=True)
        create_markdown_artifact(shown, key=key, description=printable(redact(description)))
    except Exception as error:
        log.warning("the Prefect server did not accept the %s: %s", key, type(error).__name__)


def links(config: Config, store: Store, refs: Sequence[StageRef]) -> dict[str, str]:
    """Return links to the report, the page that fills photos, MLflow and Ray, those that exist."""
    from dpnet.registry.stage import tracking_uri
    from dpnet.tracking.mlflow_runs import run_page
    from dpnet.training.ray.jobs_client import cluster_address

    found = {}
    by_stage = {ref.stage: ref for ref in refs}
    if evaluation := by_stage.get("evaluate"):
        page = f"{evaluation.folder}/report.html"
        reports_url = os.environ.get("DPNET_REPORTS_URL")
        found["report"] = f"{reports_url}/{page}" if reports_url else f"{store.label}/{page}"
    if "register" in by_stage and (serve_url := os.environ.get("DPNET_SERVE_URL")):
        found["try it"] = serve_url
    if training := by_stage.get("train"):
        try:
            if run := run_page(tracking_uri(config.registry, store), store, training):
                found["MLflow run"] = run
        except Exception:  # MLflow does not answer: no link
            pass
        if config.launch.launcher == "ray-job":
            found["Ray dashboard"] = cluster_address(config.launch)
    return {name: redact(link) for name, link in found.items()}


def result_images(store: Store, refs: Sequence[StageRef]) -> list[str]:
    """Return the first images of the report as markdown with the bytes inside.

    The Prefect UI cannot read files of the root, so the page must hold the images.
    """
    from PIL import Image

    found, bytes_left = [], MAX_IMAGE_BYTES
    for ref in refs:
        if ref.stage != "evaluate":
            continue
        for entry in store.list(f"{ref.folder}/pictures"):
            try:
                with opened(store.read(entry.key), STORED) as image:
                    strip = image.convert("RGBA")
            except PhotoError as error:
                log.warning("%s cannot be shown: %s", printable(entry.key), error)
                continue
            flat = Image.new("RGB", strip.size, "white")
            flat.paste(strip, mask=strip.getchannel("A"))
            file = io.BytesIO()
            flat.save(file, "JPEG", quality=85)
            bytes_left -= file.tell()
            if bytes_left < 0:
                break
            name = markdown_text(entry.key.rpartition("/")[2].removesuffix(".png"))
            data = base64.b64encode(file.getvalue()).decode()
            found.append(f"![{name}](data:image/jpeg;base64,{data})")
    return found
