"""A secret that a user gives to any input reaches no output and no file of the root."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from image_sets import picture
from secret_forms import forms

from dpnet.cli import main as cli

SECRET = 'hunter2/"must not"+be<seen>'  # every encoding changes it
ADDRESS = f"me:{quote(SECRET, safe='')}@127.0.0.1:9"
# What a user can write in an address or an option.
PLAIN = "hunter2-must-not-be-seen"
AT = f"http://me:{PLAIN}@127.0.0.1:9/x?token={PLAIN}"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_ENDPOINT_URL": f"http://{ADDRESS}",
    "AWS_EC2_METADATA_DISABLED": "true",
    "DPNET_ALERT_URL": f"http://127.0.0.1:9/services/{PLAIN}",
    "DPNET_REPORTS_PASSWORD": f"me:{SECRET}",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "MLFLOW_TRACKING_URI": f"http://{ADDRESS}",
    "PREFECT_API_AUTH_STRING": f"me:{SECRET}",
    "PREFECT_API_URL": "http://127.0.0.1:9/api",
    "RAY_AUTH_TOKEN": SECRET,
}


def seen(text: str) -> list[str]:
    """Return the forms of a secret that a text contains."""
    return [form for secret in (SECRET, PLAIN) for form in forms(secret) if form in text]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder of a user with secrets in the environment."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "")  # `up --database` sets it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    picture(9).save(tmp_path / "mask.png")
    (tmp_path / "list.txt").write_text(f"photos/1.png\n{AT}\n")
    config = (
        f"name: mine\nimages: {{source: photos, size: 32}}\nregister: {{tracking_uri: '{AT}'}}\n"
    )
    (tmp_path / "mine.yaml").write_text(config)
    (tmp_path / "wrong.yaml").write_text(f"{config}train: {{init_from: '{AT}', steps: '{AT}'}}\n")
    return tmp_path


SMALL = ["--set", "size=32", "--set", "name=set", "--set", "workers=1"]
COMMANDS = [
    ["images", "build", AT, "--root", "root", *SMALL],
    ["images", "build", f"s3://me:{PLAIN}@bucket/x", "--root", "root", *SMALL],
    ["images", "build", f"photos?token={PLAIN}", "--root", "root", *SMALL],
    ["images", "build", "list.txt", "--root", "root", *SMALL],
    ["images", "build", "photos", "--root", AT, *SMALL],
    ["images", "build", "photos", "--root", f"s3://me:{PLAIN}@bucket/x", *SMALL],
    ["images", "build", "photos", "--root", "root", *SMALL, "--set", f"layout={AT}"],
    ["images", "build", "photos", "--root", "root", *SMALL],
    ["masks", "build", "--root", "root", "--set", f"source={AT}"],
    ["images", "inspect", AT, "--root", "root"],
    ["verify", AT],
    ["verify", "root", AT],
    ["inpaint", AT, "mask.png", "-o", "out.png", "--root", "root"],
    ["inpaint", "photos/1.png", "mask.png", "-o", "out.png", "--model", AT, "--root", "root"],
    ["export", AT, "-o", "out", "--root", "root"],
    ["train", "mine.yaml", "--root", "root", "--set", f"train.init_from={AT}"],
    ["train", "wrong.yaml", "--root", "root"],
    ["evaluate", "mine.yaml", "--root", "root", "--set", f"launch.address={AT}"],
    ["register", "mine.yaml", "--root", "root", "--set", f"password={PLAIN}"],
    ["pipeline", "run", "mine.yaml", "--root", "root", "--set", f"register.tracking_uri={AT}"],
    ["pipeline", "run", AT, "--root", "root"],
    ["deploy", "--root", "root", "--set", f"register.tracking_uri={AT}"],
    ["deploy", AT, "--root", "root"],
    ["notify", "mine.yaml", "--root", "root"],
    ["notify", "mine.yaml", "--root", f"s3://me:{PLAIN}@bucket/x"],
    ["up", "--root", "root", "--database", f"mysql://me:{PLAIN}@127.0.0.1:9/x"],
    ["up", "--root", f"s3://me:{PLAIN}@bucket/x"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_a_secret_in_any_input_reaches_no_output_and_no_file(
    words: list[str], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    try:
        status = cli.main([*words, "--debug"])
    except SystemExit as wrong:
        status = int(str(wrong.code))
    out, err = capfd.readouterr()
    is_sound = words == ["images", "build", "photos", "--root", "root", *SMALL]
    assert (status == 0) == is_sound, err
    assert out + err
    assert seen(out) == []
    assert seen(err) == []
    for path in place.rglob("*"):
        if path.is_file() and path not in given:
            assert seen(path.read_bytes().decode("latin-1")) == [], path


def test_the_search_finds_each_form() -> None:
    for form in forms(SECRET):
        assert seen(f"<{form}>")
