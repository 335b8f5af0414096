"""Broken files, settings, variables and services through every command: one clear sentence.

Each case is made from its kind and its seed. To run one case again:

    DPNET_BROKEN_SEEDS=17 pytest tests/unit/dpnet/cli/test_broken_inputs.py -k "many and photo"
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_root
import yaml
from mutations import (
    ODD,
    broken_bytes,
    broken_json,
    broken_lines,
    broken_table,
    broken_values,
    broken_yaml,
)
from other_formats import FILES
from photo_files import FORMATS, file, smooth
from PIL import Image
from prefect.context import refresh_global_settings_context

from data_prep.core.digest import sha256_bytes
from data_prep.core.environment import ALL
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, load_reference
from dpnet.cli import main as cli
from dpnet.pipeline import chain
from flows.run_from_command import QUIET

SEEDS = os.environ.get("DPNET_BROKEN_SEEDS", "")
FAST = 4  # cases of each kind without the marker `slow`
MOST_MEMORY = 8 << 30  # bytes
STATUSES = (0, 1, 2)  # and 130, for a stopped command
# Words of Python, which say nothing to a user.
NOT_PLAIN = re.compile(
    r"internal error|Traceback|NoneType|object (is|has|at|does)\b|\[Errno|<class|\b(Key|Value|Type"
    r"|Attribute|Index|Assertion|Runtime|Unicode\w+|Recursion|Overflow)Error|<\w+\.\w+ object"
)

Case = Callable[["World", random.Random], Sequence[str]]


@dataclass
class World:
    """The folders of one case. Commands may write only in `given`."""

    given: Path
    template: Path  # a root with every stage
    photos: list[tuple[str, bytes]]  # good ones, by name
    patch: pytest.MonkeyPatch
    kept: list[Any] = field(default_factory=list)  # open until the end of the case
    evaluates: bool = False  # whether the stage `evaluate` is the real one
    asks_services: bool = False  # whether the clients of Prefect are the real ones

    @property
    def root(self) -> Path:
        """Return a new root."""
        return self.given / "root"

    def put(self, name: str, data: bytes) -> Path:
        """Write a file in the given folder."""
        path = self.given / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def photo_folder(self, count: int = 4) -> Path:
        """Write some good photos into the folder `photos`."""
        for name, data in self.photos[:count]:
            self.put(f"photos/{name}", data)
        return self.given / "photos"

    def copy_root(self) -> Path:
        """Copy the root with every stage; its files are links until something replaces them."""
        shutil.copytree(self.template, self.root, copy_function=os.link)
        if (database := self.root / "mlflow.db").exists():
            data = database.read_bytes()
            database.unlink()
            database.write_bytes(data)
        return self.root

    def replace(self, path: Path, data: bytes) -> None:
        """Write other bytes, and not into the file of the template."""
        path.unlink()
        path.write_bytes(data)


def config_values(world: World) -> dict[str, Any]:
    """Return the options of a small config."""
    return {
        "name": "small",
        "images": {
            "source": str(world.given / "photos"), "name": "small", "size": 32, "workers": 1,
            "val": 0.1, "test": 0.4, "mode": "center-crop", "format": "png",
        },
        "masks": {
            "name": "small", "size": 32, "train": 4, "eval_per_bin": 1, "workers": 1,
        },
        "model": {"preset": "tiny"},
        "losses": {"valid": 0.5},
        "train": {"steps": 5, "batch_size": 2, "workers": 1, "learning_rate": 1e-3},
        "launch": {"launcher": "local"},
        "evaluate": {},
        "register": {"model": "dpnet"},
        "cost": {},
    }  # fmt: skip


# Kinds of cases: each writes its broken input and returns the command.

KINDS: dict[str, tuple[Case, int]] = {}


def kind(count: int) -> Callable[[Case], Case]:
    """Register a kind with the number of its cases."""

    def register(case: Case) -> Case:
        KINDS[case.__name__] = (case, count)
        return case

    return register


def build(world: World, source: Path | str, random: random.Random) -> list[str]:
    """Return a command that builds images."""
    mode = random.choice(("center-crop", "short-side", "keep", "tiles"))
    sets = [f"mode={mode}", "workers=1", f"max_failure_ratio={random.choice((0.05, 1))}"]
    if random.random() < 0.3:
        sets.append(f"format={random.choice(('png', 'webp', 'jpeg'))}")
    if mode == "tiles":
        sets.append("tile=[16]")
    words = ["images", "build", str(source), "--root", str(world.root), "--size", "16"]
    return [*words, *(word for each in sets for word in ("--set", each))]


def any_photo(random: random.Random) -> tuple[str, bytes]:
    """Return the name and the bytes of a photo in any format."""
    if random.random() < 0.25:
        name = random.choice(sorted(FILES))
        return f"x.{random.choice((name.lower(), 'png', 'jpg'))}", FILES[name]
    name = random.choice(FORMATS)
    mode = random.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA"))
    picture = Image.fromarray(smooth(20, 24, random.randrange(4)))
    options: dict[str, Any] = {}
    if random.random() < 0.3 and name in ("JPEG", "WEBP", "PNG"):
        exif = Image.Exif()
        exif[0x0112] = random.choice((6, 8, 3))
        exif[0x010E] = "text"
        options["exif"] = exif.tobytes()
        options["icc_profile"] = random.randbytes(200)
    try:
        other = picture if mode == "RGB" else picture.convert("L").convert(mode)
        data = file(other, name, **options)
    except (OSError, ValueError, KeyError):  # the format has no such mode
        data = file(picture, name)
    suffix = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(name, name.lower())
    return f"x.{suffix}", data


@kind(300)
def photo(world: World, random: random.Random) -> Sequence[str]:
    """Build images of a folder with broken photos."""
    source = world.photo_folder()
    for number in range(random.choice((1, 2))):
        name, data = any_photo(random)
        world.put(f"photos/{number}{name}", broken_bytes(data, random))
    return build(world, source, random)


def archive(world: World, random: random.Random) -> tuple[str, bytes]:
    """Return the name and the bytes of an archive of photos."""
    out = io.BytesIO()
    name = random.choice(("a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.zip", "a.tar"))
    if name == "a.zip":
        how = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        with zipfile.ZipFile(out, "w", how) as packed:
            for each, data in world.photos:
                packed.writestr(f"train/{each}", data)
        return name, out.getvalue()
    form = random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    mode = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(
        name.rpartition(".")[2], "w"
    )
    with tarfile.open(fileobj=out, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for each, data in world.photos:
            info = tarfile.TarInfo(random.choice((each, f"{'d' * 90}/{'e' * 40}/{each}")))
            info.size = len(data)
            info.type = random.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE))
            info.linkname = random.choice(("a", "../../x", world.photos[0][0]))
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return name, out.getvalue()


@kind(250)
def packed(world: World, random: random.Random) -> Sequence[str]:
    """Build images of a broken archive."""
    name, data = archive(world, random)
    path = world.put(f"photos/{name}", broken_bytes(data, random))
    alone = random.random() < 0.5
    if not alone:
        world.photo_folder()
    return build(world, path if alone else path.parent, random)


@kind(200)
def table(world: World, random: random.Random) -> Sequence[str]:
    """Build images of a broken Parquet file."""
    names, photos = zip(*world.photos, strict=True)
    split = ["train", "val", "test", "train", "train", "train"][: len(names)]
    columns: dict[str, Any] = random.choice(
        (
            {"path": names, "bytes": photos, "split": split},
            {"image": [{"bytes": p, "path": n} for n, p in world.photos], "label": names},
            {"jpg": photos, "key": names},
            {"url": [f"http://127.0.0.1:9/{n}" for n in names], "text": names},
        )
    )
    out = io.BytesIO()
    pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), out)
    path = world.put("photos/a.parquet", broken_table(out.getvalue(), random))
    return build(world, path if random.random() < 0.6 else world.photo_folder(), random)


@kind(250)
def photo_list(world: World, random: random.Random) -> Sequence[str]:
    """Build images of a broken list."""
    folder = world.photo_folder(6)
    names = [name for name, _ in world.photos]
    lines = {
        "csv": ["path,split", f"{names[0]},val", *(f"{name},train" for name in names[1:])],
        "txt": names,
        "jsonl": [json.dumps({"path": name, "split": "train"}) for name in names],
    }
    suffix = random.choice(sorted(lines))
    data = "\n".join(lines[suffix]).encode() + b"\n"
    return build(world, world.put(f"{folder.name}/l.{suffix}", broken_lines(data, random)), random)


CONFIG_COMMANDS = (
    ["train"], ["evaluate"], ["register"], ["pipeline", "run"], ["masks", "build"],
    ["images", "build"], ["notify"],
)  # fmt: skip


@kind(300)
def config(world: World, random: random.Random) -> Sequence[str]:
    """Give every command that takes a config a broken one."""
    world.photo_folder()
    path = world.put("own.yaml", broken_yaml(config_values(world), random))
    return [*random.choice(CONFIG_COMMANDS), str(path), "--root", str(world.root)]


@kind(150)
def deploy_file(world: World, random: random.Random) -> Sequence[str]:
    """Deploy a broken file."""
    values = {
        "config": "demo", "root": str(world.root), "parameters": {"train": {"steps": 10}},
        "overrides": ["images.quality=90"], "pool": "p", "trainings": 1, "timezone": "UTC",
        "watch": "*/5 * * * *", "min_new": 1, "quiet_minutes": 1, "retrain": "0 3 * * 0",
        "stuck_minutes": 30, "secrets": {"AWS_SECRET_ACCESS_KEY": "block"},
    }  # fmt: skip
    path = world.put("deploy.yaml", broken_yaml(values, random))
    return ["deploy", str(path), "--dry-run", "--root", str(world.root)]


OPTIONS = [
    f"{section}.{name}"
    for section, values in (
        ("images", chain.Config.model_fields["images"].annotation),
        ("masks", chain.Config.model_fields["masks"].annotation),
        ("model", chain.Config.model_fields["model"].annotation),
        ("losses", chain.Config.model_fields["losses"].annotation),
        ("train", chain.Config.model_fields["train"].annotation),
        ("launch", chain.Config.model_fields["launch"].annotation),
        ("evaluate", chain.Config.model_fields["evaluate"].annotation),
        ("register", chain.Config.model_fields["registry"].annotation),
        ("cost", chain.Config.model_fields["cost"].annotation),
    )
    for name in values.model_fields  # type: ignore[union-attr]
]


def odd_text(random: random.Random) -> str:
    """Return an odd value as people type it."""
    value = random.choice(ODD)
    text = value if isinstance(value, str) else json.dumps(value)
    forms = (text, text, text, f"[{text}", f"{{a: {text}}}", f"- {text}", f"{text}: x")
    text = random.choice(forms)
    return text.replace("\0", "")  # no argument of a process has it


@kind(300)
def set_value(world: World, random: random.Random) -> Sequence[str]:
    """Give an odd value to an option."""
    source = world.photo_folder()
    path = world.put("own.yaml", yaml.safe_dump(config_values(world)).encode())
    option = random.choice(OPTIONS)
    if random.random() < 0.1:
        option = random.choice(("", ".", "images", "images.", "images.x.y", "name", "é", "a" * 999))
    given = f"{option}={odd_text(random)}"
    others = (["model"], ["deploy"], ["demo"], ["images", "build"])
    command = random.choice((*CONFIG_COMMANDS, *others))
    root = ["--root", str(world.root), "--set", given]
    match command:
        case ["model"]:
            given = f"model.{option.rpartition('.')[2]}={odd_text(random)}"
            return ["model", "describe", "--preset", "tiny", "--size", "32", "--set", given]
        case ["deploy"]:
            return ["deploy", "--dry-run", *root]
        case ["demo"]:
            return ["demo", "--photos", str(source), *root]
        case ["images", "build"] if random.random() < 0.5:
            return [*build(world, source, random), "--set", given]
    return [*command, str(path), *root]


@kind(100)
def mask_files(world: World, random: random.Random) -> Sequence[str]:
    """Build masks of broken mask files."""
    for number in range(3):
        picture = Image.new(random.choice(("L", "1", "P", "RGBA")), (32, 32))
        picture.paste(1 if picture.mode == "1" else 255, (4, 4, 20, 14 + number))
        data = file(picture, random.choice(("PNG", "TIFF", "GIF")))
        if number:
            data = broken_bytes(data, random)
        world.put(f"masks/{number}.{random.choice(('png', 'tif', 'gif', 'jpg'))}", data)
    values = config_values(world)
    values["masks"] |= {"external": str(world.given / "masks"), "train": 0}
    path = world.put("own.yaml", yaml.safe_dump(values).encode())
    return ["masks", "build", str(path), "--root", str(world.root)]


@kind(150)
def inpainted(world: World, random: random.Random) -> Sequence[str]:
    """Fill a broken photo, or with a broken mask."""
    mask = Image.new("L", (24, 20))
    mask.paste(255, (4, 4, 12, 12))
    name, data = any_photo(random)
    mask_data = file(mask, "PNG")
    if random.random() < 0.4:
        mask_data = broken_bytes(mask_data, random)
    if random.random() < 0.7:
        data = broken_bytes(data, random)
    several = random.random() < 0.5
    photo = world.put(f"in/{name}", data)
    its = world.put("masks/x.png", mask_data)
    out = world.given / random.choice(("out", "out.png", "out.jpg", "out.avif", "out.xyz"))
    if several:
        world.put("in/good.png", world.photos[0][1])
    model = ["--model", str(next((world.template / "runs").iterdir()))]
    if several:
        return ["inpaint", str(photo.parent), str(its.parent), "-o", str(world.given / "o"), *model]
    return ["inpaint", str(photo), str(its), "-o", str(out), *model]


def spoil(path: Path, world: World, random: random.Random) -> None:
    """Break a file of a root in the way of its format, or remove it."""
    data = path.read_bytes()
    if random.random() < 0.06:
        path.unlink()
        return
    if random.random() < 0.04:
        path.unlink()
        path.mkdir()
        return
    breaks = {".json": broken_json, ".parquet": broken_table, ".urls": broken_lines}
    breaks |= {".jsonl": broken_lines}
    world.replace(path, breaks.get(path.suffix, broken_bytes)(data, random))


def files_of(root: Path) -> list[Path]:
    """Return the files of a root that our own code writes, in a fixed order."""
    names = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [path for path in names if path.suffix != ".db" and path.parent.name != "photos"]


def reader(world: World, path: Path, random: random.Random) -> list[str]:
    """Return a command that reads a root and perhaps this file."""
    root = str(world.root)
    config = world.put("own.yaml", yaml.safe_dump(config_values(world)).encode())
    world.photo_folder(6)
    top = path.relative_to(world.root).parts[0]
    out = str(world.given / "out")
    photo = str(world.put("x.png", world.photos[0][1]))
    mask = Image.new("L", (24, 20))
    mask.paste(255, (4, 4, 12, 12))
    masked = str(world.put("m.png", file(mask, "PNG")))
    inpaint = ["inpaint", photo, masked, "-o", f"{out}.png", "--root", root]
    commands: dict[str, list[list[str]]] = {
        "images": [
            ["images", "verify", "small"], ["images", "inspect", "small"],
            ["images", "inspect", "small", "-o", f"{out}.png"], ["images", "log", "small"],
            ["images", "build", str(config)], ["evaluate", str(config)], ["notify", str(config)],
        ],
        "masks": [
            ["masks", "verify", "small"], ["masks", "inspect", "small"],
            ["masks", "inspect", "small", "-o", f"{out}.png"], ["masks", "build", str(config)],
            ["evaluate", str(config)],
        ],
        "runs": [inpaint, ["export", "-o", out], ["register", str(config)],
                 ["evaluate", str(config)], ["pipeline", "run", str(config)]],
        "evaluations": [["register", str(config)], ["pipeline", "run", str(config)]],
        "registry": [inpaint, ["export", "models:/dpnet@champion", "-o", out],
                     ["register", str(config)], ["verify", "models:/dpnet/1"],
                     ["registry", "list"], ["registry", "show", "champion"],
                     ["registry", "history"], ["registry", "rollback"]],
    }  # fmt: skip
    whole = [["verify", root, *more] for more in ([], ["--index-only"], ["--sample", "0.1"])]
    whole += [["gc", root, "--delete", "--older-than", "0"], ["gc", root]]
    command = random.choice([*commands.get(top, []), *whole])
    if command[0] not in ("verify", "gc") or command[1] != root:
        command = [*command, "--root", root] if "--root" not in command else command
    return command


@kind(500)
def record(world: World, random: random.Random) -> Sequence[str]:
    """Break one file of a root, and read the root."""
    root = world.copy_root()
    path = random.choice(files_of(root))
    if path.suffix in (".tar", ".png", ".parquet") and random.random() < 0.5:
        path = random.choice([each for each in files_of(root) if each.suffix == ".json"])
    spoil(path, world, random)
    return reader(world, path, random)


@kind(150)
def summary(world: World, random: random.Random) -> Sequence[str]:
    """Break the settings, inputs or summary of a manifest, or a report, and read the root."""
    root = world.copy_root()
    manifests = [path for path in files_of(root) if path.name in ("manifest.json", "report.json")]
    path = random.choice(manifests)
    found = json.loads(path.read_bytes())
    part = random.choice(("summary", "summary", "settings", "inputs", "figures"))
    if part not in found:
        part = "pairs" if "pairs" in found else "summary"
    found[part] = broken_values(found[part], random)
    world.replace(path, json.dumps(found).encode())
    return reader(world, path, random)


@kind(40)
def evaluated(world: World, random: random.Random) -> Sequence[str]:
    """Break one file that an evaluation reads, and evaluate."""
    root = world.copy_root()
    tops = ("images", "masks", "runs")
    path = random.choice([p for p in files_of(root) if p.relative_to(root).parts[0] in tops])
    spoil(path, world, random)
    world.evaluates = True
    config = world.put("own.yaml", yaml.safe_dump(config_values(world)).encode())
    world.photo_folder(6)
    return ["evaluate", str(config), "--root", str(root)]


@kind(100)
def model_file(world: World, random: random.Random) -> Sequence[str]:
    """Read a model with a broken config, or with other weights that fit their hash."""
    run = next((world.template / "runs").iterdir())
    weights = (run / "model/generator.safetensors").read_bytes()
    about = json.loads((run / "model/model.json").read_bytes())
    if random.random() < 0.5:
        about = broken_values(about, random)
        if not isinstance(about, dict):
            about = {"format": about}
    else:
        weights = broken_bytes(weights, random)
        about["weights_sha256"] = sha256_bytes(weights)
    world.put("exported/model.safetensors", weights)
    folder = world.put("exported/config.json", json.dumps(about).encode()).parent
    photo = world.put("x.png", world.photos[0][1])
    if random.random() < 0.5:
        return ["export", str(folder), "-o", str(world.given / "out")]
    mask = world.put("m.png", file(Image.new("L", (24, 20), 255), "PNG"))
    out = str(world.given / "o.png")
    return ["inpaint", str(photo), str(mask), "-o", out, "--model", str(folder)]


@kind(100)
def event(world: World, random: random.Random) -> Sequence[str]:
    """Give `dpnet notify` a broken notification."""
    world.photo_folder()
    path = world.put("own.yaml", yaml.safe_dump(config_values(world)).encode())
    s3 = {"bucket": {"name": "b"}, "object": {"key": "a+b.png", "size": 5}}
    plain = {"Records": [{"eventName": "ObjectCreated:Put", "s3": s3}]}
    bridge = {"detail": {"bucket": {"name": "b"}, "object": {"key": "a"}}, "source": "aws.s3"}
    wrapped = {"Records": [{"Sns": {"Message": json.dumps(plain)}}]}
    data = broken_json(json.dumps(random.choice((plain, bridge, wrapped))).encode(), random)
    told = world.put("event.json", data)
    return ["notify", str(path), "--root", str(world.root), "--event", str(told)]


@kind(100)
def state_file(world: World, random: random.Random) -> Sequence[str]:
    """Read broken files that say what is running or was seen: of `dpnet up` and of a watcher."""
    root = world.copy_root()
    world.photo_folder()
    path = world.put("own.yaml", yaml.safe_dump(config_values(world)).encode())
    watch = {"digest": "x" * 64, "since": 1.0, "announced": "y" * 64}
    up = {"pid": 1, "root": str(root), "api_url": "http://127.0.0.1:9/api", "ui_url": "u",
          "mlflow_url": "m", "metrics_url": "n", "ray_url": None}  # fmt: skip
    places = {
        "images/small/watch.json": watch, "up/up.json": up, "up/password": "dpnet:x",
    }  # fmt: skip
    name = random.choice(sorted(places))
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_bytes(broken_json(json.dumps(places[name]).encode(), random))
    if name.startswith("up/"):
        lock = (root / "up/lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        world.kept.append(lock)
    command = {
        "images/small/watch.json": ["notify", str(path)],
    }.get(name, random.choice((["notify", str(path)], ["deploy", "--dry-run"])))
    return [*command, "--root", str(root)]


ANSWERS = (
    b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{\"a\":[1,",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", b"not http at all\r\n\r\n",
    b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno!",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnull",
    b"HTTP/1.1 302 Found\r\nLocation: /api/again\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 418 \r\nContent-Length: 2\r\n\r\n\xff\xfe",
)  # fmt: skip


class OddService(threading.Thread):
    """A server that gives every request the same odd answer."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(daemon=True)
        self.answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        """Answer until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
                with connection:
                    connection.settimeout(2)
                    connection.recv(1 << 16)
                    connection.sendall(self.answer)
            except OSError:
                if self.listener.fileno() < 0:
                    return

    def close(self) -> None:
        """Stop."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@kind(100)
