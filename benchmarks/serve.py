"""Load on `dpnet serve`: requests of several clients at the same time, and its memory.

    python benchmarks/serve.py [--requests 200] [--clients 20] [--side 256] [--preset tiny] [--json]

It serves random weights as a folder and sends photos of random colours with a hole of a quarter of
their area. Every answer must come, with the known pixels of its photo. It measures the time of each
request as a client sees it, the processor time of the server for each request, and the server's
memory after a tenth of the requests and at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from compare import Row, report
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.core.storage.local import LocalStore
from dpnet.model import build_generator
from dpnet.model.config import PRESETS
from dpnet.model_store.layout import EXPORTED
from dpnet.model_store.weights import save_generator


def main() -> None:
    """Serve random weights, send the requests, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=200, help="all requests (default: 200)")
    parser.add_argument("--clients", type=int, default=20, help="at the same time (default: 20)")
    parser.add_argument("--side", type=int, default=256, help="pixels of a photo (default: 256)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="network (default: tiny)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        generator = build_generator(args.preset)
        save_generator(LocalStore(Path(folder)), "model", generator, {}, EXPORTED)
        command = [sys.executable, "-m", "dpnet", "serve", "--model", f"{folder}/model"]
        server = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
        try:
            rows = measure(server, args)
        finally:
            server.terminate()
            server.wait()
    title = f"{args.requests} requests of {args.clients} clients, {args.preset}, {args.side}^2"
    report(title, rows, {}, as_json=args.json)


def measure(server: subprocess.Popen[str], args: argparse.Namespace) -> list[Row]:
    """Send all requests, and return what was measured."""
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    photos = [photo(args.side, seed) for seed in range(10)]
    mask = hole(args.side)
    first = max(args.clients, args.requests // 10)
    with ThreadPoolExecutor(args.clients) as clients:

        def send(number: int) -> float:
            return fill(url, photos[number % 10], mask)

        times = list(clients.map(send, range(first)))
        warm, used, start = memory_mb(server.pid), processor_s(server.pid), time.monotonic()
        rest = list(clients.map(send, range(first, args.requests)))
    seconds, used = time.monotonic() - start, processor_s(server.pid) - used
    return [
        Row("answered", [float(len(times + rest))], "requests"),
        Row("as a client sees it", rest, "s"),
        Row("all together", [len(rest) / seconds], "requests/s"),
        Row("processor time of the server", [used / len(rest)], "s/request"),
        Row(f"memory after {first} requests", [warm], "MB"),
        Row("memory at the end", [memory_mb(server.pid)], "MB"),
    ]


def photo(side: int, seed: int) -> bytes:
    """Return a photo of random colours as PNG."""
    made = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return png(Image.fromarray(made))


def hole(side: int) -> bytes:
    """Return a mask with a hole of a quarter of the area."""
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    return png(mask)


def png(image: Image.Image) -> bytes:
    """Return a picture as a PNG file, with little work."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def fill(url: str, image: bytes, mask: bytes) -> float:
    """Send a request until it is accepted, check the answer, and return its seconds."""
    part = b'--cut\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = part % (b"image", image) + part % (b"mask", mask) + b"--cut--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=cut"}
    start = time.monotonic()
    while True:
        request = urllib.request.Request(f"{url}/api/inpaint", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                found = np.asarray(Image.open(io.BytesIO(answer.read())))
            break
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            time.sleep(0.1)
    sent = np.asarray(Image.open(io.BytesIO(image)))
    known = np.asarray(Image.open(io.BytesIO(mask))) == 0
    assert (found[known] == sent[known]).all()
    return time.monotonic() - start


def memory_mb(pid: int) -> float:
    """Return the memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def processor_s(pid: int) -> float:
    """Return the processor time of a process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
