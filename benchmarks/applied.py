"""Latency of a trained model: `mnist predict` on one image, and an answer on the drawing page.

    python benchmarks/applied.py                       # nine rounds, under two minutes

predict   seconds of `mnist predict IMAGE`, beside those of a Python process that only imports torch
draw      milliseconds per answer of `mnist draw` to a POST of 420 x 280 pixels, as the page sends it; 200 digits
"""

import http.client
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import ROOT, command_line, header, interleave, print_table, run, spread
from PIL import Image, ImageOps


def time_answers(model: Path, images: list[bytes]) -> list[float]:
    """Milliseconds until `mnist draw` has answered each image."""
    command = [sys.executable, "-m", "mnist", "draw", "--model", str(model), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        milliseconds = []
        for image in images:
            started = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/answer", image)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.read()
            connection.close()
            milliseconds.append(1000 * (time.perf_counter() - started))
        return milliseconds
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    from mnist.models.by_name import build_model
    from mnist.models.saved import ModelConfig, save_model
    from tests.support.handwriting import draw_digit

    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--architecture", default="cnn", help="the network, with fresh weights (default: cnn)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    digits = [ImageOps.invert(draw_digit(number % 10, rng).convert("L")) for number in range(200)]
    with tempfile.TemporaryDirectory() as scratch:
        model, image = Path(scratch, "model"), Path(scratch, "digit.png")
        config = ModelConfig(arguments.architecture, tuple("0123456789"), (28, 28), "mnist", preparation="digit")
        save_model(build_model(arguments.architecture, 10), model, config)
        digits[0].save(image)
        commands = {
            "import torch": ("-c", "import torch"),
            "mnist predict": ("-m", "mnist", "predict", image, "--model", model),
        }
        contestants = {name: lambda _, words=words: {"seconds": run(*words)} for name, words in commands.items()}
        results = interleave(contestants, arguments.rounds)
        images = []
        for digit in digits:
            buffer = io.BytesIO()
            page = Image.new("L", (420, 280))
            page.paste(digit.resize((280, 280), Image.Resampling.BOX), (70, 0))
            page.save(buffer, format="PNG")
            images.append(buffer.getvalue())
        milliseconds = time_answers(model, images)

    print(header("torch", "pillow"))
    print_table(results, "import torch")
    print(f"\nan answer on the drawing page, ms   {spread(milliseconds)}")
    print(f"  95th percentile, ms               {sorted(milliseconds)[19 * len(milliseconds) // 20]:.1f}")


if __name__ == "__main__":
    main()