def service(world: World, random: random.Random) -> Sequence[str]:
    """Use a service that is down or gives odd answers."""
    port = 9
    if random.random() < 0.85:
        odd = OddService(random.choice(ANSWERS))
        world.kept.append(odd)
        port = odd.port
    url = f"http://127.0.0.1:{port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        world.patch.setenv(name, "for-tests")
    world.patch.setenv("AWS_ENDPOINT_URL", url)
    world.patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    world.patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    world.patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    world.patch.setenv("PREFECT_API_URL", f"{url}/api")
    world.patch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    world.patch.setattr("data_prep.core.storage.s3_requests.ATTEMPTS", 2)
    world.patch.setattr("data_prep.core.storage.s3_requests.ATTEMPTS_UNREACHED", 1)
    world.patch.setattr("data_prep.core.storage.s3_requests.FIRST_WAIT_S", 0.0)
    for name in QUIET:
        world.patch.setenv(name, QUIET[name])
    refresh_global_settings_context()
    world.asks_services = True
    root = str(world.copy_root())
    world.photo_folder(6)
    config = str(world.put("own.yaml", yaml.safe_dump(config_values(world)).encode()))
    tracking = ["--set", f"register.tracking_uri={url}"]
    return random.choice(
        (
            ["images", "log", "x", "--root", "s3://bucket/root"],
            ["images", "build", "s3://bucket/photos", "--root", root],
            ["verify", "s3://bucket/root"], ["inpaint", "a.png", "b.png", "-o", "c.png", "--root",
             "s3://bucket/root"],
            ["register", config, "--root", root, "--set", "register.model=other", *tracking],
            ["register", config, "--root", root, "--set", "register.model=other", *tracking],
            ["deploy", "--dry-run"], ["deploy"], ["deploy"],
            ["notify", config, "--root", root, "--set", "images.quality=80"],
        )
    )  # fmt: skip


