"""AdaRound: each weight goes to the grid point below or above it, whichever serves the layer's output.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", https://arxiv.org/abs/2004.10568:
the asymmetric reconstruction of eq. 25 without its activation function, relaxed by the rectified sigmoid of eq. 23
and the regularizer of eq. 24. With w = scale * t and ŵ = scale * (t + e) it is, in units of scale²,

    |x t - x̂ (t + e)|² = |x̂ e|² - 2 e·c + const        c = x̂ᵀ (x - x̂) t

so outputs are independent of each other, and the triangular factor of x̂ᵀx̂ replaces the rows however many they are.
The paper has 2,000 times as many rows, every position of 1,024 images. Hence three differences:

- x̂ᵀx̂ is shrunk toward its diagonal by inputs / (inputs + n), and c toward 0 by James and Stein's factor. On rows
  it hasn't seen, a transformer with n = inputs = 256 then errs 13 % less than rounded to nearest; 7 % more without.
- After few steps, weights change sides one by one while that helps: as good as ten times the steps.
- An output whose error on the rows didn't fall stays rounded to nearest.

rows x, x̂, factor    (groups, n, inputs)        weight t, e, c, up    (groups, inputs, outputs)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.layer import TINY, fields, grouped, matrix, rounded, scale_and_zero, unmatrix

if TYPE_CHECKING:
    from raysq.arithmetic import QParams
    from raysq.graph import Call

__all__ = ["adaround"]

STEPS = 50  # 500 lower the error by another 2 %
LEARNING_RATE = 0.2  # of V, which starts within ±2.3 and no longer matters beyond ±2.4
DECAYS = (0.9, 0.999)  # Adam's
ZETA, GAMMA = 1.1, -0.1  # the stretch of eq. 23
LAMBDA = 3.0  # of eq. 21, relative to the error that one step of an average weight adds
WARM_UP = 0.1  # share of the steps without the regularizer
BETAS = (20.0, 2.0)  # of eq. 24, from first to last, as in the paper
SWEEPS = 3  # over all weights, to change sides; as many again lower the error by another 0.3 %
BLOCK = 32  # weights that are swept between two products with the rows
COLUMNS = 1024  # outputs at a time, which bounds the memory: ten arrays of inputs * COLUMNS


def adaround(call: Call, weight: Tensor, params: QParams, exact: Tensor, int8: Tensor) -> NDArray[np.float32]:
    """Return the weight on its grid, rounded so that the call's output errs least on the rows.

    Deterministic. Round-to-nearest is what remains without rows or where they don't fit the weight, for outputs
    that can't be improved, and for weights whose input is always 0 or that the grid clips. A transposed convolution
    counts each place of its kernel as an output, which is exact where the places don't overlap.

    Args:
        call: a linear or a convolution.
        weight: float32, as the call has it.
        params: of that weight; they quantize the result to the same integers again.
        exact: rows that the float model reads, (n, *row_shape).
        int8: the same rows as the quantized model reads them.

    Returns:
        (integer - zero point) * scale, float32, in the weight's shape.
    """
    nearest = rounded(weight, params)
    x, noisy = fields(call, exact, weight), fields(call, int8, weight)
    if x is None or noisy is None:
        return nearest.numpy()
    rows = _Rows.of(grouped(call, x).double(), grouped(call, noisy).double())
    scale, zero = scale_and_zero(params, weight.dim())
    t = weight * (1 / scale)  # as `rounded` has it, so that its choice is one of the two
    low, high = ((level + zero).clamp(params.grid.qmin, params.grid.qmax) - zero for level in (t.floor(), t.ceil()))
    scale, t, low, high = (matrix(call, part).contiguous() for part in (scale.expand_as(weight), t, low, high))
    best = matrix(call, nearest).clone()
    for start in range(0, t.shape[2], COLUMNS):
        part = (..., slice(start, start + COLUMNS))
        problem = _Problem.of(rows, t[part], low[part], high[part])
        found = problem.levels(_improved(problem, _relaxed(problem))) * scale[part]
        errors = [rows.errors(matrix(call, weight)[part], choice) for choice in (found, best[part])]
        best[part] = torch.where(errors[0] < errors[1], found, best[part])
    return np.ascontiguousarray(unmatrix(call, best).numpy())


@dataclass(frozen=True)
class _Rows:
    """What the call reads, float64, divided by the root of the sum of squares of an average input.

    Attributes:
        noise: x - x̂.
        int8: x̂.
        factor: its product with itself is x̂ᵀx̂, float32 (groups, min(n, inputs), inputs).
        diagonal: of x̂ᵀx̂, float32 (groups, inputs, 1), 1 on average.
        kept: share of x̂ᵀx̂ that isn't replaced by its diagonal.
    """

    noise: Tensor
    int8: Tensor
    factor: Tensor
    diagonal: Tensor
    kept: float

    @classmethod
    def of(cls, exact: Tensor, int8: Tensor) -> _Rows:
        n, inputs = int8.shape[1:]
        unit = int8.square().sum((1, 2), keepdim=True).div(inputs).sqrt().clamp_min(TINY)
        noise, int8 = (exact - int8) / unit, int8 / unit
        factor = torch.linalg.qr(int8, mode="r").R if n > inputs else int8
        return cls(noise, int8, factor.float(), int8.square().sum(1)[..., None].float(), n / (n + inputs))

    def pull(self, t: Tensor) -> Tensor:
        """Return c, shrunk by the share of its size that the spread of its terms over the rows explains."""
        missing = self.noise @ t.double()
        pull = self.int8.mT @ missing
        spread = self.int8.square().mT @ missing.square()
        size, chance = ((part / self.diagonal.clamp_min(TINY)).sum(1, keepdim=True) for part in (pull**2, spread))
        shrunk: Tensor = pull * (1 - chance / size.clamp_min(TINY)).clamp_min(0)
        return shrunk.float()

    def errors(self, weight: Tensor, choice: Tensor) -> Tensor:
        """Return the squared error of each output, (groups, 1, outputs)."""
        difference = choice.double() - weight.double()
        missing: Tensor = self.noise @ weight.double() - self.int8 @ difference
        return missing.square().sum(1, keepdim=True)


@dataclass(frozen=True)
class _Problem:
    """The shrunk error |x̂ e|² - 2 e·c of some outputs, and the two values that each e may have.

    Attributes:
        rows: what x̂ is.
        pull: c.
        t: the weight over its scale.
        low: the level below it.
        span: 1 where the level above it is another choice, else 0.
    """

    rows: _Rows
    pull: Tensor
    t: Tensor
    low: Tensor
    span: Tensor

    @classmethod
    def of(cls, rows: _Rows, t: Tensor, low: Tensor, high: Tensor) -> _Problem:
        read = rows.diagonal > 0  # what is never read keeps round-to-nearest
        low = torch.where(read, low, t.round().maximum(low).minimum(high))
        return cls(rows, rows.pull(t), t, low, (high - low) * read)

    def levels(self, up: Tensor) -> Tensor:
        """Return integers less the zero point, for `up` in [0, 1]."""
        return self.low + up * self.span

    def slope(self, e: Tensor, product: Tensor, inputs: slice = slice(None)) -> Tensor:
        """Return half the derivative by some inputs' e, given `factor @ e` of all."""
        rows = self.rows
        shared: Tensor = rows.factor[:, :, inputs].mT @ product - self.pull[:, inputs]
        own = rows.diagonal[:, inputs] * e[:, inputs]
        return rows.kept * shared + (1 - rows.kept) * own


