"""Write requirements-cpu.lock and requirements-cuda.lock from pyproject.toml and constraints.txt.

    python infra/docker/lock.py

Run it after a change of one of the two. It asks PyPI for the hashes of all wheels, and needs uv.
The CPU image has torch's CPU build, which is not on PyPI: its hash is below.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
EXTRAS = ("kubernetes", "export")
PYTHON, PLATFORM = "3.11.14", "x86_64-manylinux_2_28"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# torch-VERSION+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, by torch's version.
TORCH_CPU = {"2.13.0": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}
_ONLY_CUDA = re.compile(r"(nvidia|cuda)-|triton$")


def main() -> int:
    """Write both files. Return the exit status."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml",
        *(word for extra in EXTRAS for word in ("--extra", extra)),
        "--constraint", "constraints.txt", "--generate-hashes", "--only-binary", ":all:",
        "--python-version", PYTHON, "--python-platform", PLATFORM,
        "--no-annotate", "--no-header", "--no-emit-index-url",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    blocks = re.findall(r"^[^\s#-][^\n]*\n(?:    [^\n]*\n)*", done.stdout, re.MULTILINE)
    head = "# Written by infra/docker/lock.py: do not change it by hand.\n"
    (HERE / "requirements-cuda.lock").write_text(head + "".join(blocks), "utf-8")
    cpu = "".join(map(_cpu, blocks))
    index = f"--extra-index-url {TORCH_INDEX}\n"
    (HERE / "requirements-cpu.lock").write_text(head + index + cpu, "utf-8")
    return 0


def _cpu(block: str) -> str:
    """Return a requirement for the CPU image: torch's CPU build, and nothing of CUDA."""
    name, _, version = block.split()[0].partition("==")
    if name == "torch":
        return f"torch=={version}+cpu \\\n    --hash=sha256:{TORCH_CPU[version]}\n"
    return "" if _ONLY_CUDA.match(name) else block


if __name__ == "__main__":
    sys.exit(main())
