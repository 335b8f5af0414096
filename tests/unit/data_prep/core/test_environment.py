"""Environment variables with stray characters are refused by name, without their value."""

from __future__ import annotations

import pytest

from data_prep.core.environment import _FORMS, ALL, S3, wrong_variable
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
    names = [name for name in ALL if name not in _FORMS]
    assert wrong_variable(ALL, dict.fromkeys(names, value)) == ""


GOOD = {
    "AWS_ENDPOINT_URL": ["http://127.0.0.1:9000", "https://s3.example.com", "http://[::1]:9000"],
    "AWS_ENDPOINT_URL_S3": ["https://s3.example.com/"],
    "DPNET_ALERT_URL": ["https://hooks.slack.com/services/x", "mailto://me:secret@example.com"],
    "DPNET_REPORTS_URL": ["http://reports:8000"],
    "PREFECT_API_URL": ["http://127.0.0.1:4200/api", "HTTPS://prefect.example.com/api"],
    "MLFLOW_TRACKING_URI": [
        "http://mlflow:5000", "sqlite:////data/mlflow.db", "postgresql+psycopg2://host/db",
        "databricks", "databricks://profile", "file:///data/mlruns", "./mlruns",
    ],
    "RAY_ADDRESS": ["auto", "local", "head:6379", "[::1]:6379", "ray://head:10001", "http://h:8265"],
    "RAY_API_SERVER_ADDRESS": ["http://head:8265"],
    "DPNET_SERVE_URL": ["https://fill.example.com", "http://127.0.0.1:8400"],
}  # fmt: skip
BAD = {
    "AWS_ENDPOINT_URL": ["127.0.0.1:9000", "localhost", "s3://bucket", "http://", "http:/host"],
    "AWS_ENDPOINT_URL_S3": ["s3.example.com"],
    "DPNET_ALERT_URL": ["hooks.slack.com/services/x"],
    "DPNET_REPORTS_URL": ["reports:8000"],
    "PREFECT_API_URL": ["127.0.0.1:4200/api", "localhost:4200"],
    "MLFLOW_TRACKING_URI": ["localhost:5000", "127.0.0.1:5000/", "htp://mlflow:5000", "http://"],
    "RAY_ADDRESS": ["head", "htp://head:8265"],
    "RAY_API_SERVER_ADDRESS": ["head:8265"],
    "DPNET_SERVE_URL": ["fill.example.com", "127.0.0.1:8400"],
}


def test_every_address_has_good_and_bad_examples() -> None:
    assert set(GOOD) == set(BAD) == set(_FORMS)
    assert set(_FORMS) <= set(ALL)


@pytest.mark.parametrize(("name", "value"), [(n, each) for n in GOOD for each in GOOD[n]])
def test_an_address_of_the_right_form_is_accepted(name: str, value: str) -> None:
    assert wrong_variable(ALL, {name: value}) == ""


@pytest.mark.parametrize(("name", "value"), [(n, each) for n in BAD for each in BAD[n]])
def test_an_address_of_a_wrong_form_is_one_sentence_by_the_name_of_the_variable(
    name: str, value: str
) -> None:
    sentence = wrong_variable(ALL, {name: value})
    assert sentence.startswith(f"{name} cannot be used: set it to ")
    secret = f"hunter2:{value}"
    assert "hunter2" not in wrong_variable(ALL, {name: secret})


def test_the_command_says_how_to_write_the_address_of_an_s3_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    assert cli.main(["verify", "s3://bucket/root"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "dpnet: AWS_ENDPOINT_URL cannot be used: set it to an address that begins with http:// or"
        " https://, such as http://127.0.0.1:9000, or unset it.\n"
    )


@pytest.mark.parametrize("name", S3)
def test_s3_is_not_asked_with_a_stray_character(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hush-hush\n")
    with pytest.raises(StorageError, match=f"{name} has a line break"):
        new_client()


def test_the_command_and_the_exporter_refuse_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "dpnet:hush-hush\n")
    assert cli.main(["verify", "."]) == 2
    assert exporter.main(["."]) == 2
    err = capsys.readouterr().err
    assert err.count("dpnet: PREFECT_API_AUTH_STRING has a line break") == 2
    assert "hush-hush" not in err
