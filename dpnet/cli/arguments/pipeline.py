"""Options of the commands that run stages: demo, pipeline, train, evaluate, register, notify."""

from __future__ import annotations

import argparse

from dpnet.cli.arguments.options import (
    Parsers,
    add_command,
    add_config,
    add_group,
    add_launch,
    add_ray,
    add_root,
    add_set,
    count,
    minutes,
    positive,
    share,
    whole,
)

TRAINED = {
    "train": "train a model",
    "evaluate": "evaluate the trained model and compare it with simple methods",
    "register": "register the evaluated model",
}


def add_demo(parsers: Parsers) -> None:
    """Add `dpnet demo`."""
    parser = add_command(
        parsers,
        "demo",
        "pipeline.demo",
        "run the whole pipeline on a few sample photos",
        "dpnet demo --photos ~/Pictures --root /tmp/mine",
        "Run the same command again to resume: it skips the finished stages and continues the"
        " stopped one.",
    )
    add_root(parser, "folder where everything is stored")
    parser.add_argument(
        "--photos", metavar="DIR", help="use the photos of this folder instead of the samples"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over: first remove what an earlier demo stored"
    )
    add_set(parser, "train.steps=100")


def add_pipeline(parsers: Parsers) -> None:
    """Add `dpnet pipeline run`."""
    example = "dpnet pipeline run places2 --root /data/dpnet --set images.source=/data/places2"
    group = add_group(parsers, "pipeline", "run all stages in one Prefect flow run", example)
    parser = add_command(
        group, "run", "pipeline.run", "run every stage that is not finished", example
    )
    add_config(parser)
    add_launch(parser)


def add_stages(parsers: Parsers) -> None:
    """Add `dpnet train`, `dpnet evaluate` and `dpnet register`."""
    for stage, what in TRAINED.items():
        add_stage(parsers, stage, stage, what, f"dpnet {stage} demo --root ./dpnet-demo")


def add_stage(parsers: Parsers, name: str, stage: str, what: str, example: str) -> None:
    """Add the command `name`, which runs one stage of a config."""
    more = "Earlier stages run first if they are not finished."
    if stage not in TRAINED:
        more = (
            "No other stage runs. The config says which recipes draw the masks, and"
            " masks.external names a folder of mask files."
        )
    parser = add_command(parsers, name, "pipeline.stage", what, example, more)
    parser.set_defaults(stage=stage)
    if stage in TRAINED:
        add_config(parser)
        add_launch(parser)
        if stage == "evaluate":
            _add_peers(parser)
            add_ray(parser, "measure the pairs on", "threads")
    else:
        add_config(parser, "train=1000 or size=64", f"`{stage}`")


def _add_peers(parser: argparse.ArgumentParser) -> None:
    """Add the options that compare with other models."""
    parser.add_argument(
        "--compare",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="also judge another model on the same pairs: a folder with its picture for each pair"
        " of --export-pairs, or models:/MODEL/VERSION of this root; may be repeated",
    )
    parser.add_argument(
        "--export-pairs",
        metavar="DIR",
        help="only write the pairs as PNG files (truth, masked, mask, white is the hole), to run"
        " other models on them; nothing is trained or evaluated",
    )


def add_plan(parsers: Parsers) -> None:
    """Add `dpnet plan`."""
    parser = add_command(
        parsers,
        "plan",
        "pipeline.plan",
        "say how much data, time and money a config takes, before anything starts",
        "dpnet plan places2 --gpus 8 --set cost.gpu_hour=2.50\n"
        "  dpnet plan mine.yaml --root s3://bucket/dpnet",
        "Nothing is written under the root. The source is listed and some of its photos are"
        " prepared. Without a source, a published dataset has its published size. The speed is"
        " that of an earlier run of the root, else the one that was measured for the benchmarks."
        " The result says what was assumed.",
    )
    add_config(parser)
    parser.add_argument(
        "--images", type=whole, metavar="N", help="plan for N photos (default: those of the source)"
    )
    parser.add_argument(
        "--gpus",
        type=whole,
        metavar="N",
        help="plan for N workers with a GPU each (default: the config's workers)",
    )
    parser.add_argument(
        "--images-per-second",
        type=positive,
        metavar="X",
        help="speed of one worker in training (default: measured, see above)",
    )
    parser.add_argument(
        "--cores",
        type=positive,
        default=8.0,
        metavar="N",
        help="cores that each GPU has for decoding (default: 8)",
    )
    parser.add_argument(
        "--storage-mb",
        type=positive,
        default=500.0,
        metavar="X",
        help="MB a second that the storage gives to all workers together (default: 500)",
    )
    parser.add_argument(
        "--efficiency",
        type=share,
        default=0.9,
        metavar="SHARE",
        help="speed of each of many workers, as a share of the measured one (default: 0.9)",
    )
    parser.add_argument(
        "--restart-seconds",
        type=positive,
        metavar="S",
        help="seconds from the loss of a machine to the next step (default: measured)",
    )


def add_notify(parsers: Parsers) -> None:
    """Add `dpnet notify`."""
    parser = add_command(
        parsers,
        "notify",
        "pipeline.notify",
        "compare a config's source with its last version and report new photos to Prefect",
        "dpnet notify places2 --root s3://bucket/dpnet --event notification.json",
        "It does the same as one run of the deployment watch-raw-data. Call it when a bucket sends"
        " a notification, or from cron. The event goes to the Prefect API of PREFECT_API_URL, else"
        " to the server of `dpnet up`. Nothing is prepared or trained.",
    )
    add_config(parser)
    parser.add_argument(
        "--event",
        metavar="FILE|-",
        help="S3 notification (JSON; - is standard input), also as SNS, SQS or EventBridge wrap it;"
        " nothing is done if none of its objects is in the config's source",
    )
    parser.add_argument(
        "--min-new",
        type=count,
        default=1,
        metavar="N",
        help="least number of new or changed photos to report (default: 1)",
    )
    parser.add_argument(
        "--quiet-minutes",
        type=minutes,
        default=0.0,
        metavar="MINUTES",
        help="report only if the source has not changed for this time, according to earlier calls"
        " (default: 0)",
    )
    parser.add_argument(
        "--again", action="store_true", help="report photos even if they were reported before"
    )
