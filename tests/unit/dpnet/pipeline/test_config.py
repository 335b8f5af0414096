"""Configs: packaged ones, overrides, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.paths import NAME, NAME_IN_WORDS
from dpnet.pipeline.config import (
    Config,
    config_of_source,
    load_config,
    overrides_of,
    packaged_configs,
    resolve_root,
)


def message(config: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.fixture
def written(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


def test_the_package_has_a_config_for_the_demo_and_each_data_set_of_the_paper() -> None:
    assert packaged_configs() == ["celeba-hq", "demo", "paris-street-view", "places2"]


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_loads_and_has_the_name_of_its_file(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.images.size == config.masks.size


@pytest.mark.parametrize("name", ["celeba-hq", "paris-street-view", "places2"])
def test_the_configs_of_the_papers_data_sets_train_base_at_256_pixels(name: str) -> None:
    config = load_config(name)
    assert (config.images.size, config.model.preset) == (256, "base")


def test_an_override_changes_one_option_and_the_last_one_counts() -> None:
    config = load_config("demo", ["train.steps=10", "train.steps=11", "name=mine"])
    assert (config.train.steps, config.name) == (11, "mine")
    assert config.train.batch_size == load_config("demo").train.batch_size


def test_an_override_is_read_as_yaml_in_which_off_is_a_word() -> None:
    config = load_config("demo", ["images.dedupe=off", "losses.vgg_weights=null", "name='1'"])
    assert config.images.dedupe == "off"
    assert config.losses.vgg_weights is None
    assert config.name == "1"


def test_a_number_may_be_written_with_an_exponent_and_no_point() -> None:
    assert load_config("demo", ["train.learning_rate=2e-4"]).train.learning_rate == 2e-4


def test_sections_that_a_file_leaves_out_have_their_defaults(written) -> None:  # type: ignore[no-untyped-def]
    config = load_config(written("name: mine\nimages: {source: photos}\ntrain:\n"))
    assert config.images.source == "photos"
    assert config.registry.model == "dpnet"


def test_the_config_is_saved_and_read_back_the_same() -> None:
    config = load_config("demo")
    again = Config.model_validate(config.model_dump(mode="json", by_alias=True))
    assert again == config


def test_a_misspelt_option_names_the_nearest_one() -> None:
    assert "train.stepz is not an option: the nearest is train.steps." in message(
        "demo", "train.stepz=1"
    )


def test_an_option_in_the_wrong_section_names_the_right_one() -> None:
    assert "the nearest is train.steps" in message("demo", "steps=1")


def test_an_option_unlike_any_lists_those_of_its_section() -> None:
    text = message("demo", "register.zzz=1")
    assert "register.zzz is not an option: the options here are register.model" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=0", "train.steps is 0: it must be a whole number of at least 1"),
        ("train.steps=many", 'train.steps is "many": it must be a whole number of at least 1'),
        ("train.learning_rate=-1", "it must be a number above 0 and at most 1"),
        ("model.preset=huge", 'model.preset is "huge": it must be one of tiny, base, large'),
        ("train.gpus=maybe", 'train.gpus is "maybe": it must be true or false'),
        ("train=5", "train is 5: it must be a section with the options steps, "),
        ("name=a/b", "it must be text of length 60 at most and made of letters (a-z)"),
        ("masks.recipes={circles: 1}", "'circles' is not a mask recipe: choose from free-form"),
    ],
)
def test_the_error_for_a_value_out_of_range_names_option_and_range(
    override: str, expected: str
) -> None:
    assert expected in message("demo", override)


@pytest.mark.parametrize("option", ["name", "images.name", "masks.name", "register.model"])
def test_the_error_about_a_name_says_in_words_what_a_name_may_hold(option: str) -> None:
    text = message("demo", f"{option}='my photos'")
    assert f'{option} is "my photos": it must be text of length' in text
    assert text.endswith(f"made of {NAME_IN_WORDS}.")


def test_no_error_of_the_config_shows_a_pattern_of_a_program() -> None:
    patterns = {
        rule.pattern
        for model in (Config, *(f.annotation for f in Config.model_fields.values()))
        if hasattr(model, "model_fields")
        for field in model.model_fields.values()
        for rule in field.metadata
        if getattr(rule, "pattern", None)
    }
    assert patterns == {NAME}  # which has words


def test_several_mistakes_give_the_first_one_and_a_count() -> None:
    text = message("demo", "train.steps=0", "train.seed=-1")
    assert "train.steps is 0" in text
    assert "(1 more after this one)" in text


def test_a_misspelt_section_is_reported_before_a_missing_option(written) -> None:  # type: ignore[no-untyped-def]
    text = message(written("name: a\nimagse: {source: b}\nmasks: {name: c}\n"))
    assert "imagse is not an option: the nearest is images" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian=3", "trian is not an option: the nearest is masks.train."),
        ("trian={steps: 3}", "trian is not an option: the nearest is train."),
        ("size=3", "size is not an option: the nearest are images.size, masks.size."),
        ("masks.zzzz=3", "masks.zzzz is not an option: the options here are masks.name, "),
    ],
)
def test_a_value_is_meant_for_an_option_and_a_mapping_for_a_section(
    override: str, expected: str
) -> None:
    assert expected in message("demo", override)


def test_a_command_that_builds_one_section_sets_its_options_without_the_section() -> None:
    given = ["train=7", "size=48", "name=mine", "root=/r", "images.val=0.2"]
    config = load_config("demo", overrides_of("masks", given))
    assert (config.masks.train, config.masks.size, config.images.size) == (7, 48, 48)
    assert (config.name, config.masks.name, config.root) == ("demo", "mine", "/r")
    assert load_config("demo", overrides_of("images", ["mode=keep"])).images.mode == "keep"


@pytest.mark.parametrize("section", ["images", "masks"])
@pytest.mark.parametrize("size", ["-3", "5", "wide", "{}"])
def test_one_wrong_size_is_one_mistake(section: str, size: str) -> None:
    text = message("demo", *overrides_of(section, [f"size={size}"]))
    assert text.startswith(f"demo: {section}.size is ")
    assert "more after this one" not in text


def test_images_and_masks_of_different_size_are_refused() -> None:
    assert "images.size is 64 but masks.size is 32" in message("demo", "masks.size=32")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "a=[1"])
def test_an_override_without_option_and_value_is_refused(override: str) -> None:
    assert "--set" in message("demo", override)


def test_an_unknown_config_lists_the_packaged_ones_and_the_nearest() -> None:
    text = message("places")
    assert "celeba-hq, demo, paris-street-view, places2" in text
    assert "the nearest is places2" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name: [", "is not valid YAML at line 1"),
        ("", "holds no options"),
        ("- a", "holds no options"),
        ("name: mine", "images.source is missing"),
        ("!!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_the_error_for_an_invalid_file_says_why(written, content: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    assert expected in message(written(content))


def test_the_errors_for_a_binary_file_and_a_folder_say_why(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in message(str(tmp_path / "binary.yaml"))
    assert f"'{tmp_path}' is a folder, but this command needs a config: give a packaged" in message(
        str(tmp_path)
    )


def test_the_root_is_the_option_or_the_environments_or_the_configs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["root=of-config"])
    monkeypatch.setenv("DPNET_ROOT", "s3://bucket/of-environment")
    assert resolve_root("given", config) == str(tmp_path / "given")
    assert resolve_root(None, config) == "s3://bucket/of-environment"
    monkeypatch.delenv("DPNET_ROOT")
    assert resolve_root(None, config) == str(tmp_path / "of-config")


@pytest.mark.parametrize("root", ["S3://bucket//of-option/", "s3://bucket/of-option"])
def test_the_root_and_the_source_have_one_form(root: str, tmp_path: Path) -> None:
    config = load_config("demo")
    assert resolve_root(root, config) == "s3://bucket/of-option"
    assert resolve_root(f"file:{tmp_path}", config) == str(tmp_path)
    assert config_of_source(root).images.source == "s3://bucket/of-option"


def test_the_error_without_a_root_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPNET_ROOT", raising=False)
    with pytest.raises(ConfigError, match="--root DIR, DPNET_ROOT or the config"):
        resolve_root(None, load_config("places2"))


def test_an_endless_file_is_refused(written) -> None:  # type: ignore[no-untyped-def]
    assert message(written("#" * ((1 << 20) + 1))).endswith(
        "has more than 1048576 characters: give a YAML file."
    )
    if Path("/dev/zero").exists():
        assert message("/dev/zero").endswith("has more than 1048576 characters: give a YAML file.")
