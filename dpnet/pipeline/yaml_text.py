"""Read YAML: the one reader of configs, deploy files, stored configs and the values of --set.

It is stricter than PyYAML where a file would be misread without a word. A key that a mapping has
twice is refused. An alias becomes a copy, so a change of one option changes no other option.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_VALUES = 10_000  # of a document, with all its aliases copied


class YamlError(ValueError):
    """Text that cannot be read as YAML; the message continues a sentence about it."""


def read_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Only true and false are booleans, as in YAML 1.2: `off` is a word.

    Raises:
        YamlError: it is no YAML, repeats a key, or has more than MAX_VALUES values.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Reading(loader).value(node)
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"is not valid YAML at line {line}: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        where = _line(error.problem_mark or error.context_mark)
        raise YamlError(f"is not valid YAML{where}: {error.problem or error.context}") from None
    except RecursionError:
        raise YamlError("is not valid YAML: its lists or sections are nested too deep") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML with only true and false for booleans."""


_BOOLEAN = "tag:yaml.org,2002:bool"
_MERGE = "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(true|True|TRUE|false|False|FALSE)$"), "tTfF")


class _Reading:
    """Values made from nodes: each use of an anchor is made again, so no two share an object."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._count = 0

    def value(self, node: yaml.Node, around: tuple[yaml.Node, ...] = ()) -> Any:
        """Return the value of a node; `around` has the nodes that contain it."""
        self._count += 1
        if self._count > MAX_VALUES:
            raise YamlError(
                f"has more than {MAX_VALUES:,} values, counting all that its aliases repeat: write"
                " fewer aliases"
            )
        if any(node is outer for outer in around):
            raise YamlError(
                f"has an alias{_line(node.start_mark)} inside the value that it names: write the"
                " value out"
            )
        inside = (*around, node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _Loader.DEFAULT_MAPPING_TAG:
            return self._mapping(node, inside)
        if isinstance(node, yaml.SequenceNode) and node.tag == _Loader.DEFAULT_SEQUENCE_TAG:
            return [self.value(each, inside) for each in node.value]
        raise YamlError(f"is not valid YAML{_line(node.start_mark)}: the tag {node.tag} is unknown")

    def _mapping(self, node: yaml.MappingNode, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        merges = False
        for key_node, value_node in node.value:
            merge = key_node.tag == _MERGE
            key = "<<" if merge else self.value(key_node, inside)
            if not isinstance(key, str):
                raise YamlError(
                    f"has a key that is not text{_line(key_node.start_mark)}: write it in quotes"
                )
            again = merges if merge else key in own
            if again:
                raise YamlError(
                    f"has the key {key!r} a second time{_line(key_node.start_mark)}: keep one of"
                    " the two"
                )
            if merge:
                merges = True
                merged = self._merged(value_node, inside)
            else:
                own[key] = self.value(value_node, inside)
        return merged | own

    def _merged(self, node: yaml.Node, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        """Return the values of a merge key `<<`: one mapping, or a list of which the first wins."""
        found = self.value(node, inside)
        parts = found if isinstance(found, list) else [found]
        values: dict[str, Any] = {}
        for part in reversed(parts):
            if not isinstance(part, dict):
                raise YamlError(f"merges something else than a section{_line(node.start_mark)}")
            values |= part
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError):
            kind = node.tag.rpartition(":")[2]
            raise YamlError(
                f"is not valid YAML{_line(node.start_mark)}: {str(node.value)[:80]!r} is no {kind}."
                " Write text in quotes"
            ) from None


def _line(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f" at line {mark.line + 1}"