def _relaxed(problem: _Problem) -> Tensor:
    """Return 1 where AdaRound rounds up and 0 elsewhere: Adam on eq. 21 with the rounding h(V) of eq. 23."""
    start = (problem.t - problem.low).clamp(0.01, 0.99)  # h(V) = the fraction, by which nothing is rounded yet
    v = ((start - GAMMA) / (ZETA - start)).log()
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(STEPS):
        sigmoid = v.sigmoid()
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = stretched.clamp(0, 1)
        e = problem.levels(h) - problem.t
        slope = 2 * problem.slope(e, problem.rows.factor @ e) * problem.span
        progress = (step / STEPS - WARM_UP) / (1 - WARM_UP)
        if progress > 0:
            beta = BETAS[0] + (BETAS[1] - BETAS[0]) * progress
            z = 2 * h - 1
            slope -= LAMBDA * 2 * beta * z.sign() * z.abs() ** (beta - 1)
        slope *= sigmoid * (1 - sigmoid) * (stretched == h)
        first.lerp_(slope, 1 - DECAYS[0])
        second.lerp_(slope.square(), 1 - DECAYS[1])
        speed = (second / (1 - DECAYS[1] ** (step + 1))).sqrt_().add_(TINY)
        v -= LEARNING_RATE / (1 - DECAYS[0] ** (step + 1)) * first / speed
    return torch.where(v >= 0, 1.0, 0.0)


def _improved(problem: _Problem, up: Tensor) -> Tensor:
    """Return the choices after each weight in turn has changed sides where that lowers its output's error."""
    rows = problem.rows
    up, e = up.clone(), problem.levels(up) - problem.t
    product = rows.factor @ e
    for _ in range(SWEEPS):
        before = up.clone()
        for start in range(0, e.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            factor = rows.factor[:, :, block]
            gram = rows.kept * (factor.mT @ factor)
            gram.diagonal(dim1=1, dim2=2).copy_(rows.diagonal[:, block, 0])
            slope, old = problem.slope(e, product, block), e[:, block].clone()
            for i in range(gram.shape[1]):
                step = problem.span[:, start + i] * (1 - 2 * up[:, start + i])
                step *= step * (2 * slope[:, i] + step * gram[:, i, i, None]) < 0
                up[:, start + i] += step
                e[:, start + i] += step
                slope += gram[:, :, i, None] * step[:, None]
            product += factor @ (e[:, block] - old)
        if torch.equal(before, up):
            break
    return up
