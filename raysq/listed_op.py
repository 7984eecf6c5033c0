"""One op of the list that IPEX 1.x saved as `configure.json`: what is quantized, by which numbers, and what feeds it.

Ops have no module names there. They are told apart by their order, within their kind: the third "linear" is the third
linear layer that runs. Tensors are named by the op that makes them, "conv2d0.output0", or, where no op does, by the
first that reads them, "conv2d0.input0".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from raysq import calibration
from raysq.errors import RecipeError, StorageError, shown
from raysq.graph import OpType
from raysq.plain_data import from_json
from raysq.recipe import Approach, Granularity, OpConfig, Precision, QuantDType, Scheme, TensorConfig
from raysq.typed import typed

__all__ = ["MIN_MAX", "ListedOp", "kind_of", "member", "read", "write"]

KINDS = {op.value.replace("_", ""): op for op in OpType} | {
    "booleandispatch": OpType.MAX_POOL,  # what `F.max_pool2d` prints as
    "maxpool2d": OpType.MAX_POOL,
    "maxpool3d": OpType.MAX_POOL,
    "avgpool2d": OpType.AVG_POOL,
    "avgpool3d": OpType.AVG_POOL,
    "adaptiveavgpool2d": OpType.AVG_POOL,
    "adaptiveavgpool3d": OpType.AVG_POOL,
}
MIN_MAX = "min_max"  # as IPEX spells it; raysq's other algorithms keep their own names


@dataclass(frozen=True)
class ListedOp:
    """An op as the file lists it; the fields are its keys, in its order.

    Attributes:
        id: its place among the ops.
        name: its kind.
        algorithm: what its ranges were calibrated by.
        weight_granularity: "per_channel" or "per_tensor".
        input_scales: of each input, quantized or not.
        input_zero_points: likewise.
        output_scales: of each output.
        output_zero_points: likewise.
        weight_scales: of each weight, one per channel or a single one; none for an op that runs in float.
        input_quantized_dtypes: "uint8" or "int8".
        output_quantized_dtypes: likewise.
        inputs_quantized: whether each input is quantized before the op.
        outputs_quantized: whether each output is after it.
        inputs_flow: names of the tensors it reads.
        outputs_flow: names of the tensors it makes.
    """

    id: int
    name: str
    algorithm: str
    weight_granularity: str
    input_scales: tuple[float, ...]
    input_zero_points: tuple[int, ...]
    output_scales: tuple[float, ...]
    output_zero_points: tuple[int, ...]
    weight_scales: tuple[tuple[float, ...], ...]
    input_quantized_dtypes: tuple[str, ...]
    output_quantized_dtypes: tuple[str, ...]
    inputs_quantized: tuple[bool, ...]
    outputs_quantized: tuple[bool, ...]
    inputs_flow: tuple[str, ...]
    outputs_flow: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: Any) -> ListedOp:
        """Read the JSON form; keys that it doesn't know are left out.

        Raises:
            RecipeError: a key is missing or holds something else.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"an op of IPEX's list must be an object, got {shown(data)}.")
        try:
            op = cls(**typed(cls, {field.name: data.get(field.name) for field in fields(cls)}))
        except (TypeError, ValueError, OverflowError) as exc:
            raise RecipeError(f"in an op of IPEX's list {exc}. Calibrate anew, or write it so.") from exc
        for side, lists in (
            ("input", (op.input_scales, op.input_zero_points, op.input_quantized_dtypes)),
            ("output", (op.output_scales, op.output_zero_points, op.output_quantized_dtypes)),
        ):
            flags = getattr(op, f"{side}s_quantized")
            if any(len(values) != len(flags) for values in lists):
                raise RecipeError(
                    f"{op.label} has {len(flags)} {side}s, and needs as many scales, zero points and types."
                )
        return op

    @property
    def label(self) -> str:
        """Kind and number, as tensors are named after it."""
        return f"{self.name}{self.id}"

    @property
    def is_int8(self) -> bool:
        """Whether its kernel can run in int8: all that it reads is quantized, or of a sum what isn't accumulated."""
        if not self.inputs_quantized:  # it reads integers as they are
            return any(self.outputs_quantized)
        return (any if kind_of(self.name) is OpType.ADD else all)(self.inputs_quantized)

    @property
    def config(self) -> OpConfig:
        """What a recipe says of it: everything but the numbers themselves."""
        dtypes = self.input_quantized_dtypes or self.output_quantized_dtypes
        dtype = member(QuantDType, dtypes[0], self.label) if dtypes else QuantDType.U8
        algorithm = calibration.parse("minmax" if self.algorithm == MIN_MAX else self.algorithm)
        scheme = Scheme.AFFINE if dtype is QuantDType.U8 else Scheme.SYMMETRIC
        granularity = member(Granularity, self.weight_granularity, self.label)
        weight = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, granularity)
        return OpConfig(Precision.INT8, Approach.STATIC, TensorConfig(dtype, scheme, algorithm=algorithm), weight)


def kind_of(name: str) -> OpType | None:
    """Return the kind of op that IPEX means by a name, None for kinds that raysq doesn't quantize."""
    return KINDS.get(name.lower().removesuffix("_").replace("_", ""))


def read(path: str | Path) -> Any:
    """Return the JSON of a file.

    Raises:
        StorageError: there is none, or it holds something else.
    """
    try:
        return from_json(Path(path).read_bytes())
    except (OSError, ValueError) as exc:
        raise StorageError(f"{path} must hold a configuration as JSON: {exc}") from exc


def write(path: str | Path, ops: Iterable[ListedOp]) -> None:
    """Write ops as IPEX 1.x did.

    Raises:
        StorageError: the path can't be written.
    """
    try:
        Path(path).write_text(json.dumps([asdict(op) for op in ops], indent=4))
    except OSError as exc:
        raise StorageError(f"can't write {path}: {exc.strerror}. Pass another path.") from exc


def member(kind: Any, value: object, label: str) -> Any:
    """Return the member of an enum that an op says.

    Raises:
        RecipeError: it has none of that value.
    """
    try:
        return kind(value)
    except ValueError as exc:
        raise RecipeError(f"{label} says {value!r}, which must be one of {[m.value for m in kind]}.") from exc
