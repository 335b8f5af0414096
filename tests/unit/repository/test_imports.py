"""The rules for imports: their direction, and which ones must stay cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
OURS = ("data_prep", "dpnet", "flows")
HEAVY = ("torch", "ray", "prefect", "mlflow", "pyarrow", "cv2", "skimage", "matplotlib")
COMMANDS = "dpnet/cli/commands"  # they start the flow


def modules(folder: str) -> list[Path]:
    found = sorted((REPOSITORY / folder).rglob("*.py"))
    assert found, f"{folder} has no modules"
    return found


def imported(path: Path) -> set[str]:
    """Return the top-level names of every import in a file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            names.add(str(node.module).split(".")[0])
    return names


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules in a new interpreter after `statement`."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("path", modules("data_prep"), ids=lambda p: p.name)
def test_data_prep_imports_no_models_flows_or_their_libraries(path: Path) -> None:
    assert not imported(path) & {"dpnet", "flows", "torch", "ray", "prefect", "mlflow"}


@pytest.mark.parametrize("path", modules("dpnet"), ids=lambda p: p.name)
def test_dpnet_does_not_import_flows_except_to_start_them(path: Path) -> None:
    if path.parent.relative_to(REPOSITORY).as_posix() != COMMANDS:
        assert not imported(path) & {"flows", "prefect"}


@pytest.mark.parametrize("path", modules("dpnet/model"), ids=lambda p: p.name)
def test_the_network_needs_only_torch(path: Path) -> None:
    allowed = {"torch", "dpnet"} | sys.stdlib_module_names
    if path.name == "attention_kernels.py":  # the next test: nothing imports it without need
        allowed |= {"triton"}
    assert imported(path) <= allowed
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dpnet"):
            assert str(node.module).startswith("dpnet.model")


def test_the_network_does_not_load_the_kernels_of_a_gpu_before_it_uses_them() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import dpnet.model, dpnet.model.generator;"
        " assert 'dpnet.model.attention_triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_only_flows_import_prefect() -> None:
    users = {folder for folder in OURS for p in modules(folder) if "prefect" in imported(p)}
    assert users == {"flows"}


def test_the_command_starts_without_any_library() -> None:
    assert not loaded_by("import dpnet.cli.main") & {*HEAVY, "numpy", "pydantic", "yaml"}


def test_a_pipeline_of_finished_stages_needs_no_heavy_library() -> None:
    assert not loaded_by("import dpnet.pipeline.chain, dpnet.cli.commands.pipeline") & set(HEAVY)


@pytest.mark.parametrize(
    "script",
    [
        "dpnet/training/step.py",
        "benchmarks/attention.py",
        "benchmarks/step.py",
        "benchmarks/first_step.py",
        "benchmarks/kernels.py",
        "benchmarks/inpaint.py",
    ],
)
def test_the_training_step_and_the_benchmarks_of_the_network_need_only_torch(script: str) -> None:
    libraries = ("pydantic", "ray", "prefect", "mlflow", "boto3", "yaml", "PIL", "cv2", "skimage")
    code = (
        f"import runpy, sys; sys.path[:0] = ['.', 'benchmarks'];"
        f" sys.modules.update(dict.fromkeys({libraries})); runpy.run_path({script!r})"
    )  # a module that is None in sys.modules cannot be imported
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    "module", ["dpnet.training.loop", "dpnet.training.result", "dpnet.training.extend"]
)
def test_the_training_loop_needs_neither_ray_nor_prefect_nor_mlflow(module: str) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'prefect', 'mlflow')));"
        f" import {module}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


ASKS_FOR_A_LOCAL_STORE = re.compile(r"isinstance\([^()]*\bLocalStore\b")


@pytest.mark.parametrize("folder", OURS)
def test_only_storage_asks_which_kind_of_store_it_has(folder: str) -> None:
    storage = REPOSITORY / "data_prep" / "core" / "storage"
    outside = [path for path in modules(folder) if not path.is_relative_to(storage)]
    asking = [path for path in outside if ASKS_FOR_A_LOCAL_STORE.search(path.read_text("utf-8"))]
    assert asking == [], "use store.local_folder or store.label"
