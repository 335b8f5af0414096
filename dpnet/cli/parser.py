"""The parser of the command `dpnet`: its help, its version and its commands."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from data_prep.core.redact import redact
from data_prep.core.text import printable
from dpnet.cli.arguments import data, models, pipeline, registry, servers

_DESCRIPTION = "Turn raw photos into a registered DPNet inpainting model. Every command resumes."
_EPILOG = """\
first steps:
  dpnet demo                                    the whole pipeline, small, in ./dpnet-demo
  dpnet inpaint photo.png mask.png -o out.png   fill the white part of the mask
  dpnet COMMAND --help                          the options of a command, with an example

exit status: 0 done, 1 failed (one sentence says why), 2 wrong usage, 130 stopped
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose messages can be shown: they repeat arguments, such as names and addresses."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse `--option=--`, which Python's parser takes for an empty list before 3.13."""
        for word in sys.argv[1:] if args is None else args:
            if match := re.fullmatch(r"(--[\w-]+)=--|(-\w)--", word):
                self.error(f"argument {match[1] or match[2]}: expected one argument")
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(redact(message), newlines=True), file)


class _Version(argparse.Action):
    """Print the version; it is looked up only then."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import dpnet

        parser._print_message(f"dpnet {dpnet.__version__}\n", sys.stdout)  # as the help is printed
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. `args.command` is the "file.function" that does the command's work."""
    parser = _Parser(
        prog="dpnet",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    pipeline.add_demo(commands)
    pipeline.add_pipeline(commands)
    data.add_images(commands)
    data.add_masks(commands)
    pipeline.add_plan(commands)
    pipeline.add_stages(commands)
    pipeline.add_notify(commands)
    data.add_verify(commands)
    data.add_gc(commands)
    models.add_inpaint(commands)
    models.add_model(commands)
    models.add_export(commands)
    registry.add_registry(commands)
    servers.add_deploy(commands)
    servers.add_up(commands)
    return parser
