"""The arguments of the command `dpnet`. Standard library only, so that `--help` answers at once.

`args.command` names the function of `dpnet/cli/commands.py` that carries the command out.
"""

from __future__ import annotations

import argparse
from typing import Any

from data_prep.core.paths import DEMO_ROOT

_DESCRIPTION = (
    "From raw photographs to a registered DPNet inpainting model, resumable at any point."
)
_EPILOG = """\
first steps:
  dpnet demo                                    everything, small, in ./dpnet-demo
  dpnet inpaint photo.png mask.png -o out.png   fill what is white in the mask
  dpnet COMMAND --help                          options and an example of each command

exit status: 0 done, 1 failed (one sentence says why), 2 wrong usage, 130 stopped
"""
_STAGES = {
    "train": "train a model",
    "evaluate": "evaluate the trained model beside its peers",
    "register": "register the evaluated model",
}
_Parsers = Any  # argparse names the type of subparsers with an underscore


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpnet",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(top)
    _add_pipeline(top)
    for kind in ("images", "masks"):
        _add_shards(top, kind)
    for stage, what in _STAGES.items():
        _add_stage(top, stage, stage, what)
    _add_notify(top)
    _add_verify(top, "walk the chain of digests and check every file's hash", "dpnet-demo")
    _add_inpaint(top)
    _add_model(top)
    _add_export(top)
    _add_deploy(top)
    _add_up(top)
    return parser


def _add(
    parsers: _Parsers, name: str, command: str, what: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    parser: argparse.ArgumentParser = parsers.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.\n{more}".strip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, the last line"
    )
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks and the logs of the parts"
    )
    parser.set_defaults(command=command)
    return parser


def _add_group(parsers: _Parsers, name: str, what: str, example: str) -> _Parsers:
    group = parsers.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return group.add_subparsers(metavar="COMMAND", required=True)


def _add_pipeline(parsers: _Parsers) -> None:
    example = "dpnet pipeline run places2 --root /data/dpnet --set images.source=/data/places2"
    group = _add_group(parsers, "pipeline", "the whole pipeline as one Prefect flow run", example)
    parser = _add(group, "run", "pipeline_run", "run every stage that is not done yet", example)
    _add_config(parser)
    _add_launch(parser)


def _add_deploy(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "deploy",
        "deploy",
        "create or update everything on the Prefect server: deployments, schedules, alerts",
        "dpnet deploy deploy.yaml --set parameters.images.source=/data/photos",
        "What is there already is left alone. The server is PREFECT_API_URL's, else that of\n"
        "`dpnet up`. With DPNET_ALERT_URL (an Apprise URL: a webhook, Slack, mailto://) alerts go\n"
        "there.",
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="YAML file of what to deploy (default: the demo)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    parser.add_argument(
        "--root", help=f"whose `dpnet up` to use (default: DPNET_ROOT, else {DEMO_ROOT})"
    )
    _add_set(parser)


def _add_demo(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "demo",
        "demo",
        "run the whole pipeline, small, on sample photographs",
        "dpnet demo --photos ~/Pictures --root /tmp/mine",
        "Run again, it skips what is done and goes on with what was stopped.",
    )
    parser.add_argument(
        "--root", help=f"where everything is stored (default: DPNET_ROOT, else {DEMO_ROOT})"
    )
    parser.add_argument("--photos", metavar="DIR", help="use these photographs instead")
    parser.add_argument(
        "--fresh", action="store_true", help="start over: remove first what a demo left there"
    )
    _add_set(parser)


def _add_shards(parsers: _Parsers, kind: str) -> None:
    example = f"dpnet {kind} build demo --root ./dpnet-demo"
    log = "list, " if kind == "images" else ""
    group = _add_group(parsers, kind, f"build, {log}verify and inspect {kind}", example)
    if kind == "images":
        _add_images_build(group)
    else:
        _add_stage(group, "build", kind, f"prepare the {kind} of a config", f"{kind} build")
    folder = f"dpnet-demo/{kind}/demo/0123456789ab"
    _add_verify(group, f"check every hash of prepared {kind}", folder, f"{kind} verify")
    _add_inspect(group, kind, folder)
    if kind == "images":
        _add_images_log(group)