VARIABLES = (
    *ALL, "HOME", "TMPDIR", "XDG_CACHE_HOME", "LANG", "LC_ALL", "PYTHONIOENCODING", "NO_COLOR",
    "COLUMNS", "RAY_TMPDIR", "PREFECT_HOME", "PREFECT_PROFILE", "TORCHINDUCTOR_CACHE_DIR",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "TZ", "AWS_CONFIG_FILE", "OMP_NUM_THREADS",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "USER", "TERM",
    "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
)  # fmt: skip
VALUES = (
    "", " ", "x", "\n", "a\n", ".", "/dev/null", "/proc/nowhere", "~", "-1", "0", "99999999999",
    "nan", "\x1b[31m", "é", "\udcff", "http://", "http://[", "http://127.0.0.1:9", "http://a b",
    "http://127.0.0.1:99999", "http://127.0.0.1:x", "://", "s3://", "s3://b", "s3:///x", "file://",
    "sqlite://", "sqlite:///", "postgresql://u:p@127.0.0.1:9/x", "user:pass", "a:b:c", "true", "{}",
    "x" * 5000, "tcp://x", "ftp://x/y", "databricks", "C.UTF-8", "tr_TR", "POSIX", "ray://x",
)  # fmt: skip


@kind(250)
def variable(world: World, random: random.Random) -> Sequence[str]:
    """Run a command with an odd value in a variable of the environment."""
    for _ in range(random.choice((1, 1, 2))):
        world.patch.setenv(random.choice(VARIABLES), random.choice(VALUES))
    root = str(world.copy_root())
    path = str(world.put("own.yaml", yaml.safe_dump(config_values(world)).encode()))
    source = str(world.photo_folder(6))
    commands = [
        ["images", "build", path], ["images", "build", source], ["masks", "build", path],
        ["train", path], ["register", path], ["pipeline", "run", path], ["notify", path],
        ["deploy", "--dry-run"], ["verify", root], ["images", "log", "small"], ["demo"], ["up"],
        ["images", "inspect", "small"], ["export", "-o", str(world.given / "out")],
        ["inpaint", f"{source}/00.png", f"{source}/00.png", "-o", str(world.given / "o.png")],
    ]  # fmt: skip
    command = random.choice(commands)
    if command[0] == "verify":
        return command
    without = random.random() < 0.2 and not os.environ.get("DPNET_ROOT", "").startswith("~")
    return command if without else [*command, "--root", root]


