"""Messages of the product go to the log; only results and protocols are printed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("data_prep", "dpnet", "flows")
# The functions that print a result, or a line which another process of ours reads.
PRINTING = {
    "dpnet/cli/main.py": {"main", "_print"},
    "dpnet/cli/commands/servers.py": {"announce"},
    "dpnet/cli/commands/serve.py": {"announce"},
    "dpnet/pipeline/exporter.py": {"main"},
    "dpnet/training/ray/job_driver.py": {"main"},
    "flows/local_server/mlflow_server.py": {"main"},
    "flows/local_server/supervisor.py": {"_answer"},
}


def modules() -> list[Path]:
    found = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    assert found
    return sorted(found)


def writing_functions(node: ast.AST, function: str = "") -> Iterator[str]:
    """Yield the name of the function around each print or write to a standard stream."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call) and ast.unparse(child.func) in (
            "print",
            "sys.stderr.write",
            "sys.stdout.write",
        ):
            yield inside
        yield from writing_functions(child, inside)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_only_results_and_protocols_are_printed(path: Path) -> None:
    name = path.relative_to(REPOSITORY).as_posix()
    found = set(writing_functions(ast.parse(path.read_text("utf-8"))))
    assert found == PRINTING.get(name, set()), "log messages with logging.getLogger(__name__)"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_the_level_of_a_message_is_not_a_word_in_its_text(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            assert not any(str(text).lower().startswith("warning:") for text in texts)


def test_a_print_in_a_function_is_found() -> None:
    code = "def outer():\n    def inner():\n        print('x')\n    sys.stderr.write('y')\n"
    assert set(writing_functions(ast.parse(code))) == {"inner", "outer"}


# Functions that write the address of a store for another program, not for people.
ADDRESSES = {
    "flows/local_server/up.py",  # the name of a root's folder in the cache
    "dpnet/registry/mlflow_versions.py",
    "dpnet/tracking/mlflow_runs.py",
    "dpnet/training/ray/ray_train.py",  # the name of Ray's run
}


def addresses(code: ast.AST) -> list[str]:
    """Return the addresses of stores in texts, messages of errors and records of the log."""
    found = []
    for node in ast.walk(code):
        logs = isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("log.", "_log."))
        if logs or isinstance(node, ast.JoinedStr | ast.Raise):
            inner = [ast.unparse(n) for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            found += [each for each in inner if re.search(r"store\.uri$", each)]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_a_message_names_a_local_folder_by_its_path(path: Path) -> None:
    name = path.relative_to(REPOSITORY).as_posix()
    if name not in ADDRESSES and "/s3" not in name:
        assert addresses(ast.parse(path.read_text("utf-8"))) == [], "use the store's label"


def test_an_address_in_a_message_is_found() -> None:
    code = 'where = f"{self.store.uri}/x"\nlog.info("%s", store.uri)\nprint(store.label)\n'
    assert addresses(ast.parse(code)) == ["self.store.uri", "store.uri"]
