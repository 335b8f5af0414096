"""Images are opened in one place, with the formats and limits that the product allows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("data_prep", "dpnet", "flows")
# Functions of libraries that read files of any format, and the places that may call them.
READERS = {
    "Image.open": {("data_prep/pictures/open_image.py", "opened")},
    "cv2.imdecode": {("data_prep/masks/codec.py", "valid_from_png")},  # after a look at the format
    "cv2.imdecodemulti": set(),
    "cv2.imread": set(),
    "cv2.imreadmulti": set(),
    "cv2.VideoCapture": set(),
    "ImageFile.Parser": set(),
    "io.read_image": set(),
    "io.decode_image": set(),
    "imageio.imread": set(),
    "plt.imread": set(),
}


def calls(node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Yield each attribute that is used, such as `Image.open`, and the function around it."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Attribute):
            yield ".".join(ast.unparse(child).split(".")[-2:]), inside
        if isinstance(child, ast.ImportFrom) and child.module in ("PIL.Image", "cv2"):
            yield from ((f"{child.module.split('.')[-1]}.{n.name}", inside) for n in child.names)
        yield from calls(child, inside)


def test_each_reader_of_images_is_used_in_one_allowed_function() -> None:
    found: dict[str, set[tuple[str, str]]] = {name: set() for name in READERS}
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            for name, function in calls(ast.parse(path.read_text("utf-8"))):
                if name in found:
                    found[name].add((path.relative_to(REPOSITORY).as_posix(), function))
    assert found == READERS


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    PIL.Image.open(x)",
        "def f():\n    g = Image.open",
        "def f():\n    from PIL.Image import open",
    ],
)
def test_every_way_to_name_a_reader_is_found(code: str) -> None:
    assert ("Image.open", "f") in set(calls(ast.parse(code)))
