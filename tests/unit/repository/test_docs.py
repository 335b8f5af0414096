"""The documentation: its links, its commands, its line lengths and its table of options."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from data_prep.core import manifest
from data_prep.images.settings import ImagesSettings
from data_prep.masks.recipes import RECIPES_VERSION
from dpnet.cli.parser import build_parser
from dpnet.evaluation.protocol import PROTOCOL_VERSION
from dpnet.model_store import history, weights
from dpnet.pipeline.config import load_config, load_settings
from dpnet.registry import votes
from dpnet.training import checkpoints
from flows.deployments import DeploySettings

REPOSITORY = Path(__file__).parents[3]
FILE = re.compile(r"`((?:data_prep|dpnet|flows|tests|benchmarks|docs|infra)/[\w./-]+)`")
WIDTH = 100  # of a line, in characters
README_LINES = 150
PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/**/*.md"),
        *REPOSITORY.glob("infra/**/*.md"),
        *REPOSITORY.glob(".github/**/*.md"),
    ]
)


class Command(NamedTuple):
    """A command in a block of a page, and its line's number."""

    line: int
    words: list[str]


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line in a fenced or an indented block."""
    fenced, before = False, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before or before.startswith("    "))):
            yield number, line
        before = line if line.strip() else ("" if not before.startswith("    ") else before)


def prose_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines outside of blocks, tables and images, which may be long."""
    blocks = {number for number, _ in code_lines(text)}
    return [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if number not in blocks and not line.startswith(("|", "!["))
    ]


