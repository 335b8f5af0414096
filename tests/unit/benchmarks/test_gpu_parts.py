"""The parts of `make gpu`: kinds of kernels, the tests it runs, the folder that is taken along."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from torch.autograd import DeviceType

from data_prep.core.errors import PipelineError

REPOSITORY = Path(__file__).parents[3]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> Iterator[SimpleNamespace]:
    """Import the scripts as they import each other, and forget them afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    names = ("kernels", "gpu_tests", "gpu_pack", "gpu_data")
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = before
        for file in BENCHMARKS.glob("*.py"):
            sys.modules.pop(file.stem, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc",
            "convolution, forward",
        ),
        ("sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_nhwc", "convolution, backward"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_dgrad>", "convolution, backward"),
        ("aten::convolution_backward", "convolution, backward"),
        ("aten::mkldnn_convolution", "convolution, forward"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("triton_poi_fused_add_convolution_mul_3", "element-wise, compiled"),
        ("triton_red_fused_native_group_norm_12", "element-wise, compiled"),
        ("_attention_forward", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and layout"),
        ("void cudnn::ops::nhwcToNchwKernel<float>", "copies and layout"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "element-wise, other"),
        ("my_own_kernel", "other"),
    ],
)
def test_a_kernel_has_a_kind_by_its_name(parts: Any, name: str, kind: str) -> None:
    assert parts.kernels.kind_of(name) == kind


def event(name: str, microseconds: float, *, device: bool) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if device else DeviceType.CPU,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        self_cpu_time_total=microseconds / 2,
    )


def test_the_time_of_kernels_is_counted_once(parts: Any) -> None:
    events = [
        event("aten::mm", 100, device=False),
        event("gemm", 2000, device=True),
        event("gemm", 1000, device=True),
        event("ProfilerStep#2", 9000, device=True),
    ]
    assert parts.kernels.durations(events, cuda=True) == {"gemm": 3.0}
    on_cpu = parts.kernels.durations(events[:1], cuda=False)
    assert on_cpu == {"aten::mm": 0.05}


def test_kinds_are_summed_and_the_longest_comes_first(parts: Any) -> None:
    found = parts.kernels.by_kind({"gemm_a": 1.0, "gemm_b": 2.0, "wgrad": 5.0})
    assert list(found.items()) == [("convolution, backward", 5.0), ("matrix products", 3.0)]


def test_every_test_that_needs_a_gpu_is_taken_along_with_its_imports(parts: Any) -> None:
    tests = REPOSITORY / "tests"
    needed = {
        path.relative_to(tests).as_posix() for path in parts.gpu_tests.needed_files(REPOSITORY)
    }
    assert "unit/dpnet/training/test_gpu.py" in needed
    assert "unit/dpnet/training/test_step.py" in needed  # its neighbour imports it
    assert "support/random_weights.py" in needed
    assert "unit/dpnet/training/test_loop.py" not in needed
    marked = {
        path.relative_to(tests).as_posix()
        for path in tests.rglob("test_*.py")
        if re.search(r"mark\.gpu\b", path.read_text("utf-8"))
    }
    assert marked <= needed


@pytest.mark.parametrize(
    ("outcomes", "status", "gpu", "expected"),
    [
        ((5, 0, 0), 0, True, 0),
        ((4, 1, 0), 1, True, 1),
        ((0, 0, 5), 0, False, 77),
        ((0, 1, 0), 2, False, 1),
        ((4, 0, 1), 0, True, "there is a GPU, but not every test that needs one ran"),
        ((0, 0, 0), 0, True, "there is a GPU, but not every test that needs one ran"),
    ],
)
def test_with_a_gpu_every_test_must_run(
    parts: Any, outcomes: tuple[int, ...], status: int, gpu: bool, expected: int | str
) -> None:
    counted = dict(zip(("passed", "failed", "skipped"), outcomes, strict=True))
    assert parts.gpu_tests.verdict(counted, status, gpu=gpu) == expected


def test_photos_are_taken_evenly_and_at_most_so_many(parts: Any, tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "LICENSE").write_text("")
    taken = parts.gpu_data.evenly_spaced(tmp_path, 4)
    assert [path.name for path in taken] == ["0.png", "2.png", "5.png", "7.png"]
    assert len(parts.gpu_data.evenly_spaced(tmp_path, 99)) == 10


def test_a_folder_without_photos_is_refused(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"has no photos: name a folder that has some\.$"):
        parts.gpu_data.evenly_spaced(tmp_path, 4)


def test_a_folder_that_exists_is_not_touched(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="exists: delete it, or choose another"):
        parts.gpu_pack.pack(tmp_path, tmp_path, "3.12", 10)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_had_is_said_in_one_sentence(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'WARNING: slow' >&2; echo 'ERROR: no route' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(PipelineError, match=r"for Python 3.12 \(no route\): check the network"):
        parts.gpu_pack.unpack_libraries(tmp_path / "site", "3.12")


def test_a_folder_that_would_be_too_large_is_not_made(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.gpu_pack, "unpack_libraries", lambda site, python: None)
    monkeypatch.setattr(
        parts.gpu_pack, "write_sets", lambda folder, photos, most: folder.mkdir(parents=True)
    )
    monkeypatch.setattr(parts.gpu_pack, "MOST_MB", 1)
    out = tmp_path / "pack"
    with pytest.raises(PipelineError, match=r"more than 1: take fewer photos with --most \d+\.$"):
        parts.gpu_pack.pack(out, tmp_path, "3.12", 100)
    assert list(tmp_path.iterdir()) == []
