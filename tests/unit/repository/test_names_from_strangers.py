"""Names from archives and file systems cannot write to a terminal, a log or a page."""

from __future__ import annotations

import io
import json
import tarfile
import time
import traceback
import unicodedata
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_root
from image_sets import picture
from PIL import Image
from prometheus_client import CollectorRegistry, generate_latest

from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.progress import Moment
from data_prep.core.storage.local import LocalStore
from data_prep.core.text import html_text, markdown_code, markdown_table, markdown_text, printable
from dpnet.cli import main as cli
from dpnet.pipeline.exporter import RootCollector
from flows import flow_run, run_page

# Clears the screen, forges a line, turns letters around, ends a line for some readers.
EVIL = "a\x1b[2J\r\ndpnet: all is well\u202egpj\x9b1m\u2028x.png"


def shown(text: str) -> bool:
    """Return whether a text has no control but line breaks, and does not contain a forged line."""
    bad = [c for c in text if c != "\n" and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"))]
    bidi = [c for c in text if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "PDF", "RLI")]
    forged = [line for line in text.splitlines() if line.startswith("dpnet: all is well")]
    return not bad and not bidi and not forged


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Return nine photos, one of them with an evil name, and a broken file with such a name."""
    photos = {f"{number}.png": encoded(number) for number in range(8)}
    return {**photos, EVIL: encoded(8), f"broken {EVIL}": encoded(9)[:200]}


def a_folder(top: Path) -> Path:
    (top / "photos").mkdir()
    for name, data in files().items():
        (top / "photos" / name).write_bytes(data)
    (top / "photos" / "lone\udcff\x1b.png").write_bytes(b"nothing")
    return top / "photos"


def a_zip(top: Path) -> Path:
    with zipfile.ZipFile(top / "photos.zip", "w") as archive:
        for name, data in files().items():
            archive.writestr(name, data)
    return top / "photos.zip"


def a_tar(top: Path) -> Path:
    with tarfile.open(top / "photos.tar", "w") as archive:
        for name, data in files().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return top / "photos.tar"


def a_table(top: Path) -> Path:
    table = pa.table({"image": list(files().values()), "path": list(files())})
    pq.write_table(table, top / "photos.parquet")
    return top / "photos.parquet"


def a_list(top: Path) -> Path:
    folder = a_folder(top)
    lines = [json.dumps({"path": f"photos/{path.name}"}) for path in folder.glob("*.png")]
    lines.append(json.dumps({"path": f"photos/gone {EVIL}"}))
    (top / "list.jsonl").write_text("\n".join(line for line in lines if "udcff" not in line))
    return top / "list.jsonl"


def build(place: Path, root: str, *sets: str) -> int:
    """Run `dpnet images build`; return its exit status."""
    words = ["images", "build", str(place), "--root", root, "--size", "32", "--name", "set"]
    sets = (*sets, "workers=1", "val=0.2", "test=0.2")
    return cli.main([*words, *(word for each in sets for word in ("--set", each))])


@pytest.mark.parametrize("source", [a_folder, a_zip, a_tar, a_table, a_list])
def test_a_build_and_the_commands_after_it_show_evil_names_escaped(
    source: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "root")
    status = build(source(tmp_path), root, "max_failure_ratio=0.5")
    out, err = capfd.readouterr()
    assert status == 0, err
    assert "\\x1b[2J" in err
    at = ["--root", root]
    for command in (
        ["images", "inspect", "set", *at],
        ["images", "log", "set", *at],
        ["verify", root],
    ):
        status = cli.main(command)
        more, errors = capfd.readouterr()
        assert status == 0, errors
        out, err = out + more, err + errors
    assert shown(out)
    assert shown(err)


def test_a_failing_build_shows_evil_names_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build(a_folder(tmp_path), str(tmp_path / "root"), "max_failure_ratio=0") == 1
    _, err = capfd.readouterr()
    assert "\\x1b[2J" in err
    assert shown(err)


def masks(place: Path, root: str) -> int:
    """Run `dpnet masks build` with a folder or an archive of mask files."""
    sets = ("images.size=32", "masks.size=32", "masks.name=holes", "masks.train=4")
    sets += (
        "masks.eval_per_bin=1",
        "masks.external_polarity=white-hole",
        "masks.workers=1",
        f"masks.external={place}",
        "masks.recipes.external=1",
    )
    return cli.main(
        ["masks", "build", "demo", "--root", root]
        + [word for each in sets for word in ("--set", each)]
    )


def a_mask(hole: int) -> bytes:
    file = io.BytesIO()
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:hole] = 255
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("usable", [True, False])
def test_masks_show_evil_names_escaped(
    kind: str, usable: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {f"{hole}.png": a_mask(hole) for hole in range(1, 31) if usable}
    found |= {EVIL: a_mask(5 * usable), f"empty {EVIL}": a_mask(0)}
    if not usable:
        found |= {f"broken {EVIL}": a_mask(6)[:50], f"text {EVIL}": b"nothing"}
    place = tmp_path / {"folder": "masks", "zip": "masks.zip", "tar": "masks.tar"}[kind]
    if kind == "folder":
        place.mkdir()
        for name, data in found.items():
            (place / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name, data in found.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(place, "w") as tar:
            for name, data in found.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    root = str(tmp_path / "root")
    status = masks(place, root)
    out, err = capfd.readouterr()
    assert (status == 0) == usable, err
    if usable:
        for command in (["masks", "inspect", "holes", "--root", root], ["verify", root]):
            assert cli.main(command) == 0
            more, errors = capfd.readouterr()
            out, err = out + more, err + errors
    else:
        assert "\\x1b[2J" in err
    assert shown(out)
    assert shown(err)


def test_labels_of_metrics_show_evil_names_escaped(tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    store = LocalStore(tmp_path)
    status = {"step": 1, "steps": 2, "time": time.time(), "losses": {f"loss{EVIL}": 1.0}}
    store.write(f"runs/{name}/status.json", json.dumps(status).encode())
    store.write(f"registry/{name}/champion.json", b'{"version": 3, "hole_psnr": 24.0}')
    registry = CollectorRegistry()
    registry.register(RootCollector(store))
    text = generate_latest(registry).decode()
    assert text.count("x1b[2J") >= 4
    assert shown(text)
    assert all(line.startswith(("#", "dpnet_")) for line in text.splitlines())


def test_states_and_artifacts_of_prefect_show_evil_names_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError) as caught, flow_run.without_credentials():
        raise ValueError(EVIL)
    assert shown("".join(traceback.format_exception(caught.value)))
    with pytest.raises(ValueError, match="plain"), flow_run.without_credentials():
        raise ValueError("plain")
    published: list[str] = []

    def publish(text: str, key: str, description: str) -> None:
        published.extend([text, description])

    monkeypatch.setattr(run_page, "create_markdown_artifact", publish)
    run_page._publish(f"| a |\n| {EVIL.replace(chr(13) + chr(10), '')} |", "key", EVIL)
    moment = Moment("images", 1, 2, "photos", note=EVIL)
    published.append(run_page.progress_line(moment))
    assert len(published) == 3
    assert all(map(shown, published))


def test_inpaint_shows_evil_names_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = small_root.new_store(tmp_path / "root")
    small_root.champion(store)
    folder = a_folder(tmp_path)
    Image.fromarray(np.zeros((64, 80), np.uint8)).save(tmp_path / "mask.png")
    for image in (folder, folder / f"broken {EVIL}", folder / EVIL):
        cli.main(
            ["inpaint", str(image), str(tmp_path / "mask.png"), "-o", str(tmp_path / f"o{EVIL}"),
             "--root", str(store.folder)]
        )  # fmt: skip
        out, err = capfd.readouterr()
        assert "\\x1b[2J" in out + err
        assert shown(out)
        assert shown(err)


def test_wrong_arguments_are_repeated_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["verify", "root", EVIL])
    err = capfd.readouterr().err
    assert "\\x1b[2J" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("kind", [PipelineError, ItemError])
def test_an_error_is_one_line_that_can_be_shown(kind: type[Exception]) -> None:
    assert str(kind(f"{EVIL} is gone")) == (
        "a\\x1b[2J dpnet: all is well\\u202egpj\\x9b1m\\u2028x.png is gone"
    )


def test_html_and_markdown_cannot_be_broken_by_a_name() -> None:
    name = f"<script>`|[x](y)**{EVIL}"
    for text in (markdown_text(name), markdown_code(name), html_text(name)):
        assert "\x1b" not in text
        assert "\u202e" not in text
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append(tag)  # type: ignore[method-assign]
    parser.feed(html_text(name))
    assert not found
    assert markdown_text("[a](b)|<c>`d`*") == "\\[a\\](b)\\|\\<c>\\`d\\`\\*"
    assert markdown_code("a`b") == "`a'b`"
    assert len(markdown_table(["a"], [["x\ny"]])) == 3
    assert all("\n" not in line for line in markdown_table(["a"], [["x\ny"]]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 漢字 👩‍👩‍👧", "plain é 漢字 👩‍👩‍👧"),
        ("\x1b\x07\x7f\x85\n", "\\x1b\\x07\\x7f\\x85\\x0a"),
        ("\u202e\u2066\u2029\udcff\ufeff", "\\u202e\\u2066\\u2029\\udcff\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_only_what_cannot_be_shown_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected


def test_a_text_of_several_lines_keeps_its_line_breaks() -> None:
    assert printable("a\r\nb\n\x1bc", newlines=True) == "a\nb\n\\x1bc"
