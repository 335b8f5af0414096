"""Docstrings begin with an order or a noun, as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("data_prep", "dpnet", "flows", "benchmarks")
QUESTION = re.compile(r"(?:What|Whether|How|Which|Who|Whom|Whose|Where|When|Why|That)\b")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_docstring_begins_like_a_question(package: str) -> None:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    wrong = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if QUESTION.match(text):
                    wrong.append(f"{file.relative_to(REPOSITORY)}: {text.splitlines()[0]}")
    assert wrong == []
