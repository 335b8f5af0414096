"""Names under a root: they have not changed, and the packages have no copies of them."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.core import paths
from data_prep.core.errors import ConfigError

REPOSITORY = Path(__file__).parents[4]
SOURCES = [
    path
    for package in ("data_prep", "dpnet", "flows")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
    if path != REPOSITORY / "data_prep/core/paths.py"
]
FOLDERS = "images|masks|runs|evaluations|registry|retrains"
FILES = r"mlflow\.db|mlflow-artifacts|manifest\.json|lease\.json|champion\.json|\.cache/dpnet"
# "images" and "masks" without a slash are also stages, and "registry" is also a JSON key.
NAME = re.compile(
    rf"(?:{FOLDERS})/\S*|runs|evaluations|retrains|(?:\S*/)?(?:{FILES})|\S*dpnet-demo"
)
# The name of a hash stream. It is not a path.
ALLOWED = {("data_prep/masks/plan.py", "masks/")}


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield the strings of a file and the fixed parts of its f-strings, without docstrings."""
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node


def copies(source: str) -> list[str]:
    """Return the literals in a source that are names under a root."""
    return [node.value for node in literals(ast.parse(source)) if NAME.fullmatch(node.value)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_names_under_a_root_are_written_in_core_paths_only(path: Path) -> None:
    name = path.relative_to(REPOSITORY).as_posix()
    assert [each for each in copies(path.read_text("utf-8")) if (name, each) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        "f'images/{name}'",
        "store.list('runs')",
        "f'{folder}/manifest.json'",
        "Path(root, 'mlflow.db')",
        "f'sqlite:///{root}/mlflow.db'",
        "f'{top}/lease.json'",
        "root = './dpnet-demo'",
        "Path('~/.cache/dpnet')",
    ],
)
def test_a_copy_of_a_name_is_found(source: str) -> None:
    assert copies(source)


@pytest.mark.parametrize(
    "source",
    [
        "f'{top}/watch-lease.json'",
        "stage == 'images'",
        "masks = 'masks'",
        "x['registry']",
        "x = 'the folder images/NAME'",
    ],
)
def test_stages_keys_and_sentences_are_not_names(source: str) -> None:
    assert copies(source) == []


def test_registry_keys_are_parsed_into_model_and_version() -> None:
    assert paths.parse_record_key(paths.champion_key("cats")) == ("cats", None)
    assert paths.parse_record_key(paths.version_key("cats", 12)) == ("cats", 12)
    for key in ("registry/cats/0123456789ab/record.json", "registry/cats/v1.json.bak", "v1.json"):
        assert paths.parse_record_key(key) is None


def test_the_names_of_old_roots_have_not_changed() -> None:
    assert paths.manifest_key("runs/a-1") == "runs/a-1/manifest.json"
    assert paths.lease_key("runs/a-1") == "runs/a-1/lease.json"
    assert paths.images_folder("cats") == "images/cats"
    assert paths.masks_folder("irregular") == "masks/irregular"
    assert paths.registry_folder("cats") == "registry/cats"
    assert paths.champion_key("cats") == "registry/cats/champion.json"
    assert paths.version_key("cats", 3) == "registry/cats/v3.json"
    assert paths.mlflow_uri("/data/root") == "sqlite:////data/root/mlflow.db"


def test_a_user_without_a_home_learns_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # without an entry in the list of users
    with pytest.raises(ConfigError, match="set HOME to a folder that this user can write"):
        paths.cache_folder()
    monkeypatch.setenv("HOME", "/home/a")
    assert str(paths.cache_folder()) == "/home/a/.cache/dpnet"
