"""Commands that use a model: inpaint, model describe, export."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from data_prep.core.errors import ConfigError
from data_prep.core.text import joined
from dpnet.cli.commands.roots import Outcome, root_to_read


def inpaint(args: Namespace) -> Outcome:
    """Fill the holes of image files."""
    from dpnet.inpainting.files import inpaint_files
    from dpnet.inpainting.tiles import TILE

    result = inpaint_files(
        args.image,
        args.mask,
        args.out,
        root=args.root or None,
        model=args.model,
        tile=TILE if args.tile is None else args.tile,
    )
    done, failed = result["pictures"], result["failed"]
    if len(done) == 1 and not failed:
        size = f"{done[0]['width']} x {done[0]['height']}"
        how = f"filled with {result['model']}" if done[0]["filled"] else "unchanged"
        return result, joined([f"{done[0]['out']}: {size}, {how} in {done[0]['seconds']} s"])
    filled = sum(image["filled"] for image in done)
    text = (
        f"{args.out}: {len(done)} of {len(done) + len(failed)} images written, {filled} of them"
        f" filled with {result['model']} in {result['seconds']} s"
    )
    return result, joined([text, *(f"failed: {each['error']}" for each in failed)])


def describe(args: Namespace) -> Outcome:
    """List the layers of a network."""
    from dpnet.pipeline.config import load_config

    sets = [o if o.startswith("model.") else f"model.{o}" for o in args.set]
    try:  # only the section `model` is used, so any config will do
        config = load_config("demo", [f"model.preset={args.preset}", *sets])
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("demo: ")) from None
    settings = config.model.model_dump()

    from dpnet.model.config import preset
    from dpnet.model.describe import describe, description_text

    try:
        found = describe(preset(settings.pop("preset"), **settings), args.size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {"ok": True, "preset": args.preset, **found}, description_text(found)


def export(args: Namespace) -> Outcome:
    """Write a model that runs without this package."""
    from dpnet.export.export import export_model

    formats = args.format or ["torch-export"]
    found = export_model(
        args.model,
        Path(args.out),
        formats,
        root=root_to_read(args),
        with_state=args.training_state,
    )
    lines = [f"{file}: {size:,} bytes" for file, size in found["files"].items()]
    checked = [
        f"{name} differs from the network by at most {worst:.1e}"
        for name, worst in found["differences"].items()
    ]
    return {"ok": True, **found}, joined([f"{found['model']} in {args.out}", *lines, *checked])
