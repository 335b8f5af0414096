"""The first training step in a new process: without compiled code on disk, and with it.

    python benchmarks/first_step.py [--preset base] [--batch 16] [--cache DIR] [--json]

Two processes do the same with one folder of compiled code. It is empty for the first ("cold") and
has the first one's code for the second ("warm"). Each makes a whole step without and then one with
the adversarial loss, as in training, each twice: the second time nothing is compiled. `cold_s` and
`warm_s` are the first steps of both kinds together. The start of the process, with imports and
building the networks, is a row of its own. On a CPU nothing is compiled without --compile.

It needs only torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

START = time.perf_counter()

import torch  # noqa: E402
from compare import Row, in_a_process, report  # noqa: E402
from step import LOSSES, SETTINGS, options_of_a_step, random_batch, wait  # noqa: E402
from step import feature_network as vgg  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.model import PRESETS  # noqa: E402
from dpnet.training.state import TrainState  # noqa: E402
from dpnet.training.step import Step  # noqa: E402

ROWS = {
    "start": "start of the process",
    "first": "first step",
    "second": "the same again",
    "first_gan": "first step with GAN",
    "second_gan": "with GAN again",
}


def main() -> None:
    """Measure a cold and a warm process, and print the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = options_of_a_step(__doc__, device)
    parser.add_argument("--cache", type=Path, help="empty folder of compiled code (default: a new)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, device)))
        return
    with tempfile.TemporaryDirectory(prefix="dpnet-first-step-") as folder:
        cache = (options.cache or Path(folder)).absolute()
        if cache.exists() and any(cache.iterdir()):
            parser.error(f"--cache names {cache}, which is not empty: give an empty folder")
        places = {
            "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")
        }  # fmt: skip
        rows, ratios = [], {}
        for kind in ("cold", "warm"):
            print(f"{kind}: a new process", file=sys.stderr, flush=True)
            seconds = in_a_process(
                [sys.executable, __file__, *sys.argv[1:], "--one"], {**os.environ, **places}
            )
            rows += [Row(f"{kind}: {ROWS[name]}", [s], "s") for name, s in seconds.items()]
            ratios[f"{kind}_s"] = seconds["first"] + seconds["first_gan"]
            # At once, so that it is known if the second process takes too long.
            print(f"{kind}: {json.dumps(seconds)}", file=sys.stderr, flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    title = (
        f"First steps of {options.preset}, batch {options.batch} of {options.size} x"
        f" {options.size}, {'' if options.compile else 'not '}compiled, {where}"
    )
    report(f"{title}, torch {torch.__version__}", rows, ratios, as_json=options.json)


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the seconds of the start, and of each first and second step."""
    settings = SimpleNamespace(**{**vars(SETTINGS), "adversarial_from": 1})
    state = TrainState(PRESETS[options.preset], settings, device)  # type: ignore[arg-type]
    step = Step(
        state,
        LOSSES,  # type: ignore[arg-type]
        settings,  # type: ignore[arg-type]
        vgg=vgg(options.vgg, device),
        bf16=device.type == "cuda",
        backend="inductor" if options.compile else None,
    )
    image, valid = random_batch(options, device)
    wait(device)
    seconds, last = {"start": time.perf_counter() - START}, time.perf_counter()
    # The adversarial loss begins at step 1.
    for name, number in (("first", 0), ("second", 0), ("first_gan", 1), ("second_gan", 1)):
        step(number, image, valid)
        wait(device)
        now = time.perf_counter()
        seconds[name], last = now - last, now
    return seconds


if __name__ == "__main__":
    main()