def dpnet_commands(text: str) -> Iterator[Command]:
    """Yield the `dpnet …` commands of the blocks, without variables before and comments after."""
    for number, line in code_lines(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of Python or YAML
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if len(words) > 1 and words[0] in ("dpnet", ".venv/bin/dpnet"):
            yield Command(number, words[1:])


def examples(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each block that begins with a comment like `# mine.yaml`."""
    for found in re.finditer(r"^    # ([\w-]+\.yaml)\n((?:    .*\n)+)", text, re.MULTILINE):
        yield found[1], found[2]


def links(text: str) -> Iterator[str]:
    """Yield the targets of links and images that are in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_there_are_pages_to_check() -> None:
    assert {"README.md", "ARCHITECTURE.md", "docs/config.md"} <= {name(page) for page in PAGES}
    shown = [title for page in PAGES for title, _ in examples(page.read_text("utf-8"))]
    assert sorted(shown) == ["mine.yaml", "mine.yaml", "my-deploy.yaml"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target in links(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in headings(file), f"{name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for path in FILE.findall(page.read_text("utf-8")):
        assert (REPOSITORY / path).exists(), f"{name(page)} names {path}, which does not exist"


def test_every_name_on_the_page_of_extending_is_in_a_file_that_it_names() -> None:
    text = (REPOSITORY / "docs/extending.md").read_text("utf-8")
    files = [REPOSITORY / path for path in FILE.findall(text)]
    code = "\n".join(file.read_text("utf-8") for file in files if file.suffix == ".py")
    names = set(re.findall(r"`([A-Za-z_]+)(?:\([\w, ]*\))?`", text))
    assert {"Container", "RECIPES", "METRICS", "Launcher"} <= names
    assert [each for each in sorted(names) if not re.search(rf"\b{each}\b", code)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_dpnet_command_in_a_block_is_one_that_the_parser_accepts(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    for command in dpnet_commands(page.read_text("utf-8")):
        try:
            build_parser().parse_args(command.words)
        except ValueError as error:
            pytest.fail(f"{name(page)}:{command.line}: dpnet {shlex.join(command.words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_example_of_a_config_can_be_loaded(page: Path, tmp_path: Path) -> None:
    for title, example in examples(page.read_text("utf-8")):
        file = tmp_path / title
        file.write_text(example, "utf-8")
        if "deploy" in title:
            load_settings(DeploySettings, file)
        else:
            assert load_config(str(file)).name == "mine"


def test_the_map_of_the_architecture_has_every_folder_of_the_packages() -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text("utf-8")
    table = text.split("## Map")[1].split("## Words")[0]
    folders = [
        file.parent.relative_to(REPOSITORY).as_posix()
        for package in ("data_prep", "dpnet")
        for file in (REPOSITORY / package).glob("*/__init__.py")
    ]
    assert "dpnet/training" in folders
    assert [folder for folder in sorted(folders) if f"`{folder}/`" not in table] == []


def test_the_layers_of_the_architecture_are_those_that_are_checked() -> None:
    package = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    checked = [
        {module.strip() for module in layer.split("|")}
        for layer in package["tool"]["importlinter"]["contracts"][0]["layers"]
    ]
    text = (REPOSITORY / "ARCHITECTURE.md").read_text("utf-8")
    listed = text.split("From top to bottom:")[1].split("2. ")[0]
    rows = [re.findall(r"`([\w/.]+)`", row) for row in listed.split("* ")[1:]]
    assert [{path.removesuffix(".py").replace("/", ".") for path in row} for row in rows] == checked


def test_the_pages_show_every_command() -> None:
    shown = {
        " ".join(command.words[:2])
        for page in PAGES
        for command in dpnet_commands(page.read_text("utf-8"))
    }
    for command in ("images build", "images log", "masks build", "pipeline run", "model describe"):
        assert command in shown
    for command in ("train", "evaluate", "register", "inpaint", "export", "verify", "up", "deploy"):
        assert any(each.split()[0] == command for each in shown), f"no page shows dpnet {command}"


def test_readme_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_lines_of_a_page_are_at_most_100_characters_but_for_blocks_and_tables(
    page: Path,
) -> None:
    lines = prose_lines(page.read_text("utf-8"))
    assert [number for number, line in lines if len(line) > WIDTH] == []


def test_the_page_of_options_is_what_its_script_makes() -> None:
    script = REPOSITORY / "docs/make_config.py"
    found = importlib.util.spec_from_file_location("make_config", script)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    page = (REPOSITORY / "docs/config.md").read_text("utf-8")
    assert page == module.config_page(), "run: .venv/bin/python docs/make_config.py"


def test_the_change_log_has_the_format_numbers_of_the_code() -> None:
    images = ImagesSettings(source="photos").request_settings()["format_version"]
    of_code = {
        "manifest and request digest": manifest.FORMAT,
        "image shards": images,
        "mask shards": RECIPES_VERSION,
        "evaluation": PROTOCOL_VERSION,
        "checkpoint": checkpoints.FORMAT,
        "weights": weights.FORMAT,
        "record of the history": history.FORMAT,
        "vote": votes.FORMAT,
    }
    table = (REPOSITORY / "CHANGELOG.md").read_text("utf-8").split("## Format numbers")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    listed = {row[0]: int(row[2]) for row in rows if row[2].isdigit()}
    assert listed == of_code


def test_the_citation_has_what_citation_tools_require() -> None:
    record = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "references"} <= record.keys()
    assert record["cff-version"] == "1.2.0"
    assert record["type"] == "software"
    (paper,) = record["references"]
    assert paper["type"] == "article"
    assert paper["doi"] == "10.1109/TCSVT.2022.3165587"
    assert [author["family-names"] for author in paper["authors"]] == [
        "Wang", "Shao", "Meng", "Zuo",
    ]  # fmt: skip


def test_the_citation_has_the_version_of_the_package_and_the_changelog_explains_it() -> None:
    package = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    record = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    changes = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## (\S+) \((\S+)\)$", changes, re.MULTILINE)
    assert newest is not None
    assert (record["version"], record["date-released"]) == newest.groups()
    assert record["version"] == package["version"]


def test_the_issue_forms_ask_for_a_command_and_a_version() -> None:
    forms = {
        path.stem: yaml.safe_load(path.read_text("utf-8"))
        for path in (REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml")
    }
    assert set(forms) == {"bug", "feature"}
    for form in forms.values():
        assert form["name"]
        assert form["description"]
        fields = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(set(fields)) == len(fields)
    assert {"command", "version"} <= {field.get("id") for field in forms["bug"]["body"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Text:\n\n    dpnet up --root a  # a comment\n", [["up", "--root", "a"]]),
        ("```text\nX=1 .venv/bin/dpnet demo\n```\n", [["demo"]]),
        ("Text\n    dpnet of a wrapped paragraph\n", []),
        ("    it's no shell\n", []),
    ],
)
def test_commands_are_found_in_blocks_only(text: str, expected: list[list[str]]) -> None:
    assert [command.words for command in dpnet_commands(text)] == expected
