"""The Triton kernels of attention, without a GPU; `test_gpu.py` runs them on one.

The slow tests use Triton's interpreter and its compiler, in processes of their own. The fast ones
are for the check that comes before the first use.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpnet.model import attention as A
from dpnet.model import attention_blocks
from dpnet.model import attention_check as check

SCRIPT = Path(__file__).parents[3] / "support" / "attention_kernels_on_cpu.py"
CPU = torch.device("cpu")
# The interpreter rounds to bfloat16 by cutting off, a GPU to the nearest. Other cases are float64.
LIMITS = {"bf16": 2e-2, "fp32": 1e-5}


def printed(*arguments, interpret):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_output_and_gradients_of_the_kernels_are_those_of_the_definition_in_float64():
    pytest.importorskip("triton")
    found = printed(interpret=True)
    assert len(found) == 12
    too_far = {
        (case, name): far
        for case, differences in found.items()
        for name, far in differences.items()
        if not far < LIMITS.get(case, 1e-9)
    }
    assert too_far == {}


@pytest.mark.slow
def test_the_compiler_makes_five_kernels_for_a_card_whatever_the_sizes(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = printed("--compile", interpret=False)
    counts = {name: len(sizes) for name, sizes in found.items()}
    assert counts == {"weigh": 2, "differentiate": 1, "spread": 2}  # two have two forms
    assert all(size > 1000 for sizes in found.values() for size in sizes)


@pytest.fixture
def _unchecked():
    check.checked_kernels.cache_clear()
    yield
    check.checked_kernels.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    """Stand in for `attention_triton`, with the results of torch's own operations."""

    class Kernels:
        forward = staticmethod(attention_blocks.forward)
        backward = staticmethod(attention_blocks.backward)

    monkeypatch.setitem(sys.modules, "dpnet.model.attention_triton", Kernels)
    monkeypatch.setattr("dpnet.model.attention_triton", Kernels, raising=False)
    return Kernels


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("kind", check.LIMITS)
def test_right_kernels_pass_the_check(kernels, kind):
    assert check.checked_kernels(CPU, kind) is kernels


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", ["output", "d_q", "d_k", "d_v", "d_row", "d_column"])
def test_kernels_with_one_wrong_result_are_not_used(kernels, monkeypatch, name):
    def forward(*inputs):
        return attention_blocks.forward(*inputs) * (1.1 if name == "output" else 1)

    def backward(*inputs):
        found = list(attention_blocks.backward(*inputs))
        if name != "output":
            found[["d_q", "d_k", "d_v", "d_row", "d_column"].index(name)].mul_(float("nan"))
        return found

    monkeypatch.setattr(kernels, "forward", forward)
    monkeypatch.setattr(kernels, "backward", backward)
    with pytest.warns(UserWarning, match=rf"without Triton.* wrong for torch.bfloat16: .*{name}"):
        assert check.checked_kernels(CPU, torch.bfloat16) is None


@pytest.mark.usefixtures("_unchecked")
def test_kernels_that_do_not_run_are_not_used_and_the_reason_is_said_once(kernels, monkeypatch):
    def forward(*inputs):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(kernels, "forward", forward)
    q = torch.randn(1, 2, 2, 3)
    with pytest.warns(UserWarning, match="without Triton.* RuntimeError: no C compiler$") as seen:
        forms = [A._form(q, q, q, True) for _ in range(2)]
    assert forms == [attention_blocks, attention_blocks]
    assert len(seen) == 1


@pytest.mark.usefixtures("_unchecked")
def test_without_triton_attention_runs_by_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "dpnet.model.attention_triton", None)
    monkeypatch.delattr("dpnet.model.attention_triton", raising=False)
    with pytest.warns(UserWarning, match="without Triton, which is slower: it does not import"):
        assert check.checked_kernels(CPU, torch.float32) is None


@pytest.mark.usefixtures("_unchecked")
def test_types_that_have_no_kernels_are_computed_by_torch(kernels):
    q, other = torch.randn(1, 2, 2, 3), torch.randn(1, 2, 2, 3).bfloat16()
    assert A._form(q, q, q, True) is kernels
    assert A._form(q, q, q, False) is attention_blocks
    assert A._form(q, q, other, True) is attention_blocks
    assert A._form(q.half(), q.half(), q.half(), True) is attention_blocks
