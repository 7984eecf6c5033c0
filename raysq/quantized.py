"""A quantized model together with its recipe, and how both are written to disk."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from raysq import notebook
from raysq.deployed import Deployed
from raysq.errors import StorageError
from raysq.recipe import Precision, Recipe
from raysq.storage import written

if TYPE_CHECKING:
    from raysq.kernels.base import BuiltModel

__all__ = ["Quantized", "write"]

RECIPE_FILE = "recipe.json"


class Quantized(Deployed):
    """What `raysq.quantize` returns: called like the original, with what it was made from.

    Attributes:
        recipe: what was asked for.
        executed: call name to the precision it really runs in.
        left_in_float: call or function, and why it isn't in int8.
    """

    recipe: Recipe
    executed: Mapping[str, Precision]
    left_in_float: Mapping[str, str]
    _built: BuiltModel

    @classmethod
    def by(cls, built: BuiltModel, recipe: Recipe, left_in_float: Mapping[str, str]) -> Quantized:
        """Return what a backend built, with what its recipe doesn't say of calls that stay in float."""
        model = cls.like(built.model)
        model.recipe, model.executed = recipe, built.executed
        model.left_in_float = {**left_in_float, **built.left_in_float}
        model._built = built
        return model

    def _repr_html_(self) -> str:
        return f"<p>int8 ({escape(self._built.backend)})</p>" + notebook.of_calls(self.executed, self.left_in_float)

    def save(self, directory: str | Path) -> None:
        """Write model.pt, signature.json and recipe.json into a directory or to a URL; `raysq.load` reads them.

        Raises:
            StorageError: it can't be written.
        """
        with written(directory) as path:
            write(path, self._built, self.recipe)


def write(path: Path, built: BuiltModel, recipe: Recipe) -> None:
    """Write an artifact and its recipe into a directory, which is made.

    Raises:
        StorageError: it can't be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        built.save(path)
        (path / RECIPE_FILE).write_text(recipe.to_json(indent=1))
    except OSError as exc:
        raise StorageError(f"can't write {path}: {exc.strerror}. Pass another directory.") from exc
