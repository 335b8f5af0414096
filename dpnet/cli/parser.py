"""The parser of the command `dpnet`: its help, its version and its commands."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
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

exit status: 0 done, 1 failed, 2 wrong usage (correct the command or its config), 130 stopped
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose messages can be shown: they repeat arguments, such as names and addresses."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what is unknown with the usage of the command that it was given to.

        `--option=--` is refused too, which Python's parser takes for an empty list before 3.13.
        """
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if match := re.fullmatch(r"(--[\w-]+)=--|(-\w)--", word):
                self.error(f"argument {match[1] or match[2]}: expected one argument")
        if self._subparsers is None:  # else a word may be an option of a command
            self._refuse_unknown_options(words)
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, []

    def _refuse_unknown_options(self, words: Sequence[str]) -> None:
        """Refuse a misspelt option before an argument is missing because of it."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in itertools.takewhile(lambda each: each != "--", words):
            name = word.partition("=")[0]
            if re.match(r"--\w", name) and not any(each.startswith(name) for each in known):
                self.error(f"unrecognized arguments: {name}{_nearest(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = _nearest(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{near}") from None

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(redact(message), newlines=True), file)


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return a question with the known word that is most like `word`, or ""."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {near[0]}?" if near else ""


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
    servers.add_serve(commands)
    models.add_model(commands)
    models.add_export(commands)
    registry.add_registry(commands)
    servers.add_deploy(commands)
    servers.add_up(commands)
    return parser
