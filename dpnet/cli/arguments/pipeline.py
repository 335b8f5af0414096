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
