"""Work in processes of its own, each killed with SIGKILL before a chosen write."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# New processes are forked from one that has these, which saves seconds for each.
PRELOADED = [
    "dpnet.cli.commands.pipeline",
    "dpnet.evaluation.report",
    "dpnet.inpainting.tiles",
    "dpnet.registry.mlflow_versions",
    "mlflow.tracking",
]
MLFLOW = (
    "create_experiment",
    "create_registered_model",
    "create_run",
    "log_batch",
    "set_tag",
    "set_terminated",
    "create_model_version",
    "set_registered_model_alias",
    "set_registered_model_tag",
)


def run(work: Callable[..., int], arguments: Sequence[Any], root: Path, kill_at: int = 0) -> int:
    """Run `work` in a new process. Return its exit status, -9 if it was killed.

    Args:
        work: a function at the top of a module. It returns the exit status.
        arguments: of `work`.
        root: only writes below this folder count.
        kill_at: number of the write that is not made any more, from 1; 0: none.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it starts threads, which a fork loses
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(work, tuple(arguments), root, kill_at))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def moments(root: Path) -> list[str]:
    """Return the writes of the last process that was run on a root, such as "champion.json"."""
    return _book(root).read_text().splitlines()


def _book(root: Path) -> Path:
    return root.with_name(f"{root.name}.moments")


def _child(work: Callable[..., int], arguments: Sequence[Any], root: Path, kill_at: int) -> None:
    book = _book(root)
    book.write_text("")
    output = os.open(root.with_name(f"{root.name}.output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)

    def before(what: str) -> None:
        with book.open("a") as file:
            file.write(f"{what}\n")
        if len(moments(root)) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(source: Any, target: Any, **options: Any) -> Any:
            path = Path(target)
            if path.is_relative_to(root) and not path.name.startswith((".", "lease")):
                before(str(path.relative_to(root)))
            return real(source, target, **options)

        return act

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*given: Any, **options: Any) -> Any:
            before(f"MLflow: {name}")
            return real(*given, **options)

        return act

    from mlflow.tracking import MlflowClient

    for name in MLFLOW:
        setattr(MlflowClient, name, noted(name, getattr(MlflowClient, name)))
    os.replace, os.link = watched(os.replace), watched(os.link)  # the last act of each write
    status = work(*arguments)
    sys.stdout.flush()
    os._exit(status)