def _add_inspect(parsers: _Parsers, kind: str, folder: str) -> None:
    parser = _add(
        parsers,
        "inspect",
        f"{kind}_inspect",
        f"show what a version of prepared {kind} holds",
        f"dpnet {kind} inspect {folder} -o sheet.png",
    )
    parser.add_argument(
        "uri", metavar="URI|NAME", help="a version's folder, or a name: then its newest version"
    )
    parser.add_argument(
        "--root", help=f"where the name is looked up (default: DPNET_ROOT, else {DEMO_ROOT})"
    )
    parser.add_argument("-o", "--out", metavar="PNG", help="also write a contact sheet")


def _add_images_log(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "log",
        "images_log",
        "list the versions of a dataset and what each added, removed and changed",
        "dpnet images log places2 --root /data/dpnet",
    )
    parser.add_argument("name", metavar="NAME", help="the dataset, as in images/NAME")
    parser.add_argument(
        "--root", help=f"where it is stored (default: DPNET_ROOT, else {DEMO_ROOT})"
    )


def _add_images_build(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "build",
        "images_build",
        "prepare the photographs of a source or a config",
        "dpnet images build s3://bucket/photos --name mine --size 256 --root /data/dpnet",
        "A source that was prepared before is compared: only what is new or has changed is read.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, zip, tar, Parquet file, list (csv, txt, jsonl) or s3:// prefix of"
        " photographs; or a config (packaged, or a YAML file) that names one",
    )
    parser.add_argument(
        "--name", help="name of the dataset (default: the source's, or the config's)"
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of a stored sample")
    parser.add_argument(
        "--root", help="where everything is stored (default: DPNET_ROOT, else the config's)"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="also try again what could not be used before"
    )
    parser.add_argument(
        "--repack", action="store_true", help="make all shards anew instead of adding to a version"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="work on this Ray cluster (auto, local or HOST:PORT) instead of this machine's cores",
    )
    _add_set(
        parser, "change an option of `images`, as mode=keep or layout=places2; may be repeated"
    )


def _add_stage(parsers: _Parsers, name: str, stage: str, what: str, command: str = "") -> None:
    parser = _add(
        parsers,
        name,
        "stage",
        what,
        f"dpnet {command or name} demo --root ./dpnet-demo",
        "What it needs of earlier stages is run first where it is not done yet.",
    )
    parser.set_defaults(stage=stage)
    _add_config(parser)
    if stage in _STAGES:
        _add_launch(parser)


def _add_notify(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "notify",
        "notify",
        "look at a config's source and tell Prefect if it has changed",
        "dpnet notify places2 --root s3://bucket/dpnet --event notification.json",
        "What one run of watch-raw-data does, for the notifications of a bucket or a cron of yours."
        "\nThe event goes to the Prefect API of PREFECT_API_URL; nothing is prepared or trained.",
    )
    _add_config(parser)
    parser.add_argument(
        "--event",
        metavar="FILE|-",
        help="a notification of S3 (JSON); one that is not of the config's source does nothing",
    )
    parser.add_argument(
        "--min-new",
        type=_count,
        default=1,
        metavar="N",
        help="how many images must be new or changed (default: 1)",
    )
    parser.add_argument(
        "--quiet-minutes",
        type=_minutes,
        default=0.0,
        metavar="N",
        help="how long the source must have stood still, as earlier looks found it (default: 0)",
    )
    parser.add_argument("--again", action="store_true", help="also tell of what was told of before")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images: give one as 100")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes: give one as 10")
    return minutes


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a packaged config (demo, places2, …) or a YAML file"
    )
    parser.add_argument(
        "--root", help="where everything is stored (default: DPNET_ROOT, else the config's)"
    )
    _add_set(parser)


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher",
        choices=["local", "ray-job"],
        help="where training runs: Ray on this machine, or a job on a Ray cluster, which goes on"
        " when this command is killed and is found again by it (default: the config's, else local)",
    )
    parser.add_argument(
        "--address", metavar="URL", help="the cluster's dashboard, as http://head:8265"
    )


def _add_set(
    parser: argparse.ArgumentParser,
    what: str = "change an option of the config, as train.steps=100; may be repeated",
) -> None:
    parser.add_argument(
        "--set",
        metavar="OPTION=VALUE",
        action="append",
        default=[],
        help=what,
    )


