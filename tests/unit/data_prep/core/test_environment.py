"""Environment variables with stray characters are refused by name, without their value."""

from __future__ import annotations

import pytest

from data_prep.core.environment import ALL, S3, wrong_variable
from data_prep.core.errors import StorageError
from data_prep.core.storage.s3_requests import new_client
from dpnet.cli import main as cli
from dpnet.pipeline import exporter


@pytest.mark.parametrize("value", ["hush-hush\n", "\thush-hush", "hush-hush ", "hush\r\nhush"])
@pytest.mark.parametrize("name", ALL)
def test_a_stray_character_is_reported_by_the_name_of_the_variable(name: str, value: str) -> None:
    sentence = wrong_variable(ALL, {name: value, "PATH": "/bin\n"})
    assert sentence.startswith(f"{name} has a line break, or a blank at an end")
    assert "hush" not in sentence


@pytest.mark.parametrize("value", ["", "hush-hush", "with a blank", "/photos/\udce9t\xa0\u00e9"])
def test_other_values_are_accepted(value: str) -> None:
    assert wrong_variable(ALL, dict.fromkeys(ALL, value)) == ""


@pytest.mark.parametrize("name", S3)
def test_s3_is_not_asked_with_a_stray_character(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hush-hush\n")
    with pytest.raises(StorageError, match=f"{name} has a line break"):
        new_client()


def test_the_command_and_the_exporter_refuse_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "dpnet:hush-hush\n")
    assert cli.main(["verify", "."]) == 1
    assert exporter.main(["."]) == 1
    err = capsys.readouterr().err
    assert err.count("dpnet: PREFECT_API_AUTH_STRING has a line break") == 2
    assert "hush-hush" not in err