@kind(150)
def argument(world: World, random: random.Random) -> Sequence[str]:
    """Give odd words as paths, names and numbers."""
    world.photo_folder()
    world.put("file", b"x")
    (world.given / "empty").mkdir()
    (world.given / "loop").symlink_to("loop")
    (world.given / "dangling").symlink_to("nowhere")
    words = (
        "", " ", ".", "file", "empty", "loop", "dangling", "photos", "none/none", "a" * 300,
        "x/" * 3000, "\udcff.png", "é", "s3://", "s3:///k", "s3://B_/x", "file://", "file:///x",
        "http://127.0.0.1:9/x", "models:/", "models:/x", "models:/x@y", "models:/x/99999999999999",
        "models:/x@champion", "*", "[", "**/*.png", "[!", "~nobody/x", "-", "--", "demo", "places2",
        "/dev/null", "runs/x", "images/x", "0", "-5", "file/x",
        "\x1b[2J", "a\nb", "photos/00.png", "images/small",
    )  # fmt: skip

    def word() -> str:
        return random.choice(words)

    commands = [
        ["images", "build", word()], ["images", "build", "photos", "--name", word()],
        ["images", "build", "photos", f"--size={word()}"], ["images", "log", word()],
        ["images", "inspect", word()], ["images", "verify", word()], ["masks", "verify", word()],
        ["masks", "build", word()], ["masks", "inspect", word(), "-o", word()],
        ["train", word()], ["evaluate", word()], ["register", word()], ["pipeline", "run", word()],
        ["train", "demo", f"--address={word()}", "--launcher=ray-job"],
        ["notify", word()], ["notify", "demo", f"--event={word()}"],
        ["notify", "demo", f"--min-new={word()}"], ["notify", "demo", f"--quiet-minutes={word()}"],
        ["verify", word()], ["verify", "photos", f"--sample={word()}"],
        ["inpaint", word(), word(), "-o", word()], ["inpaint", "photos", "photos", "-o", word()],
        ["inpaint", "photos", "photos", "-o", "out", f"--model={word()}"],
        ["inpaint", "photos", "photos", "-o", "out", f"--tile={word()}"],
        ["export", word(), "-o", word()], ["export", "-o", word(), f"--format={word()}"],
        ["model", "describe", f"--preset={word()}"], ["model", "describe", f"--size={word()}"],
        ["deploy", word()], ["up", f"--port={word()}"], ["up", f"--database={word()}"],
        ["demo", f"--photos={word()}"], ["demo", "--fresh"], [word()], ["images", word()],
    ]  # fmt: skip
    command = random.choice(commands)
    if command[:2] == ["model", "describe"] or random.random() < 0.1:
        return command
    return [*command, f"--root={random.choice(('root', 'root', word()))}"]


