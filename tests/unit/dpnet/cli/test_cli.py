"""The command: usage, results, error sentences, signals, and --fresh."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import small_root

import dpnet
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.cli import main as cli
from dpnet.cli.commands import data, pipeline
from dpnet.cli.commands.roots import Outcome
from dpnet.cli.parser import build_parser
from dpnet.pipeline.demo import MARKER, claim_root, clear_root

REPOSITORY = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def untouched_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DPNET_ROOT", raising=False)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in handlers.items():
        signal.signal(each, handler)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def fails(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """Run a command that fails, and return its one sentence."""
    assert cli.main(argv) == status
    out, err = capsys.readouterr()
    assert out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("dpnet: ")
    assert line.endswith(".")
    assert "Traceback" not in err
    return line


def test_threads_wait_without_spinning_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given, expected in (("", "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
        if not given:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert os.environ["OMP_WAIT_POLICY"] == expected


def test_help_answers_in_less_than_a_second() -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dpnet", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 1
    assert "dpnet demo" in done.stdout


def test_the_version_is_that_of_the_installed_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpnet", "--version"], capture_output=True, text=True, check=True
    )
    assert dpnet.__version__ == version("dpnet-pipeline")
    assert done.stdout == f"dpnet {dpnet.__version__}\n"


def test_a_source_tree_that_is_not_installed_says_so_as_its_version(tmp_path: Path) -> None:
    for package in ("dpnet", "data_prep"):
        (tmp_path / package).symlink_to(REPOSITORY / package)
    code = "import dpnet; print(dpnet.__version__); from dpnet.cli.main import main;"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{code} main(['--version'])"],  # -S: without site-packages
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0+not.installed\ndpnet 0+not.installed\n"


def test_the_version_is_looked_up_only_when_it_is_used() -> None:
    code = "import sys, dpnet.cli.main; print('importlib.metadata' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda p: p.prog)
def test_every_command_has_help_with_an_example(parser: argparse.ArgumentParser) -> None:
    _, _, example = parser.format_help().partition("example:\n")
    assert example.strip().startswith("dpnet ") or parser.prog == "dpnet"


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda p: p.prog)
def test_every_command_has_a_function_that_does_its_work(parser: argparse.ArgumentParser) -> None:
    command = parser.get_default("command")
    assert command is None or callable(cli.function_of(command))


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["pipeline"], ["train"], ["demo", "--no-such-option"]]
)
def test_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: dpnet" in capsys.readouterr().err


COMMANDS = {
    parser.prog.removeprefix("dpnet "): parser
    for parser in parsers(build_parser())
    if parser.get_default("command")
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_option_of_any_command_shows_its_usage_and_the_nearest_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in COMMANDS[command]._option_string_actions:
        if option.startswith("--"):
            with pytest.raises(SystemExit) as caught:
                cli.main([*command.split(), f"{option[:3]}{option[2:]}"])
            assert caught.value.code == 2
            err = capsys.readouterr().err
            assert f"usage: dpnet {command} " in err
            assert err.rstrip().endswith(f": did you mean {option}?")


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [(["imges"], "images"), (["images", "bild"], "build"), (["export", "--format=onx"], "onnx")],
)
def test_a_misspelt_command_or_choice_is_reported_with_the_nearest_one(
    argv: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert f": did you mean {nearest}?" in capsys.readouterr().err


# A wrong value, and a wrong name or path, of every command.
MISUSED = {
    "demo": ["--set train.stepz=1", "--set train.steps", "--photos none", "--root held"],
    "pipeline run": ["none", "demo --set train.steps=-1", "demo --set images.source=none"],
    "images build": ["none", "demo --size 7", "photos --set mode=x", "photos --name a/b"],
    "images verify": ["none", "none/x"],
    "images inspect": ["none", "none/x", "small -o none/sheet.png --root prepared"],
    "images log": ["none", "a/b"],
    "masks build": ["none", "demo --set size=x", "photos", "demo --set recipes.x=1"],
    "masks verify": ["none"],
    "masks inspect": ["none"],
    "plan": ["none", "demo --set train.steps=-1", "demo --set train.init_from=none"],
    "train": ["none", "demo --set x", "demo --address x", "demo --set train.init_from=none"],
    "evaluate": [
        "none", "demo --compare x", "demo --compare x=none", "demo --compare x=models:/none/1",
        "demo --set evaluate.lpips_weights=none", "demo --export-pairs photos",
        "demo --export-pairs pairs --compare x=photos",
    ],
    "register": ["none", "demo --set register.model=/", "demo --set register.tracking_uri=a:1"],
    "notify": ["none", "demo --event none"],
    "verify": ["none", "models:/none/1", "models:/"],
    "gc": ["none", "photos", "--root none", "photos --root photos"],
    "inpaint": [
        "none none -o out.png", "photos/00.png photos/00.png -o out.doc",
        "photos/00.png photos/00.png -o out.png --tile 1",
        "photos/00.png photos/00.png -o out.png --model none",
    ],
    "serve": [
        "--model none", "--model models:/none/1", "--port 0", "--max-pixels 0",
        "--host none.invalid",
    ],
    "model describe": ["--preset x", "--size 1", "--set x=1"],
    "export": ["none -o out", "models:/none/1 -o out", "-o photos"],
    "registry list": ["", "--model none --root registered"],
    "registry show": ["champion", "7 --root registered", "1 --model none --root registered"],
    "registry history": ["", "--model none --root registered"],
    "registry promote": ["1 --why x", "7 --why x --root registered", "1 --why= --root registered"],
    "registry rollback": ["", "--model none --root registered"],
    "registry rebuild": ["", "--model none --root registered"],
    "deploy": ["none", "--set x=1", "--set watch=daily --dry-run"],
    "up": ["--database mysql://host"],
}  # fmt: skip


def test_the_wrong_uses_are_of_all_commands() -> None:
    assert list(MISUSED) == list(COMMANDS)


@pytest.mark.parametrize(
    ("command", "words"), [(name, words) for name, some in MISUSED.items() for words in some]
)
def test_what_the_user_must_correct_ends_with_2_and_one_sentence_and_changes_nothing(
    command: str,
    words: str,
    prepared: LocalStore,
    registered: LocalStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPNET_ROOT", "root")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "")  # `up --database` sets it
    small_root.photographs(tmp_path / "photos")
    LocalStore(tmp_path / "held").write("thesis.tex", b"years of work")
    (tmp_path / "prepared").symlink_to(prepared.folder)
    (tmp_path / "registered").symlink_to(registered.folder)

    def held() -> set[Path]:
        return {path for path in tmp_path.rglob("*") if ".probe" not in path.name}

    before = held()
    try:
        status = cli.main([*command.split(), *words.split()])
    except SystemExit as ended:  # of the parser
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("dpnet")
    assert held() - before <= {tmp_path / "root"}


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """Return a root with one registered version of the model dpnet."""
    store = small_root.new_store(tmp_path_factory.mktemp("registered"))
    small_root.champion(store)
    return store


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["model", "describe", "--size=--"], "--size"),
        (["verify", "x", "--sample=--"], "--sample"),
        (["export", "-o--"], "-o"),
    ],
)
def test_an_option_with_two_hyphens_as_its_value_is_wrong_usage(
    argv: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert f"argument {option}: expected one argument" in capsys.readouterr().err


def test_model_describe_prints_layers_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = answer(capsys, "model", "describe", "--preset", "base")
    assert (status, found["ok"], found["preset"], found["size"]) == (0, True, "base", 256)
    assert found["macs"] / 1e9 == pytest.approx(55.58, rel=0.02)
    assert found["parameters"] > 1e6
    sets = ["--set", "attention=none", "--set", "model.pyramid=false"]
    assert cli.main(["model", "describe", "--preset", "tiny", *sets]) == 0
    text = capsys.readouterr().out
    assert "down4" not in text
    assert "attention over 3x3 patches          0.00 GMac" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "must be one of tiny, base, large"),
        (["--set", "depth=3"], "model.depth is not an option"),
        (["--size", "100"], "give a multiple of 32 pixels"),
    ],
)
def test_model_describe_reports_bad_options(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "model", "describe", *argv)


def test_model_describe_imports_torch_and_no_other_heavy_library() -> None:
    code = "import sys; from dpnet.cli.main import main;"
    code += " main(['model', 'describe', '--preset', 'tiny']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert not loaded & {"ray", "prefect", "mlflow", "pyarrow", "cv2", "matplotlib", "skimage"}


def test_export_writes_a_folder_and_prints_the_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpnet.model import ModelConfig, build_generator
    from dpnet.model_store.weights import save_generator

    config = ModelConfig((8, 8, 8), 1, 8, 7, (8, 8, 8, 8))
    save_generator(LocalStore(tmp_path), "run", build_generator(config), {})
    out, run = str(tmp_path / "out"), str(tmp_path / "run")
    status, found = answer(capsys, "export", run, "-o", out, "--format", "torchscript")
    assert (status, found["model"], found["out"]) == (0, run, out)
    assert found["files"]["generator.ts"] == (tmp_path / "out" / "generator.ts").stat().st_size
    assert found["differences"]["generator.ts"] <= 1e-3
    assert cli.main(["export", out, "-o", f"{out}3", "--training-state"]) == 2
    assert "is an exported model" in capsys.readouterr().err
    again = ["export", out, "-o", f"{out}2", "--format", "torchscript"]  # from the exported model
    assert cli.main(again) == 0
    text = capsys.readouterr().out
    assert "generator.ts differs from the network by at most" in text
    assert "README.md: " in text


def test_export_of_a_missing_model_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = fails(capsys, "export", str(tmp_path / "none"), "-o", str(tmp_path / "out"))
    assert "holds no model" in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "nan", "some"])
def test_a_share_outside_0_to_1_is_wrong_usage(
    share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", "x", f"--sample={share}"])
    assert caught.value.code == 2
    assert (
        f"{share!r} is not a share: give a number such as 0.01, at most 1"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """Return a root with real images and masks named small."""
    store = LocalStore(tmp_path_factory.mktemp("prepared"))
    small_root.real_data(store)
    return store


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    """Run a command with --json, and return its exit status and object."""
    status = cli.main([*argv, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return status, found


def test_verify_prints_how_much_it_has_read(
    prepared: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(prepared.folder)
    status, found = answer(capsys, "verify", root, "--index-only")
    assert (status, found["ok"], found["tars"]) == (0, True, 0)
    assert found["depth"] == {"share": 1.0, "index_only": True}
    assert cli.main(["verify", root, "--sample", "0.01"]) == 0
    text = capsys.readouterr().out
    assert "the tars of 2 of 5 shards; the other 6 files were not read, only their presence" in text
    assert text.rstrip().endswith(": no problems")


def test_verify_lists_problems_and_exits_with_1(
    prepared: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared.folder, tmp_path / "copy")
    tar = next((tmp_path / "copy").glob("masks/small/*/eval-000000.tar"))
    data = bytearray(tar.read_bytes())
    data[550] ^= 1
    tar.write_bytes(data)
    assert cli.main(["verify", str(tmp_path / "copy")]) == 1
    lines = capsys.readouterr().out.splitlines()
    name = tar.relative_to(tmp_path / "copy").as_posix()
    assert [line for line in lines if name in line] == [
        f"{name}: was altered: another sha256 (2 more about it with --json)"
    ]
    assert lines[-1].endswith(": problems in 1 file")
    status, found = answer(capsys, "verify", str(tmp_path / "copy"))
    sample = "sample eval-00000000: eval-00000000.png has another sha256 than its index says"
    assert {"where": name, "problem": sample} in found["problems"]
    assert (status, len(found["problems"])) == (1, 3)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_set_is_verified_by_its_name_and_by_its_folder(
    prepared: LocalStore,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = str(prepared.folder)
    status, found = answer(capsys, kind, "verify", "small", "--root", root)
    assert (status, found["ok"], found["stages"]) == (0, True, 1)
    assert found["target"].startswith(f"{kind}/small/")
    _, by_folder = answer(capsys, kind, "verify", f"{root}/{found['target']}")
    assert by_folder == found
    monkeypatch.chdir(prepared.folder.parent)
    status, of_root = answer(capsys, kind, "verify", prepared.folder.name)
    assert (status, of_root["stages"]) == (0, 2)
    assert f"has no {kind} named 'other': it has small." in fails(
        capsys, kind, "verify", "other", "--root", root
    )


def test_masks_build_says_that_it_needs_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = fails(capsys, "masks", "build", str(tmp_path), "--root", str(tmp_path / "root"))
    assert "is a folder, but this command needs a config" in sentence
    assert "masks.external" in sentence


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda p: p.prog)
def test_only_commands_with_stages_before_theirs_say_that_these_run(
    parser: argparse.ArgumentParser,
) -> None:
    says = "Earlier stages run first" in parser.format_help()
    assert says == (parser.get_default("stage") in ("train", "evaluate", "register"))


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_inspect_shows_a_set_and_writes_a_contact_sheet(
    prepared: LocalStore, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, root = tmp_path / "sheet.png", str(prepared.folder)
    status, found = answer(capsys, kind, "inspect", "small", "--root", root, "-o", str(sheet))
    assert status == 0
    assert found["sheet"] == str(sheet)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert cli.main([kind, "inspect", str(prepared.folder / found["folder"])]) == 0
    assert capsys.readouterr().out.startswith(found["folder"])


@pytest.mark.parametrize("out", ["nosuch/sheet.png", "."])
def test_a_contact_sheet_that_cannot_be_written_is_an_error(
    prepared: LocalStore, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("images", "inspect", "small", "--root", str(prepared.folder), "-o", out)
    assert "cannot be written. Name a PNG file" in fails(capsys, *words)


def test_the_log_lists_the_versions(
    prepared: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = answer(capsys, "images", "log", "small", "--root", str(prepared.folder))
    assert status == 0
    assert [version["version"] for version in found["versions"]] == [1]
    words = ("images", "log", "other", "--root", str(prepared.folder))
    assert "has no images named 'other': it has small." in fails(capsys, *words)


def test_a_misspelt_option_is_reported_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "the nearest is train.steps" in fails(capsys, "demo", "--set", "train.stepz=1")


def test_with_json_an_error_is_also_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "no-such-config", "--json"]) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out.strip().splitlines()[-1])
    assert answer["ok"] is False
    assert answer["error"] in err


def test_a_root_that_is_a_file_is_reported_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    sentence = fails(capsys, "masks", "build", "demo", "--root", str(tmp_path / "file"), status=1)
    assert str(tmp_path / "file") in sentence
    assert "there is a file where a folder is needed" in sentence
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_root_that_cannot_be_created_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be created" in fails(capsys, "demo", "--root", "/proc/dpnet", status=1)


def test_without_a_root_the_error_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--root DIR" in fails(capsys, "masks", "build", "places2")


def test_an_address_needs_the_launcher_ray_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "demo", "--root", str(tmp_path), "--address", "http://head:8265"]
    assert "add --launcher ray-job" in fails(capsys, *words)
    assert "runs in pods of its own: add" in fails(capsys, *words, "--launcher", "kuberay")
    assert not list(tmp_path.iterdir())


def test_an_operating_system_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: argparse.Namespace) -> Outcome:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(pipeline, "stage", full)
    sentence = fails(capsys, "train", "demo", status=1)
    assert "cannot use /data/x: the disk is full" in sentence


def test_an_internal_error_is_named_and_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: argparse.Namespace) -> Outcome:
        raise ValueError("an unexpected\nvalue")

    monkeypatch.setattr(pipeline, "stage", broken)
    sentence = fails(capsys, "train", "demo", status=1)
    assert "internal error: ValueError: an unexpected value" in sentence
    assert cli.main(["train", "demo", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_result_that_is_not_ok_is_printed_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "verify", lambda args: ({"ok": False, "files": 3}, "text"))
    assert cli.main(["verify", "x", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"ok": False, "files": 3}
    assert cli.main(["verify", "x"]) == 1
    assert capsys.readouterr().out == "text\n"


STOPPABLE = """
import sys, time
from dpnet.cli import main as cli
from dpnet.cli.commands import pipeline
def slow(args):
    print("working", flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep({cleaning})
pipeline.stage = slow
sys.exit(cli.main(["train", "demo"]))
"""


def stopped_by(*signals: signal.Signals, cleaning: float = 0.0) -> tuple[int, str, float]:
    """Send signals to a command; return its status, standard error and seconds until its end."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPABLE.format(cleaning=cleaning)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        start = time.monotonic()
        for each in signals:
            os.kill(process.pid, each)
            time.sleep(0.3)
        _, err = process.communicate(timeout=30)
    return process.returncode, err, time.monotonic() - start


@pytest.mark.parametrize("each", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_how_to_resume(each: signal.Signals) -> None:
    status, err, _ = stopped_by(each)
    assert (status, err) == (130, "dpnet: stopped; the same command resumes.\n")


def test_a_second_ctrl_c_ends_the_command_at_once() -> None:
    status, err, seconds = stopped_by(signal.SIGINT, signal.SIGINT, cleaning=20)
    assert (status, err) == (130, "dpnet: stopped; the same command resumes.\n")
    assert seconds < 10


def test_a_closed_standard_output_prints_no_error() -> None:
    code = (
        "import sys; from dpnet.cli import main as cli; from dpnet.cli.commands import data;"
        "data.verify = lambda args: ({'ok': True}, 'x' * 1_000_000);"
        "sys.exit(cli.main(['verify', 'x']))"
    )
    line = f'set -o pipefail; {sys.executable} -c "{code}" | head -c 1 > /dev/null'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture
def demo_root(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "demo")
    claim_root(store)
    return store


def test_a_demo_uses_a_new_or_empty_folder_or_its_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "new"):
        claim_root(LocalStore(tmp_path / name))
        assert (tmp_path / name / MARKER).is_file()


def test_a_demo_uses_a_folder_in_which_a_demo_was_killed_at_its_start(tmp_path: Path) -> None:
    (tmp_path / ".probe-1234").write_bytes(b"")
    claim_root(LocalStore(tmp_path))
    assert (tmp_path / MARKER).is_file()


def test_a_demo_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PipelineError, match="is not empty and no demo made it"):
        claim_root(LocalStore(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_fresh_removes_only_the_files_of_a_demo(demo_root: LocalStore) -> None:
    for key in ("images/demo/x/manifest.json", "runs/a/step-1/state.pt", "photos/train/cat.png"):
        demo_root.write(key, b"made by the demo")
    for key in ("mlflow.db", "holiday.jpg", "notes/plan.txt"):
        demo_root.write(key, b"x")
    clear_root(demo_root)
    assert [e.key for e in demo_root.list()] == ["holiday.jpg", MARKER, "notes/plan.txt"]


def test_fresh_removes_nothing_in_a_folder_without_a_demo(tmp_path: Path) -> None:
    LocalStore(tmp_path).write("images/thesis/figure.png", b"years of work")
    with pytest.raises(PipelineError, match="removes nothing"):
        clear_root(LocalStore(tmp_path))
    assert (tmp_path / "images/thesis/figure.png").is_file()


def test_fresh_does_not_follow_a_link_out_of_the_root(
    demo_root: LocalStore, tmp_path: Path
) -> None:
    LocalStore(tmp_path).write("elsewhere/big.tar", b"kept")
    (demo_root.folder / "images").symlink_to(tmp_path / "elsewhere")
    clear_root(demo_root)
    assert not (demo_root.folder / "images").exists()
    assert (tmp_path / "elsewhere/big.tar").read_bytes() == b"kept"


def test_fresh_removes_nothing_while_a_demo_is_running(
    demo_root: LocalStore,
) -> None:
    demo_root.write("images/demo/x/manifest.json", b"{}")
    demo_root.write("prefect/lock", b"")
    with (demo_root.folder / "prefect/lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(PipelineError, match="stop it before --fresh"):
            clear_root(demo_root)
    assert demo_root.exists("images/demo/x/manifest.json")


def test_fresh_on_a_missing_folder_does_nothing(tmp_path: Path) -> None:
    clear_root(LocalStore(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", [["train"], ["pipeline", "run"], ["demo"]])
def test_a_missing_file_of_vgg_weights_is_reported_before_any_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [] if command == ["demo"] else ["demo"]
    given = ["--root", str(tmp_path / "root"), "--set", "losses.vgg_weights=none.pth"]
    assert "which does not exist" in fails(capsys, *command, *config, *given)
    assert not (tmp_path / "root" / "images").exists()


def test_a_stop_that_prefect_turns_into_another_error_is_still_a_stop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(args: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise CancelledError from None  # like Prefect's futures

    monkeypatch.setattr(data, "verify", stopped)
    assert cli.main(["verify", "somewhere"]) == 130
    assert capsys.readouterr().err == "dpnet: stopped; the same command resumes.\n"


def test_deploy_shows_the_next_three_dates_of_each_schedule(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr("flows.deploy.deploy", lambda *_, **__: [])
    sets = ("--set", "watch=0 12 31 12 *", "--set", "retrain=null", "--set", "timezone=Asia/Tokyo")
    status, found = answer(capsys, "deploy", *sets)
    dates = found["next_dates"]["watch-raw-data"]
    assert (status, list(found["next_dates"]), len(dates)) == (0, ["watch-raw-data"], 3)
    assert all(date.endswith("-12-31T12:00:00+09:00") for date in dates)
    assert cli.main(["deploy", *sets]) == 0
    shown = ", ".join(f"{date[:4]}-12-31 12:00" for date in dates)
    assert f"next dates of watch-raw-data: {shown} (Asia/Tokyo)" in capsys.readouterr().out


def test_gc_refuses_a_root_that_is_given_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path)
    assert "the root is given twice" in fails(capsys, "gc", root, "--root", root)


def test_compare_names_folders_for_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b=c"):
        (tmp_path / name).mkdir()
    seen: list[Any] = []
    monkeypatch.setattr(
        "dpnet.cli.commands.pipeline.run_chain",
        lambda config, store, wanted, place: seen.append(config.evaluate.compare) or [],
    )
    root = ("--root", str(tmp_path / "root"))
    given = ["--compare", f"lama={tmp_path}/a", "--compare", f"x.2={tmp_path}/b=c"]
    assert cli.main(["evaluate", "demo", *root, *given]) == 0
    assert seen == [{"lama": f"{tmp_path}/a", "x.2": f"{tmp_path}/b=c"}]
    capsys.readouterr()
    twice = [f"lama={tmp_path}", f"lama={tmp_path}"]
    for wrong, said in ((["lama"], "write --compare NAME=DIR"), (twice, "the name 'lama' twice")):
        given = [word for each in wrong for word in ("--compare", each)]
        assert said in fails(capsys, "evaluate", "demo", *root, *given)
    assert "evaluate.compare.x names" in fails(
        capsys, "evaluate", "demo", *root, "--compare", f"x={tmp_path}/missing"
    )
    assert "another name than dpnet, which every report has already" in fails(
        capsys, "evaluate", "demo", *root, "--compare", f"dpnet={tmp_path}"
    )


@pytest.mark.parametrize("given", [[], ["--ray", "10.0.0.5:6379"]])
def test_the_evaluation_runs_on_a_cluster_if_one_is_named(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "dpnet.cli.commands.pipeline.run_chain",
        lambda config, store, wanted, place: seen.append((wanted, place)) or [],
    )
    monkeypatch.setattr("dpnet.pipeline.ray_data.ray_data", lambda address: f"at {address}")
    assert cli.main(["evaluate", "demo", "--root", str(tmp_path / "root"), *given]) == 0
    assert seen == [("evaluate", "at 10.0.0.5:6379" if given else None)]


def test_pairs_are_exported_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small_root.photographs(tmp_path / "photos")
    config = tmp_path / "small.yaml"
    config.write_text(
        f"name: small\nimages: {{source: {source}, size: 32}}\n"
        "masks: {size: 32, train: 4, eval_per_bin: 1, recipes: {free-form: 1}}\n"
    )
    folder, root = tmp_path / "pairs", tmp_path / "root"
    command = ["evaluate", str(config), "--root", str(root), "--export-pairs", str(folder)]
    assert cli.main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["pairs"] == len(list((folder / "masked").iterdir())) > 1
    assert not (root / "runs").exists()
    assert "is not an empty folder" in fails(capsys, *command)
    inside = [*command[:-1], str(tmp_path / "photos" / "pairs")]
    assert "the pairs would become photos" in fails(capsys, *inside)
    assert not (tmp_path / "photos" / "pairs").exists()


@pytest.mark.parametrize(
    ("stage", "summary", "expected"),
    [
        ("train", {"steps": 5, "resumed_from": 0}, ["dpnet evaluate demo --root ROOT --set a=b"]),
        ("evaluate", {"pairs": 5}, ["report  ROOT/folder/report.html", "dpnet register demo --"]),
        (
            "register",
            {"model": "dpnet", "version": 2, "alias": "challenger", "reason": "It is worse."},
            ["dpnet version 2 became challenger, not champion. It is worse.", "registry promote 2"],
        ),
    ],
)
def test_a_stage_of_a_model_says_what_it_gave_and_what_to_do_next(
    stage: str,
    summary: dict[str, Any],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ref = StageRef(stage, "demo", "folder", "0" * 64, "1" * 64, 1.0, summary=summary, skipped=False)
    monkeypatch.setattr(pipeline, "run_chain", lambda *_, **__: [ref])
    root = str(tmp_path / "root")
    given = ["--root", root, "--set", "train.seed=3"]
    assert cli.main([stage, "demo", *given]) == 0
    text = capsys.readouterr().out
    for words in expected:
        assert words.replace("ROOT", root).replace("a=b", "train.seed=3") in text
