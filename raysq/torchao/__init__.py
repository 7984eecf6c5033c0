"""SmoothQuant for torchao: observers for a model's Linears, and a config for torchao's own `quantize_`.

Example:
    >>> from torchao.quantization import quantize_  # doctest: +SKIP
    >>> insert_smoothquant_observers_(model, alpha=0.5)  # doctest: +SKIP
    >>> for batch in calibration_batches:  # doctest: +SKIP
    ...     model(batch)
    >>> quantize_(model, SmoothQuantConfig(activation="static"))  # doctest: +SKIP
    >>> torch.save(model.state_dict(), "int8.pt")  # doctest: +SKIP

In another process that has imported this module, the weights go straight into the original model:

    >>> original.load_state_dict(torch.load("int8.pt", weights_only=True), assign=True)  # doctest: +SKIP
"""

from __future__ import annotations

from raysq.errors import BackendError

try:
    import torchao as _torchao  # noqa: F401
except ImportError as exc:

    class TorchaoMissingError(BackendError, ImportError):
        """torchao is not installed; an ImportError too, as whoever probes for modules expects."""

    raise TorchaoMissingError("raysq.torchao needs torchao. Run `pip install 'raysq[torchao]'`.") from exc

from raysq.torchao.flow import SmoothQuantConfig, insert_smoothquant_observers_
from raysq.torchao.layout import SmoothQuantTensor

__all__ = ["SmoothQuantConfig", "SmoothQuantTensor", "insert_smoothquant_observers_"]
