"""Commands for prepared data: images build, log and inspect, masks inspect, verify, gc."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from data_prep.core.errors import ConfigError
from data_prep.core.storage.open import open_store
from data_prep.core.text import joined
from dpnet.cli.commands.roots import Outcome, check_root, root_to_read


def images_build(args: Namespace) -> Outcome:
    """Prepare the photos of a source or a config as a new version of a dataset."""
    from data_prep.core.pool import Map, run_tasks
    from data_prep.images.stage import prepare_images
    from dpnet.pipeline.chain import check_config, with_photographs
    from dpnet.pipeline.config import (
        config_of_source,
        is_config,
        load_config,
        overrides_of,
        resolve_root,
    )

    given = {"name": args.name and json.dumps(args.name), "size": args.size}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    overrides = overrides_of("images", [*overrides, *args.set])
    if is_config(args.source):
        config = load_config(args.source, overrides)
    else:
        config = config_of_source(args.source, overrides)
    check_config(config, "images", args.root)
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
    lines = (
        f"{ref.name} version {s['version']}, {'already there' if ref.skipped else 'new'}:"
        f" {store.label}/{ref.folder}",
        f"{s['listed']} files: {s['photographs']} photos, {s['failed']} failed, {s['ignored']}"
        f" ignored, {s['duplicates']} duplicates, {s['near_duplicates']} almost the same in two"
        f" splits; samples: {splits}",
    )
    return {"ok": True, "root": store.uri, **ref.to_json()}, joined(lines)


def images_log(args: Namespace) -> Outcome:
    """List the versions of a dataset."""
    from data_prep.inspection.inspect import log_images
    from data_prep.inspection.text import log_text

    store = open_store(root_to_read(args))
    found = log_images(store, args.name)
    result = {"ok": True, "root": store.uri, "name": args.name, "versions": found}
    return result, log_text(found)


def images_inspect(args: Namespace) -> Outcome:
    """Show what a version of a dataset contains."""
    from data_prep.inspection.contact_sheet import image_sheet, save_sheet
    from data_prep.inspection.find_set import find_set
    from data_prep.inspection.inspect import inspect_images
    from data_prep.inspection.text import images_text

    store, folder = find_set("images", args.uri, root_to_read(args))
    found = inspect_images(store, folder)
    if args.out:
        save_sheet(lambda: image_sheet(store, folder), Path(args.out))
    return {"ok": True, "root": store.uri, "sheet": args.out, **found}, images_text(found)


def masks_inspect(args: Namespace) -> Outcome:
    """Show what a version of masks contains."""
    from data_prep.inspection.contact_sheet import mask_sheet, save_sheet
    from data_prep.inspection.find_set import find_set
    from data_prep.inspection.inspect import inspect_masks
    from data_prep.inspection.text import masks_text

    store, folder = find_set("masks", args.uri, root_to_read(args))
    found = inspect_masks(store, folder)
    if args.out:
        save_sheet(lambda: mask_sheet(store, folder), Path(args.out))
    return {"ok": True, "root": store.uri, "sheet": args.out, **found}, masks_text(found)


def verify(args: Namespace) -> Outcome:
    """Check the files of a root, of a stage or of a registered model."""
    from data_prep.inspection.find_set import find_named_set
    from data_prep.shards.check_set import Depth
    from dpnet.pipeline.verify import verify as verify_store
    from dpnet.pipeline.verify import verify_uri

    root, depth = root_to_read(args), Depth(args.sample, args.index_only)
    named = find_named_set(args.kind, args.uri, root) if args.kind else None
    found = verify_store(*named, depth) if named else verify_uri(args.uri, root, depth)
    return found.to_json(), found.as_text()


def gc(args: Namespace) -> Outcome:
    """Say what can be deleted from a root, and delete it."""
    from dpnet.pipeline.collect_garbage import collect_garbage

    if args.uri and args.root:
        raise ConfigError(
            f"the root is given twice, as {args.uri!r} and as --root {args.root!r}: give it once."
        )
    root = args.uri or root_to_read(args)
    found = collect_garbage(open_store(root), args.older_than, delete=args.delete)
    return found.to_json(), found.as_text()
