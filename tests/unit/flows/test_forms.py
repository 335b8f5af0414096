"""The forms of the Prefect UI: options of the config, in a schema that the UI can show."""

from __future__ import annotations

import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from dpnet.pipeline.config import Config, load_config
from flows.deployments import DeploySettings, deployments
from flows.forms import SECTIONS, overrides_of

FLOWS = [each.flow() for each in deployments(DeploySettings())]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_the_range_and_the_description_of_the_config(section: str) -> None:
    known = Config.model_fields[section].annotation
    assert known is not None
    form = SECTIONS[section].model_json_schema()["properties"]
    options = known.model_json_schema()["properties"]
    assert form
    for option, field in form.items():
        (choice,) = [
            c for c in options[option].get("anyOf", [options[option]]) if c.get("type") != "null"
        ]
        for rule in ("type", "minimum", "maximum", "exclusiveMaximum", "enum", "pattern"):
            assert field.get(rule) == choice.get(rule), (option, rule)
        assert field["description"] == options[option]["description"]


@pytest.mark.parametrize("section", SECTIONS)
def test_fields_are_ordered_and_simple_and_may_be_empty(section: str) -> None:
    schema = SECTIONS[section].model_json_schema()
    fields = schema["properties"].values()
    assert [field["position"] for field in fields] == list(range(len(fields)))
    assert not any("anyOf" in field or "default" in field for field in fields)
    assert "required" not in schema


@pytest.mark.parametrize("section", SECTIONS)
def test_no_field_is_a_checkbox_because_an_untouched_one_sends_false(section: str) -> None:
    fields = SECTIONS[section].model_json_schema()["properties"].values()
    assert "boolean" not in [field["type"] for field in fields]


def test_a_filled_field_changes_the_config_and_an_empty_field_does_not() -> None:
    images = SECTIONS["images"](source="/data/a b: c", size=128)
    train = SECTIONS["train"](steps=7)
    given = overrides_of(images=images, train=train, evaluate=SECTIONS["evaluate"]())
    config = load_config("demo", [*given, "masks.size=128"])
    before = load_config("demo")
    assert (config.images.source, config.images.size) == ("/data/a b: c", 128)
    assert config.train == before.train.model_copy(update={"steps": 7})
    assert config.evaluate == before.evaluate


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": "many"}, {"step": 1}])
def test_a_wrong_value_or_an_unknown_name_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SECTIONS["train"].model_validate(wrong)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_flow_and_each_of_its_parameters_has_a_description(flow) -> None:  # type: ignore[no-untyped-def]
    assert flow.description.splitlines()[0].endswith(".")
    schema = parameter_schema(flow)
    properties = schema.properties
    for name, field in properties.items():
        form = schema.definitions.get(field.get("$ref", "").rpartition("/")[2], {})
        assert field.get("description") or form.get("description"), name
    assert list(properties)[:2] == ["config", "root"]