def _add_verify(parsers: _Parsers, what: str, example: str, command: str = "verify") -> None:
    parser = _add(
        parsers,
        "verify",
        "verify",
        what,
        f"dpnet {command} {example} --json",
        "Exit status 1 if anything is missing or altered.",
    )
    parser.add_argument("uri", metavar="URI", help="a root, a stage's folder or models:/NAME@ALIAS")
    parser.add_argument(
        "--root", help=f"where models:/… is looked up (default: DPNET_ROOT, else {DEMO_ROOT})"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--sample",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="read only this share of the shards of images and masks, as 0.01; the same ones every"
        " time, and of the others look at presence and size alone",
    )
    depth.add_argument(
        "--index-only",
        action="store_true",
        help="read no shard of images and masks, only manifests, indexes, tables and lists",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give one as 0.01, at most 1")
    return share


def _add_inpaint(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "inpaint",
        "inpaint",
        "fill the holes of photographs of any size",
        "dpnet inpaint photo.png mask.png -o filled.png --root ./dpnet-demo\n"
        "  dpnet inpaint photos/ masks/ -o filled/ --model models:/dpnet/2",
        "What is black in the mask stays as it is, to the bit. Of several photographs, photo.jpg"
        " takes the mask\nphoto.png or else photo_mask.png (digits may follow), and is written to"
        " OUT/photo.png. Files that\nare there already are written over, but never one that is"
        " read.",
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="a photograph, a folder of them, or a quoted glob as 'photos/*.jpg'",
    )
    parser.add_argument(
        "mask",
        metavar="MASK",
        help="a picture of its size, white where to fill; or a folder or quoted glob of such",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        required=True,
        help="file to write; of several photographs the folder",
    )
    parser.add_argument(
        "--root", help=f"where models are looked up (default: DPNET_ROOT, else {DEMO_ROOT})"
    )
    parser.add_argument(
        "--model",
        default="",
        help="a run's folder or an exported one, models:/NAME@champion or models:/NAME/VERSION"
        " (default: the root's champion)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="side of the squares that a larger photograph is worked on in (default: 512); larger"
        " ones see further and take more memory",
    )


def _add_model(parsers: _Parsers) -> None:
    example = "dpnet model describe --preset base"
    group = _add_group(parsers, "model", "what the network consists of", example)
    parser = _add(
        group,
        "describe",
        "model_describe",
        "list a network's layers, shapes, products (MACs) and parameters",
        f"{example} --set attention=single",
        "Nothing is computed or read but the shapes.",
    )
    parser.add_argument("--preset", default="base", help="tiny, base (the default) or large")
    parser.add_argument(
        "--size", type=int, default=256, metavar="PIXELS", help="side of the image (default: 256)"
    )
    _add_set(parser, "change an option of `model`, as normalization=region; may be repeated")


def _add_export(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "export",
        "export",
        "write a model for use without this package",
        "dpnet export models:/dpnet@champion -o exported --format onnx --format torchscript",
        "Always written: model.safetensors, config.json and README.md, a model card that says how"
        " to load\neach file. Every file is loaded again and compared with the network before it is"
        " kept.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="",
        help="what `dpnet inpaint --model` takes (default: the root's champion)",
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument(
        "--format",
        action="append",
        choices=["torch-export", "onnx", "torchscript"],
        help="may be repeated (default: torch-export)",
    )
    parser.add_argument(
        "--root", help=f"where models are looked up (default: DPNET_ROOT, else {DEMO_ROOT})"
    )


def _add_up(parsers: _Parsers) -> None:
    parser = _add(
        parsers,
        "up",
        "up",
        "start a local Prefect server with its UI, a worker and MLflow, until Ctrl-C",
        "dpnet up --root /data/dpnet --ray",
        "Runs and deployments are kept from one time to the next. All of it listens on 127.0.0.1"
        " alone. Where\nit runs already for the root, its addresses are told. With"
        " PREFECT_API_AUTH_STRING=user:password in the\nenvironment, Prefect asks for that"
        " password.",
    )
    parser.add_argument(
        "--root", help=f"where everything is stored (default: DPNET_ROOT, else {DEMO_ROOT})"
    )
    parser.add_argument(
        "--port", type=_port, metavar="N", help="of Prefect (default: 4200, else any free one)"
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        help="of Prefect, as postgresql+asyncpg://USER:PASSWORD@HOST/NAME (default:"
        " PREFECT_SERVER_DATABASE_CONNECTION_URL, which others cannot see, else SQLite in the"
        " root's folder)",
    )
    parser.add_argument(
        "--ray", action="store_true", help="also start a Ray cluster of this machine, for ray-job"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give one from 1 to 65535")
    return int(text)