# The test: the stand-ins for what takes long, the world, and what must hold.


def stand_in(world: World) -> None:
    """Replace what would start Ray, Prefect or processes, and what would take long."""
    template, real_chain, real_evaluate = world.template, chain.run_chain, chain.evaluate
    runs = next((template / "runs").iterdir()).name
    evaluations = next((template / "evaluations").iterdir()).name

    def trained(request: Any, launch: Any, tracking: Any, store: Any) -> StageRef:
        return load_reference(store, f"runs/{runs}")

    def evaluated(*given: Any) -> StageRef:
        if world.evaluates:
            return real_evaluate(*given)
        return load_reference(given[-1], f"evaluations/{evaluations}")

    def small_chain(config: Any, store: Any, wanted: str = "register", **_: Any) -> Any:
        if config.masks.train > 50 or config.masks.eval_per_bin > 5 or config.masks.size > 64:
            return []
        if config.images.size > 64 or config.launch.launcher != "local":
            return []
        if wanted not in ("images", "masks") and not store.exists(f"runs/{runs}/manifest.json"):
            raise PipelineError("training would start here.")
        return real_chain(config, store, wanted)  # type: ignore[arg-type]

    def run_pipeline(config: Any, root: str, *_: Any, **__: Any) -> Any:
        from data_prep.core.storage.open import open_store
        from dpnet.pipeline.summary import summarize

        store = open_store(root)
        refs = small_chain(config.resolved, store)
        if not refs:
            raise PipelineError("the flow would start here.")
        return summarize(config.resolved.name, store, refs, 1.0)

    def no_server(*_: Any, **__: Any) -> Any:
        raise PipelineError("servers would start here.")

    def on_server(client: Any, dry_run: bool) -> Any:
        nothing = SimpleNamespace(lines=[])
        done = ("apply_pool", "check_secrets", "remove_deployments_except", "apply_automations")
        for name in done:
            setattr(nothing, name, lambda *_: None)
        nothing.apply_alerts = lambda url: None
        nothing.apply_deployment = lambda settings, each: "00000000-0000-0000-0000-000000000000"
        return nothing

    patch = world.patch.setattr
    patch("dpnet.pipeline.chain.train", trained)
    patch("dpnet.pipeline.chain.evaluate", evaluated)
    patch("dpnet.cli.commands.pipeline.run_chain", small_chain)
    patch("flows.run_from_command.run_pipeline", run_pipeline)
    patch("flows.local_server.up.up", no_server)
    if not world.asks_services:
        patch("flows.run_from_command._configured_api", lambda: "http://127.0.0.1:9/api")
        patch("flows.run_from_command._check_reachable", lambda *_: None)
        patch("flows.new_data.send_event", lambda *_: None)
        patch("flows.deploy.connected", lambda: nullcontext(None))
        patch("flows.deploy.ServerChanges", on_server)
    patch("dpnet.export.export._write", lambda *_: {})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root in which every stage is committed, with a small network."""
    folder = tmp_path_factory.mktemp("template") / "root"
    with pytest.MonkeyPatch.context() as patch:
        from data_prep.core.pool import run_tasks
        from dpnet.model import ModelConfig, build_generator

        patch.setattr("os.fsync", lambda _: None)
        patch.setattr("data_prep.images.build.run_apart", run_tasks)
        patch.setattr("data_prep.masks.read_files.run_apart", run_tasks)
        small = ModelConfig((8, 8, 8), 1, 8, 7, (8, 8, 8, 8))
        patch.setattr("dpnet.model.build_generator", lambda _: build_generator(small))
        store = small_root.new_store(folder)
        images, masks = small_root.real_data(store, eval_per_bin=1)
        run = small_root.trained(store, images=images, masks=masks)
    from dpnet.registry.settings import RegisterSettings
    from dpnet.registry.stage import register

    measured = {"mean": 20.0}
    methods = ("dpnet", "mean_fill", "telea", "smooth_fill")
    metrics = ("psnr", "hole_psnr", "ssim", "hole_ssim", "l1", "hole_l1")
    figures = {
        "bins": {
            "all": {"pairs": 4, "methods": {m: dict.fromkeys(metrics, measured) for m in methods}},
        },
        "mean_over_bins": {m: dict.fromkeys(metrics, 20.0) for m in methods},
    }  # fmt: skip
    report = json.dumps({"pairs": {"images": 4}, "figures": figures}).encode()
    summary = {"hole_psnr": 20.0, "pairs_digest": "p" * 64, "figures": figures}
    evaluation = small_root.commit(
        store, "evaluate", "evaluations", {"report.json": report}, inputs={"run": run},
        summary=summary,
    )  # fmt: skip
    register(RegisterSettings(promote="always"), run, evaluation, store)
    shutil.rmtree(folder / "photos")
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of every file in a folder."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in paths
        if path.is_symlink() or path.is_file()
    }


def problem(status: object, out: str, err: str) -> str:
    """Return what is wrong with the answer of a command, or ""."""
    if status not in STATUSES:
        return f"the exit status is {status}"
    if found := NOT_PLAIN.search(err) or NOT_PLAIN.search(out):
        return f"it says {found[0]!r}"
    lines = err.splitlines()
    if status == 2 and any("usage: dpnet" in line for line in lines):
        return ""
    ours = [line for line in lines if line.startswith("dpnet: ")]
    if status == 0 or (not ours and out.strip()):  # a result that is not ok
        return "it shows an error and ends with 0" if ours and status == 0 else ""
    if len(ours) != 1 or lines[-1] != ours[0]:
        return f"it ends with {len(ours)} sentences"
    return "" if ours[0].endswith(".") else "its sentence does not end with a full stop"


def run_case(
    name: str,
    seed: int,
    template: Path,
    top: Path,
    photos: list[tuple[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run one case and return what was wrong, with the seed, or ""."""
    case, _ = KINDS[name]
    chance = random.Random(f"{name} {seed}")
    given = top / "given"
    others = [top / other for other in ("home", "here", "tmp")]
    for each in (given, *others):
        each.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for variable in VARIABLES:
            if variable.startswith(("AWS_", "DPNET_", "PREFECT_", "MLFLOW_", "RAY_")):
                patch.delenv(variable, raising=False)
        patch.setenv("HOME", str(others[0]))
        patch.setenv("TMPDIR", str(others[2]))
        patch.setattr("tempfile.tempdir", None)
        patch.setattr("flows.local_server.up._START_S", 0.5)  # no `dpnet up` will be ready
        patch.setattr("os.fsync", lambda _: None)  # nothing here has to survive a power failure
        patch.chdir(given if name in ("argument", "variable") else others[1])
        world = World(given, template, photos, patch)
        argv = list(case(world, chance))
        stand_in(world)
        before = contents(template)
        try:
            status: object = cli.main(argv)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
        for each in world.kept:
            each.close()
    out, err = capsys.readouterr()
    wrong = problem(status, out, err)
    written = [path for each in others for path in each.rglob("*") if not path.is_dir()]
    if not wrong and written:
        wrong = f"it wrote {written[0].relative_to(top)}"
    if not wrong and contents(template) != before:
        wrong = "it changed a file outside the given folder"
    shutil.rmtree(top)
    if not wrong:
        return ""
    return f"{name}, seed {seed}: {wrong}\n  {argv}\n  {err.strip()[-600:]}\n  {out.strip()[-200:]}"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Let a command that reads without end fail, before the machine has no memory any more."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Undo the signals, the variables and the logging that commands set."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    variables = dict(os.environ)
    logging_handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = logging_handlers  # Prefect adds its own
    logging.root.setLevel(level)
    for each, handler in handlers.items():
        signal.signal(each, handler)
    os.environ.clear()
    os.environ.update(variables)
    refresh_global_settings_context()


