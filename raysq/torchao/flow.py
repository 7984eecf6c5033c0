"""SmoothQuant's steps on a model, in place: observe the inputs of its Linears, then quantize their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig
from torchao.quantization import register_quantize_module_handler

from raysq.errors import CalibrationError, ModelError, OptionError, unknown
from raysq.kernels.cpu import lacks_vnni
from raysq.recipe import Approach
from raysq.smoothquant.scales import smoothing_scales
from raysq.torchao.kernel import LARGEST_OF_8_BITS
from raysq.torchao.layout import SMALLEST_SCALE, SmoothQuantTensor

__all__ = ["SmoothQuantConfig", "insert_smoothquant_observers_"]

OBSERVER = "smoothquant_observer"  # a Linear's attribute: its observer, or None if it is to stay in float

WRONG_ORDER = """\
`quantize_` with a SmoothQuantConfig needs observers that have seen data, and this model has none. Not

    quantize_(model, SmoothQuantConfig())

but

    insert_smoothquant_observers_(model, alpha=0.5)
    for batch in calibration_batches:
        model(batch)
    quantize_(model, SmoothQuantConfig())"""


@dataclass(frozen=True)
class SmoothQuantConfig(AOBaseConfig):  # type: ignore[misc]
    """How `torchao.quantization.quantize_` quantizes the observed Linears; all others stay as they are.

    Attributes:
        activation: "dynamic", one scale per token at each call, or "static", one scale from the calibration.
        reduce_range: whether weights take 7 bits instead of 8; None: on CPUs without VNNI, where 8-bit products
            overflow in oneDNN's kernel, so that a weight of 8 bits is multiplied in float.

    Raises:
        OptionError: another `activation`.
    """

    activation: Approach | str = Approach.DYNAMIC
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        able = (Approach.DYNAMIC, Approach.STATIC)
        if self.activation not in able:
            raise OptionError(unknown("activation", self.activation, [a.value for a in able]))


def insert_smoothquant_observers_(
    model: nn.Module,
    alpha: float | None = 0.5,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Record, in place, the largest magnitude of each input channel of a model's Linears from now on.

    A second call observes afresh the Linears that it selects and leaves the others, so that they may differ in alpha.
    A Linear whose weight is computed (weight norm) isn't observed. A weight that an embedding shares stays in float
    there.

    Args:
        model: its Linears are observed until `quantize_` converts them; its outputs don't change.
        alpha: share of the difficulty that moves from activations to weights, in [0, 1]; None equalizes nothing.
        filter_fn: takes a Linear and its name, as that of `quantize_`, and returns whether to observe it; None: all.

    Raises:
        OptionError: `alpha` out of its range.
        ModelError: no Linear is selected.
    """
    if alpha is not None and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise OptionError(f"`alpha` must lie in [0, 1], or be None for no equalization, got {alpha!r}.")
    inserted: list[_Observer] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_plain(module) and (filter_fn is None or filter_fn(module, name)):
            _stop_observing(module)
            inserted.append(_Observer(name, alpha, inserted))
            inserted[-1].observe(module)
        elif isinstance(module, nn.Linear):
            vars(module).setdefault(OBSERVER, None)
    if not inserted:
        raise ModelError("the model must have a Linear to observe, and one that `filter_fn` selects.")


class _Observer:
    """The largest magnitude of each channel (in,) that came into one Linear."""

    def __init__(self, name: str, alpha: float | None, inserted: list[_Observer]) -> None:
        self.name = name
        self.alpha = alpha
        self.inserted = inserted  # with it in one call, and observing still
        self.largest: Tensor | None = None

    def observe(self, module: nn.Linear) -> None:
        setattr(module, OBSERVER, self)
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if x.numel():
            largest = x.abs().reshape(-1, x.shape[-1]).amax(0).float()
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def scales(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the equalization scale (in,), and the activation scale () that nothing seen so far exceeds."""
        assert self.largest is not None
        if self.alpha is None:
            return None, _activation_scale(self.largest)
        largest_weights = weight.detach().abs().amax(0).float().cpu().numpy()
        scale = torch.from_numpy(smoothing_scales(self.largest.cpu().numpy(), largest_weights, self.alpha))
        scale = scale.to(weight.device)
        return scale, _activation_scale(self.largest / scale)


def _activation_scale(largest: Tensor) -> Tensor:
    return (largest.amax() / LARGEST_OF_8_BITS).clamp_min(SMALLEST_SCALE)


def _is_plain(module: nn.Linear) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return type(weight) is nn.Parameter and not isinstance(module, NonDynamicallyQuantizableLinear)


def _stop_observing(module: nn.Linear) -> None:
    observer: _Observer | None = vars(module).pop(OBSERVER, None)
    if observer is not None:
        observer.handle.remove()
        observer.inserted.remove(observer)


def _convert(module: nn.Module, config: SmoothQuantConfig) -> nn.Module:
    """Quantize the weight of one Linear in place, if it was observed: what `quantize_` calls for each.

    Raises:
        ModelError: `insert_smoothquant_observers_` was not called before.
        CalibrationError: a Linear saw no data, or values that are not finite; nothing is converted then.
    """
    if not isinstance(module, nn.Linear) or isinstance(module.weight, SmoothQuantTensor):
        return module  # a Linear with two names comes twice
    if OBSERVER not in vars(module):
        raise ModelError(WRONG_ORDER)
    observer: _Observer | None = getattr(module, OBSERVER)
    if observer is None:
        return module
    _check(observer.inserted)
    equalization_scale, activation_scale = observer.scales(module.weight)
    weight = SmoothQuantTensor.from_float(
        module.weight,
        equalization_scale,
        activation_scale if config.activation == Approach.STATIC else None,
        reduce_range=lacks_vnni() if config.reduce_range is None else config.reduce_range,
    )
    module.weight = nn.Parameter(weight, requires_grad=False)
    _stop_observing(module)
    return module


def _check(observers: list[_Observer]) -> None:
    unseen = [o.name for o in observers if o.largest is None]
    if unseen:
        raise CalibrationError(
            f"every observed Linear must see data before it is quantized; {', '.join(unseen)} saw none. Run the model "
            "on calibration batches that reach them, or leave them out by `filter_fn` of insert_smoothquant_observers_."
        )
    infinite = [o.name for o in observers if o.largest is not None and not o.largest.isfinite().all()]
    if infinite:
        raise CalibrationError(
            f"calibration data must keep activations finite; {', '.join(infinite)} saw NaN or infinity. Insert the "
            "observers again and run other batches."
        )


register_quantize_module_handler(SmoothQuantConfig)(_convert)
