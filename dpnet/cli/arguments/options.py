"""Parts that several commands share: their help, common options, and types of values."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from data_prep.core.paths import DEMO_ROOT

WIDTH = 80  # columns of a description
Parsers = Any  # argparse names the type of subparsers with an underscore


def add_command(
    parsers: Parsers, name: str, command: str, what: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    """Add a command with its help and the options that all commands have.

    Args:
        parsers: where the command is added.
        name: the word that people type.
        command: the function that does the work, as "file.function" in `dpnet/cli/commands`.
        what: what the command does, without a full stop; the list of commands shows it.
        example: a command line that works; several lines are indented by two blanks.
        more: further sentences for the command's own help.
    """
    parser: argparse.ArgumentParser = parsers.add_parser(name, **_help(what, example, more))
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on the last line"
    )
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks and the logs of Prefect and Ray"
    )
    parser.set_defaults(command=command)
    return parser


def add_group(parsers: Parsers, name: str, what: str, example: str) -> Parsers:
    """Add a command that has commands of its own, and return the place for them."""
    group = parsers.add_parser(name, **_help(what, example))
    return group.add_subparsers(metavar="COMMAND", required=True)


def _help(what: str, example: str, more: str = "") -> dict[str, Any]:
    description = [f"{what[0].upper()}{what[1:]}.", *textwrap.wrap(more, WIDTH)]
    return {
        "help": what,
        "description": "\n".join(description),
        "epilog": f"example:\n  {example}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def add_root(parser: argparse.ArgumentParser, what: str, default: str = DEMO_ROOT) -> None:
    """Add the option --root; `what` says what is stored or searched there."""
    parser.add_argument("--root", help=f"{what} (default: DPNET_ROOT, else {default})")


def add_config(
    parser: argparse.ArgumentParser, example: str = "train.steps=100", of: str = "the config"
) -> None:
    """Add the argument CONFIG with --root and --set, which changes options of `of`."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a packaged config (demo, places2, …) or a YAML file"
    )
    add_root(parser, "folder or s3:// URI where everything is stored", "the config's root")
    add_set(parser, example, of)


def add_set(parser: argparse.ArgumentParser, example: str, of: str = "the config") -> None:
    """Add the option --set for the options of `of`."""
    parser.add_argument(
        "--set",
        metavar="OPTION=VALUE",
        action="append",
        default=[],
        help=f"change an option of {of}, for example {example}; may be repeated",
    )


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where training runs."""
    parser.add_argument(
        "--launcher",
        choices=["local", "ray-job", "kuberay"],
        help="where training runs: with Ray on this machine, as a job on a Ray cluster, or as a"
        " RayJob on Kubernetes. A job continues if this command is killed; the same command finds"
        " it again (default: the config's launcher, else local)",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="dashboard of the Ray cluster, for example http://head:8265",
    )


def add_ray(parser: argparse.ArgumentParser, what: str, instead: str) -> None:
    """Add the option --ray, which says that a Ray cluster does the work of this command.

    Args:
        parser: the command's parser.
        what: what happens with the cluster, a verb and its object.
        instead: what of this machine would be used.
    """
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"{what} this Ray cluster (auto, local or HOST:PORT) instead of this machine's"
        f" {instead}",
    )


def count(text: str) -> int:
    """Return a number of photos, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of photos: give one such as 100"
        )
    return int(text)


def whole(text: str) -> int:
    """Return a whole number from 1 to 10^12."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 10**12):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 10^12")
    return int(text)


def positive(text: str) -> float:
    """Return a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0: give one such as 100")
    return number


def minutes(text: str) -> float:
    """Return a number of minutes, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of minutes: give one such as 10"
        )
    return number


def days(text: str) -> float:
    """Return a number of days, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days: give one such as 7")
    return number


def share(text: str) -> float:
    """Return a share above 0 and at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share: give a number such as 0.01, at most 1"
        )
    return number


def port(text: str) -> int:
    """Return a TCP port from 1 to 65535."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give one from 1 to 65535")
    return int(text)
