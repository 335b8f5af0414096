"""Credentials do not reach a text that others can see."""

from __future__ import annotations

import base64
import json
import logging
import pickle
from urllib.parse import quote, quote_plus

import pytest

from data_prep.core.errors import ConfigError, PipelineError, StorageError
from data_prep.core.logs import Forward, PrintableLines
from data_prep.core.redact import has_credentials, redact

SECRET = "hunter2/p@ss word"
BASIC = base64.b64encode(b"me:hunter2hunter2").decode()
TEXTS = [
    "http://me:hunter2@mlflow:5000/x",
    "http://me:hunter2@mlflow:5000/x and http://you:hunter2@other",
    "http://hunter2@mlflow:5000",
    "postgresql+asyncpg://me:hunter2@db/p",
    "postgresql://me:h@hunter2@db/p",
    "postgresql://me:a/hunter2@db/p",
    "mailto://me:hunter2@mail.example",
    "/home/me/http:/me:hunter2@h/x",
    "http:/hunter2@h/x",
    "postgresql+asyncpg:/me:hunter2@db/p",
    "s3:/me:hunter2@bucket/x",
    "https://h/x?token=hunter2&a=1",
    "https://h/x?a=1&access_token=hunter2#top",
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
    "https://b/k?AWSAccessKeyId=hunter2&Signature=hunter2",
    "https://h/x?next=http%3A%2F%2Fme%3Ahunter2%40mlflow",
    "https://h/x?a=1&sig=hunter2",
    "https://h/x?a=1;key=hunter2",
    "Authorization: Basic aHVudGVyMg== hunter",
    "{'Authorization': 'Bearer hunter2'}",
    "-H authorization:hunter2",
    "env AWS_SECRET_ACCESS_KEY=hunter2 run",
    "PREFECT_API_AUTH_STRING=me:hunter2",
    '{"password": "hunter2", "a": 1}',
]


@pytest.mark.parametrize("text", TEXTS)
def test_credentials_with_a_known_form_are_removed(text: str) -> None:
    shown = redact(text, {})
    assert "hunter2" not in shown
    assert "aHVudGVy" not in shown
    assert redact(shown, {}) == shown
    assert has_credentials(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://me:hunter2@h:1/a b@c", "see http://h:1/a b@c"),
        ("https://h/x?token=hunter2&a=1", "https://h/x?token=***&a=1"),
        ("key AKIAABCDEFGHIJKLMNOP is", "key *** is"),
        (f"Basic {BASIC}", "Basic ***"),
    ],
)
def test_only_the_credentials_are_removed(text: str, shown: str) -> None:
    assert redact(text, {}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/photos/cat@2x.png",
        "http://127.0.0.1:8265/a@b",
        "http://[::1]:8265/a@b.c",
        "s3://bucket/a:b/c",
        "s3:/bucket/a:b@c.jpg",
        "file:/data/a@2x.png",
        "C:/photos/a:b@2x.png",
        "give user@example.org the token: set RAY_AUTH_TOKEN to it",
        "HTTP basic authentication, Basic training",
        "--database postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME",
        "train.steps=10, images.source=/data/photos",
        "The password is missing or wrong",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text, {}) == text


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "RAY_AUTH_TOKEN",
        "PREFECT_API_AUTH_STRING",
        "DPNET_REPORTS_PASSWORD",
    ],
)
def test_secret_values_of_the_environment_are_removed_in_every_form(name: str) -> None:
    encoded = base64.b64encode(SECRET.encode()).decode()
    for form in (SECRET, quote(SECRET, safe=""), quote_plus(SECRET), encoded):
        assert redact(f"<{form}>", {name: SECRET}) == "<***>"
    assert SECRET in redact(SECRET, {"SOMETHING_ELSE": SECRET})
    high = "\u00ff\u00fe>>>???~~~"
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert redact(f"<{encode(high.encode()).decode()}>", {name: high}) == "<***>"
    odd = "hun\"ter'2\\ password"
    assert redact(json.dumps({"a": odd}), {name: odd}) == '{"a": "***"}'
    assert redact(repr([odd, 1]), {name: odd}) == "['***', 1]"


def test_a_password_is_removed_without_its_user_too() -> None:
    environ = {"PREFECT_API_AUTH_STRING": "me:long-secret"}
    assert redact("it was long-secret", environ) == "it was ***"


def test_the_password_of_an_address_in_the_environment_is_removed_from_other_texts() -> None:
    environ = {"MLFLOW_TRACKING_URI": f"http://me:{quote(SECRET, safe='')}@127.0.0.1:5000"}
    for form in (SECRET, quote(SECRET, safe="")):
        assert redact(f"refused: {form}", environ) == "refused: ***"
    assert redact("port 5000", {"PROXY": "http://h:5000/a@b"}) == "port 5000"


def test_the_path_of_a_webhook_is_its_password() -> None:
    environ = {"DPNET_ALERT_URL": "https://hooks.slack.com/services/T0/B0/XYZ"}
    assert "XYZ" not in redact("json://hooks.slack.com/services/T0/B0/XYZ?a=b", environ)


def test_words_and_paths_are_not_taken_for_secrets() -> None:
    environ = {"MY_TOKEN": "train", "RAY_AUTH_TOKEN": "/root/.ray/auth_token"}
    assert redact("train: /root/.ray/auth_token", environ) == "train: /root/.ray/auth_token"


@pytest.mark.parametrize("kind", [PipelineError, ConfigError, StorageError])
def test_the_message_of_every_error_of_ours_is_redacted(kind: type[PipelineError]) -> None:
    error = kind("http://me:hunter2@h refused")
    assert str(error) == "http://h refused"
    assert str(pickle.loads(pickle.dumps(error))) == "http://h refused"


def test_logs_and_tracebacks_are_redacted() -> None:
    sent: list[tuple[int, str, str]] = []
    logger = logging.getLogger("test-redact")
    logger.addHandler(Forward(lambda *record: sent.append(record)))
    try:
        raise ValueError("http://me:hunter2@h")
    except ValueError:
        logger.exception("at %s", "http://me:hunter2@h")
    ((_, _, text),) = sent
    assert "hunter2" not in text
    assert "ValueError: http://h" in text
    assert isinstance(logger.handlers[0].formatter, PrintableLines)
