"""What the page of a flow run shows: progress while it goes on, and what came of it.

Progress is sent by a thread, so that no stage waits for the Prefect server or fails with it: what
cannot be sent now is sent at the next beat. It goes out as artifacts, which move on the page, and
as events `dpnet.progress`, whose absence tells that a run is stuck.
"""

from __future__ import annotations

import base64
import contextvars
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event
from prefect.logging import get_logger, get_run_logger
from prefect.states import Completed

from data_prep.core import progress
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.progress import Moment, say
from data_prep.core.storage.store import Store
from dpnet.pipeline.config import Config
from dpnet.pipeline.summary import as_markdown, holds
from flows.deployments import PROGRESS, TAG
from flows.local_server.process_tree import outlive_reader

BEAT_S = 2.0  # between two looks at what there is to send
EVENT_S = 30.0  # between two events of progress
LAST_S = 5.0  # for which the last of it is waited for
PICTURE_BYTES = 400_000  # of all pictures together
NAME = 100  # characters of a run's name


def run_name() -> str:
    """What a run does: its config and what was changed in the form."""
    parameters = runtime.flow_run.parameters
    given = [str(parameters.get("config", ""))]
    for name, value in parameters.items():
        if hasattr(value, "model_dump"):
            value = value.model_dump(exclude_none=True)
        if isinstance(value, dict) and name != "event":
            given += [f"{name}.{option}={each}" for option, each in value.items() if each != ""]
    given += [str(each) for each in parameters.get("overrides") or []]
    if parameters.get("root"):
        given.append(f"in {parameters['root']}")
    name = ", ".join(given)
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def tell_errors_in_a_sentence() -> None:
    """In this process, a flow run's: of our errors, which say what to do, the run's log has the
    words, once. Prefect alone would log each three times with its traceback."""
    for name in ("task_runs", "flow_runs"):
        get_logger(name).addFilter(_in_a_sentence)


_said: list[BaseException] = []


def _in_a_sentence(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, PipelineError):
        return True
    if error in _said:
        return False
    _said.append(error)
    record.exc_info, record.msg, record.args = None, "%s", (str(error),)
    return True


