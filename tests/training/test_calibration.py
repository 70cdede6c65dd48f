"""Temperature and threshold from the validation images."""

import torch

from mnist.training.calibration import Calibration, Calibrator

CPU = torch.device("cpu")


def outputs(count: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities that are `scale` times too extreme for their classes, the classes, and a weight of 1 each."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 10, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (scale * logits).log_softmax(1), y, torch.ones(count)


def calibrated(*batches: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Calibration:
    calibrator = Calibrator(CPU, torch.float64)
    for batch in batches:
        calibrator.add(*batch)
    calibration = calibrator.result(calibrator.sums)
    assert calibration is not None
    return calibration


def test_the_temperature_undoes_overconfidence_and_underconfidence() -> None:
    for scale in (0.5, 1.0, 2.5):
        temperature = calibrated(outputs(20_000, scale)).temperature
        assert abs(temperature / scale - 1) < 0.1


def test_99_percent_of_the_images_reach_the_threshold() -> None:
    output, y, weight = outputs(20_000, 1.5)
    temperature, threshold = calibrated((output, y, weight))
    confidence = (output / temperature).softmax(1).amax(1)
    assert 0.99 <= float((confidence >= threshold).double().mean()) < 0.993


def test_calibration_sums_over_batches_and_processes_and_ignores_padding() -> None:
    output, y, weight = outputs(6000, 2.0)
    parts = [Calibrator(CPU, torch.float64) for _ in range(2)]
    for number, batch in enumerate(zip(output.split(700), y.split(700), weight.split(700), strict=True)):
        parts[number % 2].add(*batch)
    parts[0].add(output[:50].flip(1), y[:50], torch.zeros(50))
    assert parts[0].result(parts[0].sums + parts[1].sums) == calibrated((output, y, weight))


def test_too_few_images_give_no_calibration() -> None:
    calibrator = Calibrator(CPU, torch.float64)
    calibrator.add(*outputs(400, 1.0))
    assert calibrator.result(calibrator.sums) is None
