"""Run the tasks of an evaluation on a Ray cluster, with Ray Data.

Each row of the dataset is a task. Actors hold the networks: one for each GPU, or one for some cores
where there is no GPU. A task goes to an actor as a whole, and its result comes back to this
process, which is the only one that writes. A dead actor is started again, and its task runs again.
"""

from __future__ import annotations

import logging
import pickle
import queue
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from data_prep.core.errors import PipelineError, portable
from data_prep.core.lease import check_leases
from data_prep.core.logs import start_logging
from data_prep.core.pool import CHECK_S, died_again
from dpnet.evaluation.workers import Place, Plan, RunTasks, Task, Tick
from dpnet.pipeline.ray_map import RETRIES, connected
from dpnet.training.ray.deaths import death_reason

R = TypeVar("R")

log = logging.getLogger(__name__)

CORES = 4  # of an actor without a GPU, if its machine has them: networks are in memory once for all
END_S = 60.0  # how long to wait for the end of a dataset; a busy cluster starts a worker first
_NAMESPACE = "dpnet"  # in Ray's key-value store
_AGAIN = "run the same command again, it resumes."


def ray_data(address: str = "auto") -> Place:
    """Return a Ray cluster as a place.

    If this process is already connected to Ray, that connection is used. Paths must mean the same
    on all machines: use absolute paths on a shared disk, or object storage.

    Args:
        address: HOST:PORT of the cluster; "auto" for the cluster of this machine; "local" to start
            one on this machine for the duration of the work.
    """

    @contextmanager
    def opened(plan: Plan) -> Iterator[RunTasks]:
        with connected(address, 0):

            def run(tasks: Sequence[Task[R]], tick: Tick) -> Iterator[tuple[int, R]]:
                for number, result in _results(plan, tasks):
                    tick(tasks[number].size)
                    yield number, result

            yield run

    return opened


class _Actor:
    """A worker process that holds the networks and runs tasks."""

    def __init__(self, plan: Plan, tasks: Sequence[Task[Any]], threads: int, attempt: str) -> None:
        start_logging()  # to Ray's log of this worker
        self._plan, self._tasks, self._threads = plan, tasks, threads
        self._attempt = attempt
        self._bench: Any = None
        self._stack = ExitStack()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the task with the row's number, and return its result or its error as bytes."""
        number = row["number"]
        task = self._tasks[number]
        outcome: tuple[Any, BaseException | None]
        try:
            if _starts(f"{self._attempt}/{number}/") > 1 + RETRIES:
                raise died_again(task, 1 + RETRIES)
            if self._bench is None:  # not in the constructor, whose errors Ray wraps
                self._bench = self._stack.enter_context(self._plan.open(self._threads))
            outcome = (task.run(self._bench, lambda count: None), None)
        except Exception as error:
            outcome = (None, portable(error))
        return {"number": number, "outcome": pickle.dumps(outcome)}


def _starts(prefix: str) -> int:
    """Count this start of a task in Ray's key-value store. Return the number of its starts.

    Ray Data runs the task of a dead worker again without end.
    """
    from ray.experimental.internal_kv import _internal_kv_list, _internal_kv_put

    _internal_kv_put(f"{prefix}{secrets.token_hex(8)}", b"1", namespace=_NAMESPACE)
    return len(_internal_kv_list(prefix, namespace=_NAMESPACE))


def _forget_starts(attempt: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    with suppress(Exception):  # the cluster may be gone
        _internal_kv_del(f"{attempt}/", del_by_prefix=True, namespace=_NAMESPACE)


def _results(plan: Plan, tasks: Sequence[Task[R]]) -> Iterator[tuple[int, R]]:
    """Yield the number and the result of each task, as they come.

    A thread waits for Ray Data, so that this one can check the leases and end.
    """
    if not tasks:
        return
    attempt = f"evaluate-{secrets.token_hex(8)}"
    found: queue.Queue[Any] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: Any) -> None:
        waiting = True
        while waiting and not stop.is_set():
            try:
                found.put(item, timeout=CHECK_S)
                waiting = False
            except queue.Full:
                pass

    def read() -> None:
        try:
            for row in _dataset(plan, tasks, attempt).iter_rows():
                if stop.is_set():
                    return
                put(row)
            put(None)
        except BaseException as error:  # raised again in the other thread
            put(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while (item := _next(found)) is not None:
            if isinstance(item, BaseException):
                raise _told(item)
            result, error = pickle.loads(item["outcome"])
            if error is not None:
                raise error
            yield int(item["number"]), result
    finally:
        stop.set()
        _end_dataset(reader, attempt)
        _forget_starts(attempt)


def _end_dataset(reader: threading.Thread, attempt: str) -> None:
    """End the execution of a dataset that is still read, before Ray is shut down under it.

    Ray Data has no function for that. A reader that waits for a row cannot close its iterator.

    Args:
        reader: the thread that reads the dataset.
        attempt: the dataset's name.
    """

    def end() -> None:
        while reader.is_alive():
            for thread in threading.enumerate():
                if attempt in thread.name and (shutdown := getattr(thread, "shutdown", None)):
                    with suppress(Exception):  # the cluster may be gone
                        shutdown(force=True)
            reader.join(CHECK_S)

    if reader.is_alive():
        ender = threading.Thread(target=end, daemon=True)
        ender.start()
        ender.join(END_S)  # without a cluster it can wait without end


def _next(found: queue.Queue[Any]) -> Any:
    """Wait for the next item. Raises LeaseLostError if a lease is lost meanwhile."""
    while True:
        check_leases()
        try:
            return found.get(timeout=CHECK_S)
        except queue.Empty:
            continue


def _dataset(plan: Plan, tasks: Sequence[Task[Any]], attempt: str) -> Any:
    """Return the dataset of the results. Reading it starts the actors."""
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = RETRIES
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here too
    cpus, gpus, most = team(ray.nodes())
    most = min(most, len(tasks))
    numbers = ray.data.from_items(
        [{"number": number} for number in range(len(tasks))], override_num_blocks=len(tasks)
    )
    results = numbers.map(
        _Actor,
        fn_constructor_args=(plan, tasks, cpus, attempt),
        # One task at a time each, so that no actor has tasks in store while another is idle.
        compute=ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=1
        ),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    results.set_name(attempt)
    return results


def team(nodes: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Return the cores and the GPUs of an actor, and the number of actors that a cluster has.

    Where a machine has GPUs, only machines with GPUs measure: values of a GPU differ from those of
    a CPU in their rounding.

    Args:
        nodes: what `ray.nodes` returns.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpu = [each for each in alive if each.get("GPU", 0) >= 1 and each.get("CPU", 0) >= 1]
    if with_gpu:
        cpus = min(max(1, int(each["CPU"] // each["GPU"])) for each in with_gpu)
        places = (min(each["GPU"], each["CPU"] // cpus) for each in with_gpu)
        return cpus, 1, max(1, sum(map(int, places)))
    sizes = [int(each["CPU"]) for each in alive if each.get("CPU", 0) >= 1]
    cpus = min(CORES, *sizes) if sizes else 1
    return cpus, 0, max(1, sum(size // cpus for size in sizes))


def _told(error: BaseException) -> BaseException:
    """Return an error of Ray in our words, with Ray's own as its cause; another one as it is."""
    from ray.exceptions import RayError

    reason = death_reason(error)
    if isinstance(error, PipelineError) or (reason is None and not isinstance(error, RayError)):
        return error
    reason = reason or str(error).strip().split("\n")[0].rstrip(".")
    told = PipelineError(f"the cluster stopped the evaluation ({reason}): {_AGAIN}")
    told.__cause__ = error
    return told