def as_task(title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
    """Run a stage as a task of its own, which says on the page whether there was anything to do."""

    done: list[StageRef] = []  # of a task that returns a state, Prefect gives the state alone

    @task(name=title, cache_policy=NO_CACHE, persist_result=False)
    def run() -> State[None]:
        ref = stage(*arguments)
        done.append(ref)
        what = f"{holds(ref.stage, ref.summary)} in {ref.folder}"
        if ref.skipped:
            return Completed(name="Skipped", message=f"Done before: {what}.")
        return Completed(message=f"{what[0].upper()}{what[1:]}.")

    run()
    return done[-1]


def is_left_running() -> bool:
    """Whether a job on a cluster goes on when the process of this flow run is stopped: unless the
    run is cancelled, a retry attaches to it. A run without a deployment belongs to a command."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(context.flow_run.id).state
    except Exception:  # no server to ask: a restart of all, not a wish to cancel
        return True
    return state is None or not (state.is_cancelling() or state.is_cancelled())


@dataclass
class _Bar:
    """One stage's progress, and what the page has of it."""

    moment: Moment
    task_run: UUID | None
    artifact: UUID | None = None
    sent: Moment | None = None


class Story:
    """Tells how a flow run goes while in the `with` block."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        context = FlowRunContext.get()
        self._flow_run = context.flow_run.id if context and context.flow_run else None
        self._bars: dict[str, _Bar] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._event_at = 0.0
        self._log = get_run_logger().info
        # The thread needs the settings of the flow run's context to find the server.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._work,), daemon=True
        )

    def __enter__(self) -> Story:
        if "PREFECT__FLOW_RUN_ID" in os.environ:  # a worker's
            outlive_reader()
        progress.watchers.append(self._watch)
        progress.listeners.append(self._log)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        progress.watchers.remove(self._watch)
        progress.listeners.remove(self._log)
        self._ended.set()
        self._thread.join(LAST_S)

    def announce(self) -> None:
        """What is about to be done, and what it will cost as far as that is known."""
        from dpnet.pipeline.cost import cost_text, estimated

        cost = estimated(self.config, self.store)
        lines = [f"**{self.config.name}** in `{self.store.label}`", ""]
        if cost is None:
            lines.append("Cost of training: not known before a first run of such a model here.")
        else:
            lines.append(f"Cost of training, by the speed of earlier runs: {cost_text(cost)}.")
        _markdown("\n".join(lines), "plan", "What this run is going to do")

    def conclude(self, refs: Sequence[StageRef]) -> None:
        """What came of it: a table of the stages, figures, links and pictures."""
        _markdown(
            as_markdown(
                self.config.name,
                self.store,
                refs,
                self._cost(refs),
                links(self.config, self.store, refs),
            ),
            "summary",
            f"Run of {self.config.name} in {self.store.label}",
        )
        strips = list(pictures(self.store, refs))
        if strips:
            _markdown(
                "Left to right: truth, what is known, DPNet, smooth fill, Telea, mean fill.\n\n"
                + "\n\n".join(strips),
                "pictures",
                "Results on frozen pairs",
            )

    def _cost(self, refs: Sequence[StageRef]) -> str:
        from dpnet.pipeline.cost import cost_text, measured

        for ref in refs:
            if ref.stage == "train":
                return cost_text(measured(self.store, ref.folder, self.config.cost))
        return ""

    def _watch(self, moment: Moment) -> None:
        with self._lock:
            if moment.title in self._bars:
                self._bars[moment.title].moment = moment
                return
            context = TaskRunContext.get()
            task_run = context.task_run.id if context else None
            self._bars[moment.title] = _Bar(moment, task_run)

    def _work(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(BEAT_S)
            with self._lock:
                bars = [bar for bar in self._bars.values() if bar.sent != bar.moment]
            try:
                self._send(bars)
            except Exception:  # the server is away: at the next beat
                continue

    def _send(self, bars: Iterable[_Bar]) -> None:
        moved = False
        for bar in bars:
            moment = bar.moment
            share = 100.0 * moment.count / max(moment.total, 1)
            with get_client(sync_client=True) as client:
                if bar.artifact is None:
                    new = ArtifactCreate(
                        key=moment.title.replace(" ", "-"),
                        type="progress",
                        description=_told(moment),
                        data=share,
                        flow_run_id=self._flow_run,
                        task_run_id=bar.task_run,
                    )
                    bar.artifact = client.create_artifact(new).id
                else:
                    update = ArtifactUpdate(description=_told(moment), data=share)
                    client.update_artifact(bar.artifact, update)
            moved = moved or bar.sent is None or bar.sent.count != moment.count
            bar.sent = moment
        if moved and self._flow_run and time.monotonic() - self._event_at >= EVENT_S:
            self._event_at = time.monotonic()
            tag = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
            run = {"prefect.resource.id": f"prefect.flow-run.{self._flow_run}"}
            emit_event(PROGRESS, run, related=[tag])


def _told(moment: Moment) -> str:
    """How it goes, in a line."""
    text = f"{moment.title}: {moment.count} of {moment.total} {moment.unit}"
    if moment.per_second:
        text += f", {moment.per_second:.1f}/s"
    if moment.seconds_left is not None and moment.count < moment.total:
        text += f", {progress.duration(moment.seconds_left)} left"
    return f"{text}, {moment.note}" if moment.note else text


def _markdown(text: str, key: str, description: str) -> None:
    """An artifact on the run's page; a server that is away costs the artifact, not the run."""
    try:
        create_markdown_artifact(text, key=key, description=description)
    except Exception as error:
        say(f"warning: the Prefect server does not take the {key} ({type(error).__name__})")


def links(config: Config, store: Store, refs: Sequence[StageRef]) -> dict[str, str]:
    """Where to look on: the report, the MLflow run and the Ray dashboard, as far as there are."""
    from dpnet.registry.stage import tracking_uri
    from dpnet.tracking.mlflow_runs import run_page
    from dpnet.training.ray.launch_job import cluster

    found = {}
    by_stage = {ref.stage: ref for ref in refs}
    if evaluation := by_stage.get("evaluate"):
        page = f"{evaluation.folder}/report.html"
        served = os.environ.get("DPNET_REPORTS_URL")
        found["report"] = f"{served}/{page}" if served else f"{store.uri}/{page}"
    if training := by_stage.get("train"):
        try:
            if run := run_page(tracking_uri(config.registry, store), store, training):
                found["MLflow run"] = run
        except Exception:  # MLflow is away: no link
            pass
        if config.launch.launcher == "ray-job":
            found["Ray dashboard"] = cluster(config.launch)
    return found


def pictures(store: Store, refs: Sequence[StageRef]) -> list[str]:
    """The report's first pictures as markdown images that hold their bytes: the UI has no way to
    the root's files."""
    from PIL import Image

    found, left = [], PICTURE_BYTES
    for ref in refs:
        if ref.stage != "evaluate":
            continue
        for entry in store.list(f"{ref.folder}/pictures"):
            with Image.open(io.BytesIO(store.read(entry.key))) as picture:
                strip = picture.convert("RGBA")
                flat = Image.new("RGB", strip.size, "white")
                flat.paste(strip, mask=strip.getchannel("A"))
            file = io.BytesIO()
            flat.save(file, "JPEG", quality=85)
            left -= file.tell()
            if left < 0:
                break
            name = entry.key.rpartition("/")[2].removesuffix(".png")
            data = base64.b64encode(file.getvalue()).decode()
            found.append(f"![{name}](data:image/jpeg;base64,{data})")
    return found
