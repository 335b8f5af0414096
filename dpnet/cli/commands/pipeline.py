"""Commands of the pipeline: demo, pipeline run, plan, train, evaluate, register, notify.

`dpnet masks build` is here too.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.network_disk import database_cache, local_top
from data_prep.core.paths import PREFECT
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from dpnet.cli.arguments.pipeline import TRAINED
from dpnet.cli.commands.roots import (
    Outcome,
    announced,
    check_root,
    use_password_of_up,
    use_server_of_up,
)
from dpnet.pipeline.chain import check_config, run_chain
from dpnet.pipeline.config import (
    CheckedConfig,
    Config,
    load_config,
    overrides_of,
    resolve_root,
)
from dpnet.pipeline.summary import as_text, next_text, registered_text, stages_text

_LONGEST_EVENT = 16 << 20  # bytes; a message of SQS has at most one MiB


def demo(args: Namespace) -> Outcome:
    """Run the whole pipeline, small, on sample photos or those of --photos."""
    from dpnet.pipeline.demo import claim_root, clear_root

    overrides = list(args.set)
    if args.photos is not None:
        # A JSON string is a YAML string, whatever characters the path has.
        overrides.append(f"images.source={json.dumps(str(Path(args.photos).absolute()))}")
    resolved = load_config("demo", overrides)
    check_config(resolved, root=args.root)
    root = open_store(resolve_root(args.root, resolved))
    if root.local_folder is None:
        raise ConfigError(
            f"the demo needs a local folder, but --root is {root.label}: use"
            f" `dpnet pipeline run demo --root {root.label}`."
        )
    store = LocalStore(root.local_folder)
    check_root(store)
    if args.fresh:
        clear_root(store)
    claim_root(store)
    again = _without_steps("demo", root=args.root, photos=args.photos, sets=args.set)
    return _run_flow(resolved, store, overrides, args, again, embedded=True)


def run(args: Namespace) -> Outcome:
    """Run all stages of a config in one flow run."""
    overrides = _with_launch(args)
    resolved = load_config(args.config, overrides)
    check_config(resolved, root=args.root)
    store = open_store(resolve_root(args.root, resolved))
    again = _without_steps("pipeline", "run", args.config, root=args.root, sets=overrides)
    return _run_flow(resolved, store, overrides, args, again, embedded=False)


def _run_flow(
    resolved: Config,
    store: Store,
    overrides: Sequence[str],
    args: Namespace,
    again: str,
    *,
    embedded: bool,
) -> Outcome:
    """Run the flow, and return its summary.

    Args:
        resolved: the config, loaded and checked.
        store: the root.
        overrides: OPTION=VALUE strings for the config.
        args: the arguments of the command.
        again: the command that repeats this run, for the summary.
        embedded: use a Prefect server inside this process, even if another is configured.
    """
    from flows.run_from_command import run_pipeline

    start = time.monotonic()
    check_root(store)
    top = local_top(store) or database_cache()
    use_password_of_up(store.label)
    # The flow runs the config that was checked here, even if its file changes now.
    checked = CheckedConfig(getattr(args, "config", "demo"), overrides, resolved)
    summary = run_pipeline(checked, store.label, top / PREFECT, embedded=embedded, debug=args.debug)
    # The flow's own time does not include the start of the server, for which people wait too.
    summary["seconds"] = round(time.monotonic() - start, 1)
    return {"ok": True, **summary}, as_text(summary, again)


def _without_steps(
    *words: str, root: str | None, photos: str | None = None, sets: Sequence[str]
) -> str:
    """Return the command that was typed, without train.steps: the summary adds more steps."""
    options = {"--root": root, "--photos": photos}
    typed = ["dpnet", *words]
    typed += [word for option, value in options.items() if value for word in (option, value)]
    typed += [word for each in sets if "train.steps" not in each for word in ("--set", each)]
    return shlex.join(typed)


def stage(args: Namespace) -> Outcome:
    """Run one stage of a config and the unfinished stages before it."""
    given = [*_with_launch(args), *_compared(getattr(args, "compare", []))]
    if args.stage == "masks":
        given = overrides_of("masks", given)
    config = load_config(args.config, given)
    if getattr(args, "address", None) and config.launch.launcher != "ray-job":
        where = "on this machine" if config.launch.launcher == "local" else "in pods of its own"
        raise ConfigError(
            f"--address names a Ray cluster, but training runs {where}: add --launcher ray-job."
        )
    pairs = getattr(args, "export_pairs", None)
    if pairs and args.compare:
        raise ConfigError(
            "--export-pairs writes the pairs and evaluates nothing: leave --compare out now, and"
            " give it to the next `dpnet evaluate`."
        )
    check_config(config, "images" if pairs else args.stage, args.root)
    store = open_store(resolve_root(args.root, config))
    check_root(store)
    if pairs:
        return _export_pairs(config, store, Path(pairs).expanduser())
    place = None
    if getattr(args, "ray", None):
        from dpnet.pipeline.ray_data import ray_data

        place = ray_data(args.ray)
    register = args.stage == "register"
    with announced(store, config.registry.model) if register else nullcontext():
        stages = [ref.to_json() for ref in run_chain(config, store, args.stage, place=place)]
    lines = [stages_text(stages), "", *_after(args, given, stages, store.label)]
    return {"ok": True, "root": store.uri, "stages": stages}, "\n".join(lines).rstrip()


_FOLLOWING = {"train": "evaluate", "evaluate": "register"}


def _after(
    args: Namespace, given: Sequence[str], stages: Sequence[Mapping[str, Any]], root: str
) -> list[str]:
    """Return lines about the result of the last stage, and the command to type next.

    Args:
        args: the arguments of the command.
        given: OPTION=VALUE strings for the config.
        stages: the stages that ran or were skipped, as JSON values.
        root: path or URI of the root.
    """
    if not stages or args.stage == "masks":
        return []
    last = stages[-1]
    if args.stage == "register":
        return registered_text(last["summary"], root)
    following = _FOLLOWING[args.stage]
    words = ["dpnet", following, args.config, *(["--root", args.root] if args.root else [])]
    words += [word for each in given for word in ("--set", each)]
    report = [f"report  {root}/{last['folder']}/report.html", ""]
    return [
        *(map(printable, report) if args.stage == "evaluate" else []),
        *next_text([(shlex.join(words), TRAINED[following])]),
    ]


def _export_pairs(config: Config, store: Store, folder: Path) -> Outcome:
    """Prepare images and masks if they are not finished, and write the pairs as files."""
    from dpnet.evaluation.export_pairs import export_pairs

    source, target = (os.path.realpath(each) for each in (config.images.source, folder))
    if Path(target).is_relative_to(source):
        raise ConfigError(
            f"{folder} is in the photo source {source}, and the pairs would become photos: choose a"
            " folder outside of it."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: name a new folder for the pairs.")
    (images,), (masks,) = run_chain(config, store, "images"), run_chain(config, store, "masks")
    count = export_pairs(config.evaluate, images, masks, store, folder)
    text = (
        f"{count:,} pairs in {folder}. Name each result like its pair, and compare with"
        f" `dpnet evaluate … --compare NAME=DIR`."
    )
    return {"ok": True, "pairs": count, "folder": str(folder)}, printable(text)


def _compared(given: Sequence[str]) -> list[str]:
    """Return the values of --compare as a value of --set, which replaces the config's."""
    named: dict[str, str] = {}
    for each in given:
        name, equals, place = each.partition("=")
        if not equals:
            raise ConfigError(f"--compare {each!r} has no name: write --compare NAME=DIR.")
        if name in named:
            raise ConfigError(
                f"--compare gives the name {name!r} twice: give each model a name of its own."
            )
        named[name] = place
    return [f"evaluate.compare={json.dumps(named)}"] if named else []


