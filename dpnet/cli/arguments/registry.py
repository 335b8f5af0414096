"""Options of the commands for registered models: registry list, show, history, promote, …"""

from __future__ import annotations

import argparse

from dpnet.cli.arguments.options import Parsers, add_command, add_group, add_root

_ROOT = "where the models are registered"
_FUNCTIONS = {"list": "list_versions"}  # a function named list would hide Python's
_EXAMPLE = "dpnet registry list --root ./dpnet-demo"


def add_registry(parsers: Parsers) -> None:
    """Add `dpnet registry` with list, show, history, promote, rollback and rebuild."""
    group = add_group(parsers, "registry", "show registered models, change the champion", _EXAMPLE)
    _add(group, "list", "list the versions of every model", _EXAMPLE)
    example = "dpnet registry show 2 --root ./dpnet-demo"
    show = _add(group, "show", "show what is known about a version", example)
    show.add_argument(
        "version", metavar="VERSION", type=_version, help="number of the version, or champion"
    )
    _add(
        group,
        "history",
        "show who was champion from when to when, why, and from which photos",
        "dpnet registry history --root ./dpnet-demo",
        "`dpnet verify` checks that no record of the history was altered. The votes that people"
        " gave in the page of `dpnet serve` follow; they change no champion.",
    )
    example = 'dpnet registry promote 2 --why "sharper edges" --root ./dpnet-demo'
    promote = _add(group, "promote", "make a version the champion", example)
    promote.add_argument(
        "version", metavar="VERSION", type=_number, help="number of the version, such as 2"
    )
    promote.add_argument(
        "--why", metavar="TEXT", required=True, type=_reason, help="reason, for the history"
    )
    rollback = _add(
        group,
        "rollback",
        "make the former champion the champion again",
        "dpnet registry rollback --root ./dpnet-demo",
        "A second rollback goes one champion further back.",
    )
    rollback.add_argument("--why", metavar="TEXT", default="", help="reason, for the history")
    rebuild = _add(
        group,
        "rebuild",
        "make an empty or incomplete MLflow whole again",
        "dpnet registry rebuild --root ./dpnet-demo",
        "Versions, tags, aliases and runs are restored from the root, and so are model cards that"
        " are missing in it.",
    )
    for parser in (promote, rollback, rebuild):
        parser.add_argument(
            "--tracking-uri",
            metavar="URI",
            help="MLflow's server or database (default: MLFLOW_TRACKING_URI, else ROOT/mlflow.db)",
        )


def _add(
    group: Parsers, name: str, what: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    parser = add_command(group, name, f"registry.{_FUNCTIONS.get(name, name)}", what, example, more)
    add_root(parser, _ROOT)
    parser.add_argument("--model", metavar="NAME", help="name of the model (default: the only one)")
    return parser


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version: give its number, such as 2")
    return int(text)


def _reason(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the reason is empty: say why, the history keeps it")
    return text.strip()


def _version(text: str) -> int | None:
    """Return the number of a version, or None for the champion."""
    return None if text == "champion" else _number(text)
