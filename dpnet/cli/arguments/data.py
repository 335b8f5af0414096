"""Options of the commands for stored data: images, masks, verify, gc."""

from __future__ import annotations

from dpnet.cli.arguments.options import (
    Parsers,
    add_command,
    add_group,
    add_ray,
    add_root,
    add_set,
    days,
    share,
)
from dpnet.cli.arguments.pipeline import add_stage


def add_images(parsers: Parsers) -> None:
    """Add `dpnet images` with build, verify, inspect and log."""
    example = "dpnet images build demo --root ./dpnet-demo"
    group = add_group(parsers, "images", "build, verify, inspect and list images", example)
    _add_build(group)
    _add_verify_and_inspect(group, "images")
    _add_log(group)


def add_masks(parsers: Parsers) -> None:
    """Add `dpnet masks` with build, verify and inspect."""
    example = "dpnet masks build demo --root ./dpnet-demo"
    group = add_group(parsers, "masks", "build, verify and inspect masks", example)
    add_stage(group, "build", "masks", "prepare the masks of a config", example)
    _add_verify_and_inspect(group, "masks")


def add_verify(parsers: Parsers) -> None:
    """Add `dpnet verify`."""
    what = "check the hash of every file under a root, and that each stage fits its inputs"
    _add_verify(parsers, "", what, "dpnet verify dpnet-demo --json")


def _add_build(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "build",
        "data.images_build",
        "prepare the photos of a source or a config",
        "dpnet images build s3://bucket/photos --name mine --size 256 --root /data/dpnet",
        "If the source was prepared before, only new and changed photos are read.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, zip, tar, Parquet file, list (csv, txt, jsonl) or s3:// prefix of photos;"
        " or a config (packaged, or a YAML file) that names one",
    )
    parser.add_argument(
        "--name", help="name of the dataset (default: the source's name, or the config's)"
    )
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of a stored sample (default: the config's)"
    )
    add_root(parser, "folder or s3:// URI where everything is stored", "the config's root")
    parser.add_argument(
        "--retry-failed", action="store_true", help="also retry the photos that failed before"
    )
    parser.add_argument(
        "--repack",
        action="store_true",
        help="write all shards again instead of adding to the last version",
    )
    add_ray(parser, "use", "cores")
    add_set(parser, "mode=keep or layout=places2", "`images`")


def _add_log(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "log",
        "data.images_log",
        "list the versions of a dataset and what each one added, removed and changed",
        "dpnet images log places2 --root /data/dpnet",
    )
    parser.add_argument("name", metavar="NAME", help="name of the dataset, as in images/NAME")
    add_root(parser, "where the dataset is stored")


def add_gc(parsers: Parsers) -> None:
    """Add `dpnet gc`."""
    parser = add_command(
        parsers,
        "gc",
        "data.gc",
        "say what can be deleted from a root, and delete it",
        "dpnet gc dpnet-demo\n  dpnet gc dpnet-demo --delete",
        "What a registered version, the history of champions, a finished run or the newest version"
        " of a dataset was made from is always kept, and so are unknown files. Without --delete"
        " nothing is changed.",
    )
    parser.add_argument("uri", metavar="ROOT", nargs="?", help="the root, a folder or an s3:// URI")
    add_root(parser, "the same")
    parser.add_argument("--delete", action="store_true", help="delete the garbage")
    parser.add_argument(
        "--older-than",
        type=days,
        default=7.0,
        metavar="DAYS",
        help="age from which an unfinished stage is garbage (default: 7)",
    )


def _add_verify_and_inspect(parsers: Parsers, kind: str) -> None:
    folder = f"dpnet-demo/{kind}/demo/0123456789ab"
    what = f"check every hash of prepared {kind}"
    _add_verify(parsers, kind, what, f"dpnet {kind} verify demo --root dpnet-demo --json")
    parser = add_command(
        parsers,
        "inspect",
        f"data.{kind}_inspect",
        f"show what a version of prepared {kind} contains",
        f"dpnet {kind} inspect {folder} -o sheet.png",
    )
    parser.add_argument(
        "uri",
        metavar="URI|NAME",
        help="folder of a version, or a name; a name means its newest version",
    )
    add_root(parser, "where the name is searched")
    parser.add_argument("-o", "--out", metavar="PNG", help="also write a contact sheet")


def _add_verify(parsers: Parsers, kind: str, what: str, example: str) -> None:
    """Add the command `verify`; with a `kind`, images or masks, it also knows their names."""
    parser = add_command(
        parsers,
        "verify",
        "data.verify",
        what,
        example,
        "The exit status is 1 if a file is missing or altered.",
    )
    parser.set_defaults(kind=kind)
    if kind:
        places = "folder of a version, or a name; a name means its newest version"
        parser.add_argument("uri", metavar="URI|NAME", help=places)
        add_root(parser, "where the name is searched")
    else:
        places = "a root, a folder in it (everything in it is checked), or models:/NAME@ALIAS"
        parser.add_argument("uri", metavar="URI", help=places)
        add_root(parser, "where models:/… is searched")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--sample",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="read only this share of the shards of images and masks, for example 0.01; always the"
        " same ones. Of the other shards check only presence and size (default: 1)",
    )
    depth.add_argument(
        "--index-only",
        action="store_true",
        help="read no shard of images and masks, only manifests, indexes, tables and lists",
    )
