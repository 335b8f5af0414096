"""What each command does: its result as JSON values, and the same as text for people."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError, StorageError, storage_error
from data_prep.core.paths import DEMO_ROOT, cache_folder
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.pipeline.chain import check_config, run_chain, with_photographs
from dpnet.pipeline.config import (
    CheckedConfig,
    Config,
    config_of_source,
    is_config,
    load_config,
    resolve_root,
)
from dpnet.pipeline.summary import as_text, stages_text

Outcome = tuple[dict[str, Any], str]


def demo(args: Namespace) -> Outcome:
    from dpnet.pipeline.demo import claim_root, clear_root

    overrides = list(args.set)
    if args.photos is not None:
        # A JSON string is a YAML string, whatever characters the path has.
        overrides.append(f"images.source={json.dumps(str(Path(args.photos).absolute()))}")
    resolved = load_config("demo", overrides)
    check_config(resolved)
    root = open_store(resolve_root(args.root, resolved))
    if root.local_folder is None:
        raise PipelineError(
            f"the demo needs a local folder, not {root.label}: use"
            f" `dpnet pipeline run demo --root {root.label}`."
        )
    store = LocalStore(root.local_folder)
    check_root(store)
    if args.fresh:
        clear_root(store)
    claim_root(store)
    again = _typed("demo", root=args.root, photos=args.photos, sets=args.set)
    return _run_flow(resolved, store, overrides, args, again, embedded=True)


def pipeline_run(args: Namespace) -> Outcome:
    overrides = _with_launch(args)
    resolved = load_config(args.config, overrides)
    check_config(resolved)
    store = open_store(resolve_root(args.root, resolved))
    again = _typed("pipeline", "run", args.config, root=args.root, sets=overrides)
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
    from dpnet.pipeline.demo import PREFECT_HOME
    from flows.run_from_command import run_pipeline

    start = time.monotonic()
    check_root(store)
    top = store.local_folder or cache_folder()
    # The flow runs the config that was checked here, even if its file changes now.
    checked = CheckedConfig(getattr(args, "config", "demo"), overrides, resolved)
    summary = run_pipeline(
        checked, store.label, top / PREFECT_HOME, embedded=embedded, debug=args.debug
    )
    # The flow's own time leaves out the server's start, which its user waits for too.
    summary["seconds"] = round(time.monotonic() - start, 1)
    return {"ok": True, **summary}, as_text(summary, again)


def _typed(*words: str, root: str | None, photos: str | None = None, sets: Sequence[str]) -> str:
    """The command as it was typed, to be typed again with more steps."""
    options = {"--root": root, "--photos": photos}
    typed = ["dpnet", *words]
    typed += [word for option, value in options.items() if value for word in (option, value)]
    typed += [word for each in sets if "train.steps" not in each for word in ("--set", each)]
    return shlex.join(typed)


def stage(args: Namespace) -> Outcome:
    config = load_config(args.config, _with_launch(args))
    if getattr(args, "address", None) and config.launch.launcher == "local":
        raise ConfigError(
            "--address names a Ray cluster, but training runs on this machine: add"
            " --launcher ray-job."
        )
    check_config(config, args.stage)
    store = open_store(resolve_root(args.root, config))
    check_root(store)
    stages = [ref.to_json() for ref in run_chain(config, store, args.stage)]
    return {"ok": True, "root": store.uri, "stages": stages}, stages_text(stages)


def _with_launch(args: Namespace) -> list[str]:
    """The options of --set, and those that have names of their own."""
    own = {"launcher": getattr(args, "launcher", None), "address": getattr(args, "address", None)}
    given = [f"launch.{name}={json.dumps(value)}" for name, value in own.items() if value]
    return [*args.set, *given]


def images_build(args: Namespace) -> Outcome:
    from data_prep.core.pool import Map, run_tasks
    from data_prep.images.stage import prepare_images

    given = {"name": args.name and json.dumps(args.name), "size": args.size}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None] + args.set
    # Here `mode=keep` means images.mode; the masks' size, which must be the same, is not at issue.
    overrides = [o if "." in o.partition("=")[0] else f"images.{o}" for o in overrides]
    overrides += [f"masks.{o[7:]}" for o in overrides if o.startswith("images.size=")]
    if is_config(args.source):
        config = load_config(args.source, overrides)
    else:
        config = config_of_source(args.source, overrides)
    check_config(config, "images")
    store = open_store(resolve_root(args.root, config))
    check_root(store)
    run: Map = run_tasks
    if args.ray:
        from dpnet.pipeline.ray_map import ray_map

        run = ray_map(args.ray)
    ref = prepare_images(
        with_photographs(config, store).images,
        store,
        run,
        retry_failed=args.retry_failed,
        repack=args.repack,
    )
    s = ref.summary
    splits = ", ".join(f"{split} {figures['samples']}" for split, figures in s["splits"].items())
    text = (
        f"{ref.name} version {s['version']}, {'there already' if ref.skipped else 'made now'}:"
        f" {store.label}/{ref.folder}\n"
        f"{s['listed']} files: {s['photographs']} photographs, {s['failed']} failed, {s['ignored']}"
        f" ignored, {s['duplicates']} duplicates, {s['near_duplicates']} nearly the same in two"
        f" splits; samples: {splits}"
    )
    return {"ok": True, "root": store.uri, **ref.to_json()}, text


def verify(args: Namespace) -> Outcome:
    from data_prep.shards.check_set import Depth
    from dpnet.pipeline.verify import verify_uri

    found = verify_uri(args.uri, _root_to_read(args), Depth(args.sample, args.index_only))
    lines = [*found.notes, *(f"{p.where}: {p.problem}" for p in found.problems)]
    number = len(found.problems)
    wrong = f"{number} problem{'s'[: number > 1]}" if number else "all as they were made"
    lines.append(f"{found.covered()}: {wrong}")
    return found.to_json(), "\n".join(lines)


def notify(args: Namespace) -> Outcome:
    from data_prep.raw.bucket_events import below, notified

    config = load_config(args.config, args.set)
    source = config.images.source
    if args.event is not None and not below(notified(_event_text(args.event)), source):
        reason = f"the event is of no object in {source}, so nothing is done."
        return {"ok": True, "announced": False, "reason": reason}, reason
    check_config(config, "images")
    root = resolve_root(args.root, config)
    store = open_store(root)
    check_root(store)
    _find_server(root)
    from flows.run_from_command import watch_now

    seen = watch_now(
        config, store, args.min_new, args.quiet_minutes * 60, again=args.again, debug=args.debug
    )
    told = "told Prefect" if seen["announced"] else "nothing to tell"
    return {"ok": True, "root": store.uri, **seen}, f"{seen['dataset']}: {told}. {seen['reason']}"


def _event_text(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise PipelineError(f"--event {file} cannot be read: {error.strerror}.") from None


def images_inspect(args: Namespace) -> Outcome:
    from data_prep.inspection.inspect import (
        find_set,
        image_sheet,
        images_text,
        inspect_images,
        save_sheet,
    )

    store, folder = find_set("images", args.uri, _root_to_read(args))
    found = inspect_images(store, folder)
    if args.out:
        save_sheet(lambda: image_sheet(store, folder), Path(args.out))
    return {"ok": True, "root": store.uri, "sheet": args.out, **found}, images_text(found)


def masks_inspect(args: Namespace) -> Outcome:
    from data_prep.inspection.contact_sheet import mask_sheet
    from data_prep.inspection.inspect import find_set, inspect_masks, masks_text, save_sheet

    store, folder = find_set("masks", args.uri, _root_to_read(args))
    found = inspect_masks(store, folder)
    if args.out:
        save_sheet(lambda: mask_sheet(store, folder), Path(args.out))
    return {"ok": True, "root": store.uri, "sheet": args.out, **found}, masks_text(found)


def images_log(args: Namespace) -> Outcome:
    from data_prep.inspection.inspect import log_images, log_text

    store = open_store(_root_to_read(args))
    found = log_images(store, args.name)
    result = {"ok": True, "root": store.uri, "name": args.name, "versions": found}
    return result, log_text(found)


def inpaint(args: Namespace) -> Outcome:
    from dpnet.inpainting.files import inpaint_files
    from dpnet.inpainting.tiles import TILE

    result = inpaint_files(
        args.image,
        args.mask,
        args.out,
        root=_root_to_read(args),
        model=args.model,
        tile=TILE if args.tile is None else args.tile,
    )
    done, failed = result["pictures"], result["failed"]
    if len(done) == 1 and not failed:
        size = f"{done[0]['width']} x {done[0]['height']}"
        how = f"filled with {result['model']}" if done[0]["filled"] else "as it was"
        return result, f"{done[0]['out']}: {size}, {how} in {done[0]['seconds']} s"
    filled = sum(picture["filled"] for picture in done)
    text = (
        f"{args.out}: {len(done)} of {len(done) + len(failed)} pictures, {filled} of them filled"
        f" with {result['model']} in {result['seconds']} s"
    )
    return result, "\n".join([text, *(f"failed: {each['error']}" for each in failed)])


def model_describe(args: Namespace) -> Outcome:
    sets = [o if o.startswith("model.") else f"model.{o}" for o in args.set]
    try:  # any config will do: all but its model is left out
        config = load_config("demo", [f"model.preset={args.preset}", *sets])
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("demo: ")) from None
    settings = config.model.model_dump()

    from dpnet.model.config import preset
    from dpnet.model.describe import describe, description_text

    try:
        found = describe(preset(settings.pop("preset"), **settings), args.size)
    except ValueError as error:
        raise PipelineError(str(error)) from error
    return {"ok": True, "preset": args.preset, **found}, description_text(found)


def export(args: Namespace) -> Outcome:
    from dpnet.export.export import export_model

    formats = args.format or ["torch-export"]
    found = export_model(args.model, Path(args.out), formats, root=_root_to_read(args))
    lines = [f"{place}: {size:,} bytes" for place, size in found["files"].items()]
    checked = [
        f"{name} differs from the network by {worst:.1e} at most"
        for name, worst in found["differences"].items()
    ]
    return {"ok": True, **found}, "\n".join([f"{found['model']} in {args.out}", *lines, *checked])


def deploy(args: Namespace) -> Outcome:
    from dpnet.pipeline.config import load_settings

    _find_server(_root_to_read(args))
    from flows.deploy import deploy as put
    from flows.deployments import DeploySettings

    file = Path(args.file).expanduser() if args.file else None
    lines = put(load_settings(DeploySettings, file, args.set), dry_run=args.dry_run)
    if not lines:
        text = "nothing to do: everything is deployed as it should be"
    else:
        text = "\n".join(["would change:", *lines] if args.dry_run else lines)
    return {"ok": True, "dry_run": args.dry_run, "changes": lines}, text


def _find_server(root: str) -> None:
    """Make Prefect talk to the server that `dpnet up` has started for `root`, unless another is
    configured. To be called before Prefect is imported."""
    from flows.local_server.up import running

    if "PREFECT_API_URL" not in os.environ and (up := running(root)):
        os.environ["PREFECT_API_URL"] = up.api_url


def up(args: Namespace) -> Outcome:
    from flows.local_server.children import DATABASE, Place, check_secrets
    from flows.local_server.up import Running, home_of
    from flows.local_server.up import up as run_up

    if args.database:
        os.environ[DATABASE] = args.database  # where no list of processes shows it
    store = open_store(_root_to_read(args))
    check_secrets(Place(store.label, home_of(store), os.environ))
    check_root(store)

    def announce(running: Running) -> None:
        shown = {"ok": True, "attached": False, **running.to_json()}
        text = f"{_up_text(running.to_json())}\n\nCtrl-C stops all of it."
        print(json.dumps(shown) if args.json else text, flush=True)

    running = run_up(store, args.port, args.ray, announce)
    text = f"{_up_text(running.to_json())}\n\nIt is up already: process {running.pid}."
    return {"ok": True, "attached": True, **running.to_json()}, text


def _up_text(running: dict[str, Any]) -> str:
    rows = {"Prefect": "ui_url", "MLflow": "mlflow_url", "Ray": "ray_url"}
    rows |= {"metrics": "metrics_url", "root": "root"}
    lines = [f"{name:<9}{running[key]}" for name, key in rows.items() if running[key]]
    export = f"export PREFECT_API_URL={running['api_url']}"
    return "\n".join([*lines, "", "In other shells:", f"  {export}"])


def check_root(store: Store) -> None:
    """Raise StorageError unless an object can be written: better known before hours of work."""
    probe = f".probe-{secrets.token_hex(4)}"
    try:
        store.write(probe, b"")
        store.delete(probe)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # as under /proc
            raise StorageError(
                f"the root {store.label} cannot be created: choose another --root."
            ) from error
        if isinstance(error.__cause__, OSError):
            raise storage_error(error.__cause__, f"the root {store.label}") from error
        raise


def _root_to_read(args: Namespace) -> str:
    return str(args.root or os.environ.get("DPNET_ROOT") or DEMO_ROOT)
