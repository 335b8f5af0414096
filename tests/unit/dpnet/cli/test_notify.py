"""`dpnet notify`: which notifications concern a config, and what it sends to Prefect."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from image_sets import photographs
from prefect.context import refresh_global_settings_context

from data_prep.core.errors import PipelineError
from data_prep.raw.bucket_events import new_object_uris, uris_below
from dpnet.cli.commands import pipeline
from dpnet.cli.parser import build_parser
from flows.run_from_command import QUIET


def notification(*uris: str) -> str:
    """Return the notification of S3 about new objects."""
    records = []
    for uri in uris:
        bucket, _, key = uri.partition("/")
        about = {"bucket": {"name": bucket}, "object": {"key": key, "size": 5}}
        records.append({"eventName": "ObjectCreated:Put", "s3": about})
    return json.dumps({"Records": records})


@pytest.fixture
def config(tmp_path: Path) -> str:
    photographs(tmp_path / "photos", 6)
    path = tmp_path / "own.yaml"
    path.write_text(
        f"name: own\nroot: {tmp_path / 'root'}\n"
        f"images: {{source: {tmp_path / 'photos'}, name: own, size: 32}}\nmasks: {{size: 32}}\n"
    )
    return str(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DPNET_ROOT", raising=False)
    for name, value in QUIET.items():  # so that the test undoes what the command sets
        monkeypatch.setenv(name, value)
    use_api(monkeypatch, 9)  # no server listens there
    yield
    monkeypatch.undo()
    refresh_global_settings_context()


def use_api(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    refresh_global_settings_context()


def notify(*argv: str) -> tuple[dict[str, Any], str]:
    return pipeline.notify(build_parser().parse_args(["notify", *argv]))


def test_the_keys_of_a_notification_are_decoded() -> None:
    text = notification("bucket/my+photos/caf%C3%A9+1.png", "bucket/a%2Bb.png")
    assert new_object_uris(text) == ["s3://bucket/my photos/café 1.png", "s3://bucket/a+b.png"]


def test_an_event_that_never_ends_is_refused(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PipelineError, match="--event /dev/zero has more than 16777216 bytes"):
        notify(config, "--event", "/dev/zero")
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=endless))
        with pytest.raises(PipelineError, match="--event - has more than 16777216 bytes"):
            notify(config, "--event", "-")


def test_only_objects_in_the_source_concern_a_config() -> None:
    uris = ["s3://b/photos/1.png", "s3://b/photos-old/1.png", "s3://b/x.tar", "s3://c/photos/1.png"]
    assert uris_below(uris, "s3://b/photos/") == ["s3://b/photos/1.png"]
    assert uris_below(uris, "s3://b/x.tar") == ["s3://b/x.tar"]
    assert uris_below(uris, "/data/photos") == []

    assert uris_below(uris, "S3://b//photos/") == ["s3://b/photos/1.png"]
    assert len(uris_below(uris, "s3://b")) == 3
    assert uris_below(["s3://b//photos/1.png"], "s3://b/photos") == []  # another object


TEST = '{"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"}'


def wrapped_by(how: str, text: str) -> str:
    """Return a notification as a service of AWS passes it on."""
    sns = {"Type": "Notification", "MessageId": "1", "TopicArn": "arn", "Message": text}
    bodies = {
        "S3": json.loads(text),
        "SNS": sns,
        "SNS to Lambda": {"Records": [{"EventSource": "aws:sns", "Sns": sns}]},
        "SQS": {"Messages": [{"MessageId": "1", "Body": text}]},
        "SQS, one message": {"MessageId": "1", "Body": text},
        "SQS to Lambda": {"Records": [{"eventSource": "aws:sqs", "body": text}]},
        "SNS to SQS": {"Messages": [{"Body": json.dumps(sns)}]},
    }
    return json.dumps(bodies[how])


WRAPPERS = ["S3", "SNS", "SNS to Lambda", "SQS", "SQS, one message", "SQS to Lambda", "SNS to SQS"]


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_notification_may_be_wrapped(how: str) -> None:
    text = notification("bucket/my+photos/1.png", "bucket/2.png")
    uris = ["s3://bucket/my photos/1.png", "s3://bucket/2.png"]
    assert new_object_uris(wrapped_by(how, text)) == uris
    assert new_object_uris(wrapped_by(how, TEST)) == []
    with pytest.raises(PipelineError, match="not an S3 notification"):
        new_object_uris(wrapped_by(how, '{"Records": [{"dynamodb": {}}]}'))


@pytest.mark.parametrize(
    "detail",
    [
        {"bucket": {"name": "b"}, "object": {"key": "a+b%20c.png", "size": 5}},
        {"eventName": "PutObject", "requestParameters": {"bucketName": "b", "key": "a+b%20c.png"}},
    ],
)
def test_the_keys_of_eventbridge_are_not_encoded(detail: dict[str, Any]) -> None:
    event = {"version": "0", "source": "aws.s3", "detail-type": "Object Created", "detail": detail}
    assert new_object_uris(json.dumps(event)) == ["s3://b/a+b%20c.png"]
    by_sqs = json.dumps({"Messages": [{"Body": json.dumps(event)}]})
    assert new_object_uris(by_sqs) == ["s3://b/a+b%20c.png"]


def test_a_test_notification_of_s3_has_no_object() -> None:
    assert new_object_uris(TEST) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"Records": 5}',
        "5",
        "null",
        '"s3"',
        '{"Message": "You have chosen to subscribe to the topic"}',
        '{"Message": 5}',
        '{"detail": {"bucket": {}}}',
        '{"detail": {"bucket": {"name": "b"}, "object": {"key": 5}}}',
        '{"detail": null}',
        '{"Messages": [5]}',
        "[" * 100_000,
        '{"Records": [{}]}',
        '{"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": 5}}}]}',
        b"\xff\xfe",
    ],
)
def test_other_text_is_not_a_notification(text: str | bytes) -> None:
    with pytest.raises(PipelineError, match=r"not an S3 notification\. Give the JSON"):
        new_object_uris(text)


def test_the_event_goes_to_the_server_of_the_root_if_no_other_is_configured(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[str | None] = []

    def look(*given: Any, **options: Any) -> dict[str, Any]:
        servers.append(os.environ.get("PREFECT_API_URL"))
        return {"dataset": "own", "announced": False, "reason": "It is a test."}

    def running(root: str) -> SimpleNamespace:
        return SimpleNamespace(api_url=f"http://up-of-{Path(root).name}/api")

    monkeypatch.setattr("flows.run_from_command.watch_now", look)
    monkeypatch.setattr("flows.local_server.up.find_running", running)
    notify(config)
    monkeypatch.delenv("PREFECT_API_URL")
    notify(config)
    assert servers == ["http://127.0.0.1:9/api", "http://up-of-root/api"]


def test_an_event_about_other_objects_does_nothing(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = notification("elsewhere/photos/1.png").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(event)))
    result, text = notify(config, "--event", "-")
    assert (result["ok"], result["announced"]) == (True, False)
    assert "no object of the event is in" in text
    assert not (tmp_path / "root").exists()


def test_a_missing_event_file_is_an_error(config: str) -> None:
    with pytest.raises(PipelineError, match=r"--event none\.json cannot be read: No such file"):
        notify(config, "--event", "none.json")


def test_a_missing_server_is_an_error_and_nothing_is_remembered(
    config: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"127\.0\.0\.1:9/api cannot be reached"):
        notify(config)
    assert not list((tmp_path / "root").rglob("watch.json"))


@pytest.mark.parametrize("option", [["--min-new", "-1"], ["--quiet-minutes", "soon"]])
def test_an_option_out_of_range_is_wrong_usage(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        notify("demo", *option)
    assert "is not a number of" in capsys.readouterr().err


class Api(BaseHTTPRequestHandler):
    """The part of Prefect's API that the command uses; `refuses` is the status for events or 0."""

    events: list[dict[str, Any]]
    refuses: int

    def do_GET(self) -> None:
        known = "csrf-token" not in self.path  # a server without that protection
        self._answer(200 if known else 404, b"true")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.refuses:
            self.events += body
        self._answer(self.refuses or 204)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_a_change_is_sent_once_and_again_only_if_sending_failed(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Api.events, Api.refuses = [], 403
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        use_api(monkeypatch, server.server_port)
        with pytest.raises(PipelineError, match=r"dpnet\.raw-data\.changed: status 403"):
            notify(config)
        Api.refuses = 0
        assert "no event sent. 6 of 7 new images" in notify(config, "--min-new", "7")[1]
        assert Api.events == []
        sent, text = notify(config)
        assert text == "own: event sent to Prefect. 6 new, 0 changed and 0 removed images in all."
        assert "It was announced before." in notify(config)[1]
        notify(config, "--again")
        server.shutdown()
    assert (sent["announced"], sent["new"]) == (True, 6)
    first, second = Api.events
    assert first["event"] == "dpnet.raw-data.changed"
    assert first["resource"] == {
        "prefect.resource.id": "dpnet.dataset.own",
        "prefect.resource.name": "own",
    }
    assert first["payload"]["digest"] == sent["digest"]
    assert set(first["payload"]) == {
        "dataset", "digest", "new", "changed", "removed", "version", "root",
    }  # fmt: skip
    assert second["payload"] == first["payload"]