def _with_launch(args: Namespace) -> list[str]:
    """Return the values of --set, with --launcher and --address added as such values."""
    own = {"launcher": getattr(args, "launcher", None), "address": getattr(args, "address", None)}
    given = [f"launch.{name}={json.dumps(value)}" for name, value in own.items() if value]
    return [*args.set, *given]


def plan(args: Namespace) -> Outcome:
    """Say how much data, time and money a config takes. Nothing is written."""
    from dpnet.pipeline.plan_facts import Given, plan_config
    from dpnet.pipeline.plan_parts import Machines
    from dpnet.pipeline.plan_text import plan_text
    from dpnet.training.job import check_network, find_initial

    config = load_config(args.config, args.set)
    try:
        root = resolve_root(args.root, config)
    except ConfigError:  # a plan needs no root
        root = None
    machines = Machines(
        1, False, args.cores, args.storage_mb, args.efficiency, args.restart_seconds
    )
    given = Given(args.images, args.gpus, args.images_per_second)
    store = None if root is None else open_store(root)
    if store is not None:
        check_network(find_initial(config.train.init_from, store), config.model)
    found = plan_config(config, store, given, machines)
    label = None if store is None else store.label
    return {"ok": True, "root": label, **found.to_json()}, plan_text(found)


def notify(args: Namespace) -> Outcome:
    """Compare a config's source with its last version, and send Prefect an event."""
    from data_prep.raw.bucket_events import new_object_uris, uris_below

    config = load_config(args.config, args.set)
    source = config.images.source
    if args.event is not None and not uris_below(new_object_uris(_read_event(args.event)), source):
        reason = f"no object of the event is in {source}, so nothing is done."
        return {"ok": True, "announced": False, "reason": reason}, reason
    check_config(config, "images", args.root)
    root = resolve_root(args.root, config)
    store = open_store(root)
    check_root(store)
    use_server_of_up(root)
    from flows.run_from_command import watch_now

    seen = watch_now(
        config, store, args.min_new, args.quiet_minutes * 60, again=args.again, debug=args.debug
    )
    sent = "event sent to Prefect" if seen["announced"] else "no event sent"
    return {"ok": True, "root": store.uri, **seen}, f"{seen['dataset']}: {sent}. {seen['reason']}"


def _read_event(file: str) -> bytes:
    """Return the notification, which a device such as /dev/zero would never end."""
    try:
        if file == "-":
            data = sys.stdin.buffer.read(_LONGEST_EVENT + 1)
        else:
            with Path(file).expanduser().open("rb") as opened:
                data = opened.read(_LONGEST_EVENT + 1)
    except OSError as error:
        raise ConfigError(
            f"--event {file} cannot be read: {error.strerror}. Check the path."
        ) from None
    if len(data) > _LONGEST_EVENT:
        raise PipelineError(
            f"--event {file} has more than {_LONGEST_EVENT} bytes, so it is not a notification of a"
            " bucket. Check the path."
        )
    return data
