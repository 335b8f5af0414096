"""The reader of YAML: what it refuses, and that aliases are copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.paths import RUNS
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.config import load_config, load_settings
from dpnet.pipeline.cost import _network
from dpnet.pipeline.yaml_text import MAX_VALUES, YamlError, read_yaml
from flows.deployments import DeploySettings


@pytest.mark.parametrize(
    "text",
    [
        "images: {source: a}\nmasks: {}\nimages: {size: 64}\n",
        "masks: {}\nimages: {source: a,\n  source: b}\n",
        "a: 1\nb: 2\n'a': 3\n",
        "x: 0\nlist: [{a: 1}, {b: 1,\n b: 2}]\n",
        "x: &x {a: 1}\n<<: *x\n<<: *x\n",
    ],
)
def test_a_key_that_a_mapping_has_twice_is_refused_with_its_line(text: str) -> None:
    line = 2 if text.count("\n") == 2 else 3
    with pytest.raises(YamlError, match=rf"a second time at line {line}: keep one"):
        read_yaml(text)


def test_every_yaml_file_is_read_by_the_strict_reader(tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text("name: a\nimages: {source: photos}\nname: b\n", "utf-8")
    expected = re.escape(f"{twice} has the key 'name' a second time at line 3")
    with pytest.raises(ConfigError, match=expected):
        load_config(str(twice))
    with pytest.raises(ConfigError, match=expected):
        load_settings(DeploySettings, twice)
    with pytest.raises(ConfigError, match=r"--set .*: the value has the key 'steps' a second time"):
        load_config("demo", ["train={steps: 1, steps: 2}"])
    store = LocalStore(tmp_path)
    store.write(f"{RUNS}/a/resolved-config.yaml", b"model: {preset: tiny}\nmodel: {preset: base}\n")
    assert _network(store, f"{RUNS}/a") is None


def test_an_alias_is_a_copy_so_an_override_changes_one_section(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\n"
        "images: {source: photos, size: &size 64}\n"
        "masks: {size: *size, recipes: &same {free-form: 1.0}}\n"
        "model: &small {preset: tiny}\n",
        "utf-8",
    )
    config = load_config(str(path), ["images.name=other"])
    assert (config.images.size, config.masks.size, config.model.preset) == (64, 64, "tiny")
    values = read_yaml("a: &x {list: [1], deep: {b: 1}}\nc: *x\nd: [*x]\n")
    values["c"]["list"].append(2)
    values["d"][0]["deep"]["b"] = 3
    assert values["a"] == {"list": [1], "deep": {"b": 1}}


def test_a_merge_key_gives_values_that_own_keys_replace() -> None:
    text = "x: &x {a: 1, b: 1}\ny: &y {b: 2, c: 2}\nz: {c: 3, <<: [*x, *y]}\n"
    assert read_yaml(text)["z"] == {"a": 1, "b": 1, "c": 3}


def test_aliases_that_multiply_are_refused_in_one_sentence(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines), "utf-8")
    with pytest.raises(ConfigError, match=rf"has more than {MAX_VALUES:,} values.*fewer aliases"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a\n  b: *a\n", r"alias at line 1 inside the value that it names"),
        ("a: *nothing\n", r"at line 1: found undefined alias"),
        ("[" * 5_000, r"nested too deep"),
        ("a: b\nday: 2021-13-45\n", r"at line 2: '2021-13-45' is no timestamp"),
        ("a: !!int x\n", r"is not valid YAML at line 1"),
        ("a: !!float x\n", r"is not valid YAML at line 1"),
        ("a: !!bool maybe\n", r"is not valid YAML at line 1"),
        ("a: !!timestamp x\n", r"is not valid YAML at line 1"),
        (f"a: {'9' * 5_000}\n", r"is not valid YAML at line 1"),
        ("a: !!set {x, x}\n", r"the tag tag:yaml.org,2002:set is unknown"),
        ("? [a, b]\n: c\n", r"a key that is not text at line 1"),
        ("a: 1\n2020: 3\n", r"a key that is not text at line 2"),
        ("a: 1\nb: \x00\n", r"is not valid YAML at line 2"),
        ("a: 1\n---\nb: 2\n", r"is not valid YAML at line 2"),
        ("a: 1\n<<: 3\n", r"merges something else than a section at line 2"),
    ],
)
def test_text_that_is_no_yaml_is_refused_in_one_sentence(text: str, expected: str) -> None:
    with pytest.raises(YamlError, match=expected) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)


def test_only_true_and_false_are_booleans() -> None:
    assert read_yaml("[off, yes, true, False]") == ["off", "yes", True, False]
    assert read_yaml("") is None
