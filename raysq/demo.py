"""The demo: a small CNN on scikit-learn's handwritten digits, quantized in about a minute."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raysq

__all__ = ["DigitsCNN", "main", "workload"]

TRAINING_IMAGES = 1200  # of 1,797; the rest is what accuracy is measured on
CALIBRATION_IMAGES = 300
BATCH = 64
EPOCHS = 8


class DigitsCNN(nn.Module):
    """Three convolutions and two linear layers for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        """Return the logits of the ten digits."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


def workload() -> tuple[nn.Module, DataLoader[tuple[Tensor, ...]], Callable[[nn.Module], float]]:
    """Train the model in a few seconds; return it, calibration data, and the function that scores it.

    Raises:
        SystemExit: scikit-learn isn't installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the demo's data comes with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    model = _train(images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES])

    calib = DataLoader(TensorDataset(images[:CALIBRATION_IMAGES], labels[:CALIBRATION_IMAGES]), batch_size=BATCH)
    held_out = list(DataLoader(TensorDataset(images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]), batch_size=BATCH))

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in held_out)
        return right / (len(images) - TRAINING_IMAGES)

    return model, calib, accuracy


def _train(images: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = DigitsCNN()
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    """Train, search, save, load again, and print what was measured.

    Args:
        arguments: of the command line, without the program's name; None takes the real ones.
    """
    parser = argparse.ArgumentParser(prog="raysq demo", description=__doc__)
    parser.add_argument("--max-trials", type=int, default=12, help="trials of the search (default: 12)")
    parser.add_argument("--out", type=Path, default=Path("raysq_runs/demo"), help="where the int8 model is saved")
    options = parser.parse_args(arguments)

    print("training a small CNN on scikit-learn's digits ...")
    model, calib, accuracy = workload()

    result = raysq.tune(model, calib, accuracy, tolerance=0.01, max_trials=options.max_trials)

    result.save(options.out)
    loaded = raysq.load(options.out)
    batch = next(iter(calib))[0]
    if not torch.equal(loaded(batch), result.model(batch)):
        raise SystemExit(f"the model loaded from {options.out} gives other outputs than the one that was saved")

    baseline, ratio = result.baseline, result.latency_ratio
    print(f"fp32       accuracy {baseline.accuracy:.4f}   {baseline.latency_ms:.3f} ms ({baseline.form})")
    print(f"int8       accuracy {result.accuracy:.4f}   {result.latency_ms:.3f} ms")
    print(f"ratio      {ratio:.3f} of the fastest fp32's time [{ratio.low:.3f}, {ratio.high:.3f}]")
    print(f"speed-up   {result.speedup:.2f}x, measured in interleaved pairs")
    print(f"loaded     {options.out} gives the same outputs; accuracy {accuracy(loaded):.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
