"""How long a trained model takes to be applied: `mnist predict` of one image, and an answer on the page to draw on.

    python benchmarks/applied.py                       # nine rounds, under two minutes

predict   seconds of `mnist predict IMAGE`, beside those of a Python that imports torch and does nothing else, in turns
draw      milliseconds from a picture of 280 x 280 pixels that is sent to `mnist draw`, a process of its own, to the
          answer, as the page does it; 200 drawn digits

Medians, least and most.
"""

import argparse
import http.client
import io
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder


def seconds(*command: str) -> float:
    """How long a command takes."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def answers(model: Path, pictures: list[bytes]) -> list[float]:
    """Milliseconds for each picture that `mnist draw` is sent."""
    command = [sys.executable, "-m", "mnist", "draw", "--model", str(model), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        taken = []
        for picture in pictures:
            started = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/answer", picture)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.read()
            connection.close()
            taken.append(1000 * (time.perf_counter() - started))
        return taken
    finally:
        server.terminate()
        server.wait()


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main() -> None:
    from mnist.models.by_name import build_model
    from mnist.models.saved import ModelConfig, save_model
    from tests.support.handwriting import draw_digit

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="times that each command is run (default: 9)")
    parser.add_argument("--architecture", default="cnn", help="the network, with fresh weights (default: cnn)")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rng = np.random.default_rng(0)
    digits = [ImageOps.invert(draw_digit(number % 10, rng).convert("L")) for number in range(200)]
    with tempfile.TemporaryDirectory() as scratch:
        model, image = Path(scratch, "model"), Path(scratch, "digit.png")
        names = tuple("0123456789")
        save_model(
            build_model(arguments.architecture, 10),
            model,
            ModelConfig(arguments.architecture, names, (28, 28), "mnist", preparation="digit"),
        )
        digits[0].save(image)
        torch_alone, predict = [], []
        for _ in range(arguments.rounds):
            torch_alone.append(seconds(sys.executable, "-c", "import torch"))
            predict.append(seconds(sys.executable, "-m", "mnist", "predict", str(image), "--model", str(model)))
        pictures = []
        for digit in digits:
            buffer = io.BytesIO()
            digit.resize((280, 280), Image.Resampling.BOX).save(buffer, format="PNG")
            pictures.append(buffer.getvalue())
        milliseconds = answers(model, pictures)

    ratios = [one / other for one, other in zip(predict, torch_alone, strict=True)]
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {version('torch')}, pillow {version('pillow')}")
    print(f"python {shlex.join(['benchmarks/applied.py', *sys.argv[1:]])}\n")
    print(f"import torch, s                      {spread(torch_alone)}")
    print(f"mnist predict of an image, s         {spread(predict)}")
    print(f"  ratio                              {spread(ratios)}")
    print(f"an answer on the page to draw on, ms {spread(milliseconds, '.1f')}")
    print(f"  nineteen of twenty within, ms      {sorted(milliseconds)[19 * len(milliseconds) // 20]:.1f}")


if __name__ == "__main__":
    main()
