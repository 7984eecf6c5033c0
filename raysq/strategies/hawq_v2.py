"""INC's "hawq_v2": calls back in float in the order of the Hessian's trace times what int8 changes of the weight."""

from __future__ import annotations

from typing import ClassVar

from raysq.errors import OptionError
from raysq.sensitivities import HAWQv2, rank
from raysq.sensitivities.loss import Loss, check_labels
from raysq.sensitivities.simulation import kept_items
from raysq.strategies.base import History, Steps, Strategy
from raysq.strategies.fallback import in_order
from raysq.strategies.stages import model_wise

__all__ = ["HAWQv2Order"]

FEW = 1  # as in INC


class HAWQv2Order(Strategy):
    """The default recipe, dynamic too where the approach is "auto"; then fallback by Hessian trace.

    Ever more calls become float in that order, those without a weight last, in bf16, then in fp32, one per trial; by
    bisection where trials are short. Calibration must give labels.

    INC takes the cross entropy whatever loss it is given, and ranks by the trace alone; raysq takes the loss, and
    multiplies by how far int8 moves the weight, as the paper does (arXiv 1911.03852, eq. 8).

    Args:
        hawq_v2_loss: of (output, target), or of (output, target, criterion) as in INC; returns a tensor of one number.

    Raises:
        OptionError: no loss, or one that can't be called so.
    """

    name: ClassVar[str] = "hawq_v2"

    def __init__(self, hawq_v2_loss: Loss | None = None) -> None:
        if hawq_v2_loss is None:
            raise OptionError(
                "strategy 'hawq_v2' needs the loss that the model was trained with: "
                "`strategy_kwargs={'hawq_v2_loss': torch.nn.functional.cross_entropy}`."
            )
        super().__init__()
        self._sensitivity = HAWQv2(hawq_v2_loss)

    def check(self) -> None:
        """Refuse a model whose calibration gave no samples, or no labels.

        Raises:
            CalibrationError: it says how to give them.
        """
        if self.source is not None and self._costs is None:
            check_labels(kept_items(self.source, self.name), self.name)

    def next_recipe(self, history: History) -> Steps:
        """Yield the default, then the fallback."""
        base = yield from model_wise(self.space, history, FEW, self.max_trials)
        if history.best is None:
            order = rank(self.costs(self._sensitivity, base))
            yield from in_order(self.space, history, base, order, self.max_trials, self.name)
