"""Architectures with random weights, small enough to be tuned in a minute: what `benchmarks/coverage.py` tunes."""

from __future__ import annotations

from zoo import audio, language, plain, vision
from zoo.base import Architecture, Specimen

__all__ = ["ALL", "Architecture", "Specimen"]

ALL: tuple[Architecture, ...] = (*vision.ALL, *language.ALL, *audio.ALL, *plain.ALL)
