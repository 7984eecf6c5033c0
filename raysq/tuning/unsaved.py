"""What Ray copies into its snapshot of a search, which nobody reads: the journal is what a run resumes from."""

from __future__ import annotations

from typing import Any, Self

__all__ = ["Unsaved"]


class Unsaved:
    """A base for what holds files, screens, threads or the model: a snapshot has nothing of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