@pytest.fixture
def good_photos() -> list[tuple[str, bytes]]:
    """Return six good photos."""
    return [(f"{n:02d}.png", file(smooth(20, 24, n), "PNG")) for n in range(6)]


def drive(
    name: str,
    seeds: Sequence[int],
    template: Path,
    tmp_path: Path,
    good_photos: list[tuple[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run cases, and fail with all of those that went wrong."""
    if SEEDS:
        seeds = [int(seed) for seed in SEEDS.split(",")]
    wrong = [
        text
        for seed in seeds
        if (text := run_case(name, seed, template, tmp_path / str(seed), good_photos, capsys))
    ]
    assert not wrong, f"{len(wrong)} of {len(seeds)} cases went wrong:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", KINDS)
def test_a_few_broken_inputs_give_one_clear_sentence(
    name: str,
    template: Path,
    tmp_path: Path,
    good_photos: list[tuple[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    drive(name, range(FAST), template, tmp_path, good_photos, capsys)


@pytest.mark.slow
@pytest.mark.rotated(3)
@pytest.mark.parametrize("name", KINDS)
def test_many_broken_inputs_give_one_clear_sentence(
    name: str,
    template: Path,
    tmp_path: Path,
    good_photos: list[tuple[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    drive(name, range(FAST, KINDS[name][1]), template, tmp_path, good_photos, capsys)


def test_at_least_two_thousand_broken_inputs_are_tried() -> None:
    assert sum(count for _, count in KINDS.values()) >= 2000
