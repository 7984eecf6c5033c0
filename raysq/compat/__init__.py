"""What IPEX 1.x offered under `ipex.quantization` and IPEX 2.8 no longer has, on raysq's calibration and backends.

A script changes its import, `import raysq.compat as ipex`, and runs as it stands.
"""

from __future__ import annotations

from raysq.compat import quantization
from raysq.compat.quantization import QuantConf, calibrate, convert

__all__ = ["QuantConf", "calibrate", "convert", "quantization"]
