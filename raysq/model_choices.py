"""What may be chosen of a model beside its calls: the alpha of each smoothed group, and the transforms.

alpha.attn.q         "auto", "off" or 0.0 … 1.0     groups in the same place of every block
alpha/blocks.0.q/0   "off" or any number in [0, 1]  one group by itself; beats all others
equalization         False or True                  and so for every transform
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from raysq.errors import SpaceError, unknown
from raysq.features import Value
from raysq.graph import ModelGraph
from raysq.recipe import Recipe, Transform

__all__ = ["ALPHA", "ModelChoices"]

ALPHA = "alpha."
GROUP = "alpha/"
Way = tuple[str, Callable[[Recipe], Recipe]]  # to change a recipe, with what it is called
AUTO, OFF = "auto", "off"
GRID = tuple(k / 10 for k in range(11))


@dataclass(frozen=True)
class ModelChoices:
    """Values of the dimensions, and the way between them and a recipe.

    Attributes:
        kinds: dimension to the groups that it is about; a group is in at most one.
        alphas: what "auto" stands for by group; one that isn't in it is not smoothed.
        values: of each dimension, the default first.
        everywhere: alphas that are to be tried for all groups at once, at the start of a search.
    """

    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    everywhere: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        graph: ModelGraph,
        groups: Sequence[str],
        alphas: Mapping[str, float],
        everywhere: tuple[float, ...] = (),
        transforms: Sequence[Transform] = tuple(Transform),
    ) -> ModelChoices:
        """Return the choices of a model: smoothing as advised and no transform first.

        Args:
            graph: the calls.
            groups: those that may be smoothed.
            alphas: what is advised, by group.
            everywhere: alphas to try for all groups at once.
            transforms: those that the backend builds.
        """
        kinds: dict[str, list[str]] = {}
        for name in groups:
            block = graph[graph.groups[name].calls[0]].block
            place = name.removeprefix(f"{block}.") if block else name
            kinds.setdefault(ALPHA + place.rpartition("/")[0], []).append(name)
        values: dict[str, tuple[Value, ...]] = {
            kind: (*([AUTO] if any(g in alphas for g in names) else []), OFF, *GRID) for kind, names in kinds.items()
        }
        fits = {
            Transform.EQUALIZATION: any(
                g.producers and all(p.call for p in g.producers) for g in graph.groups.values()
            ),
            Transform.BIAS_CORRECTION: any(call.op.has_matrix for call in graph.calls),
        }
        values.update({t.value: (False, True) for t in Transform if t in transforms and fits[t]})
        return cls({kind: tuple(names) for kind, names in kinds.items()}, alphas, values, everywhere)

    @cached_property
    def _kind_of(self) -> dict[str, str]:
        return {group: kind for kind, groups in self.kinds.items() for group in groups}

    @property
    def by_group(self) -> Iterator[tuple[str, tuple[Value, ...]]]:
        """A dimension and its values for each group by itself, and those of the transforms."""
        for name, values in self.values.items():
            if name not in self.kinds:
                yield name, values
            for group in self.kinds.get(name, ()):
                first = self._alpha(group, values[0])
                yield GROUP + group, tuple(dict.fromkeys([first, OFF, *GRID]))

    def is_about(self, name: str) -> bool:
        """Whether a key of a flat config belongs here."""
        return name in self.values or name.startswith(GROUP)

    def check(self, name: str, value: Any) -> None:
        """Refuse what can't be chosen.

        Raises:
            SpaceError: an unknown group, or a value outside of the space.
        """
        if name in self.values:
            if value not in self.values[name]:
                raise SpaceError(f"{name!r} must be one of {', '.join(map(repr, self.values[name]))}, got {value!r}.")
            return
        group = name.removeprefix(GROUP)
        if group not in self._kind_of:
            raise SpaceError(unknown("group to smooth:", group, self._kind_of))
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if value != OFF and not number:
            raise SpaceError(f"{name!r} must be {OFF!r} or a number in [0, 1], got {value!r}.")

    def apply(self, point: Mapping[str, Any], recipe: Recipe) -> Recipe:
        """Return a recipe with what a flat config chooses; what that leaves out has its default."""
        smoothing: dict[str, float] = {}
        for kind, groups in self.kinds.items():
            for group in groups:
                alpha = self._alpha(group, point.get(GROUP + group, point.get(kind, self.values[kind][0])))
                if alpha != OFF:
                    smoothing[group] = float(alpha)
        transforms = tuple(t for t in Transform if point.get(t.value, self.values.get(t.value, (False,))[0]))
        return replace(recipe, smoothing=smoothing, transforms=transforms)

    def point(self, recipe: Recipe) -> dict[str, Value]:
        """Return the values that come closest to a recipe, by kind of group, and its transforms."""
        found: dict[str, Value] = {t.value: t in recipe.transforms for t in Transform if t.value in self.values}
        for kind, groups in self.kinds.items():
            votes = Counter(
                value for value in self.values[kind] for g in groups if self._alpha(g, value) == _chosen(recipe, g)
            )
            found[kind] = max(self.values[kind], key=lambda value: votes[value])  # noqa: B023  # used at once
        return found

    def value_of(self, name: str, recipe: Recipe) -> Value:
        """Return what a recipe has in a dimension of one group, or of a transform."""
        if name.startswith(GROUP):
            return _chosen(recipe, name.removeprefix(GROUP))
        return Transform(name) in recipe.transforms

    def overrides(self, point: Mapping[str, Any], recipe: Recipe) -> dict[str, Value]:
        """Return what a point misses of a recipe, by group."""
        reached = self.apply(point, recipe)
        return {GROUP + g: _chosen(recipe, g) for g in self._kind_of if _chosen(recipe, g) != _chosen(reached, g)}

    def alpha_variants(self) -> list[Way]:
        """Return the ways to smooth all groups alike that were asked for."""
        groups = tuple(self._kind_of)
        return [
            (f"alpha {alpha}", partial(Recipe.with_smoothing, smoothing=dict.fromkeys(groups, alpha)))
            for alpha in self.everywhere
        ]

    def variants(self, recipe: Recipe) -> Iterator[list[Way]]:
        """Yield what may be varied of a recipe for the whole model: the ways to do so."""
        if recipe.smoothing and all(OFF in self.values[kind] for kind in self.kinds):
            yield [("no smoothing", partial(Recipe.with_smoothing, smoothing={}))]
        for transform in Transform:
            if True in self.values.get(transform.value, ()) and transform not in recipe.transforms:
                yield [(transform.value, partial(Recipe.with_transform, transform=transform))]

    def check_inside(self, recipe: Recipe) -> None:
        """Refuse a recipe that no point expresses.

        Raises:
            SpaceError: it smooths or transforms what this space doesn't, or by fixed scales.
        """
        for group, alpha in recipe.smoothing.items():
            if isinstance(alpha, tuple):
                raise SpaceError(f"a space holds alphas, so a recipe in it must; it has fixed scales for {group!r}.")
            self.check(GROUP + group, alpha)
        for transform in recipe.transforms:
            if True not in self.values.get(transform.value, ()):
                raise SpaceError(
                    f"this space holds no {transform.value}, which the recipe has. Leave it out of the recipe."
                )

    def within(self, recipe: Recipe) -> Recipe:
        """Return a recipe that these values allow: what they don't has its default instead."""
        smoothing: dict[str, Any] = {}
        for kind, groups in self.kinds.items():
            values = self.values[kind]
            for group in groups:
                alpha = recipe.smoothing.get(group, OFF)
                allowed = OFF in values if alpha == OFF else values != (OFF,)
                smoothing[group] = alpha if allowed else self._alpha(group, values[0])
        smoothing = {group: alpha for group, alpha in smoothing.items() if alpha != OFF}
        return replace(recipe, smoothing=smoothing, transforms=tuple(t for t in Transform if self._has(t, recipe)))

    def _has(self, transform: Transform, recipe: Recipe) -> bool:
        values = self.values.get(transform.value, (False,))
        wanted = transform in recipe.transforms
        return wanted if wanted in values else bool(values[0])

    def narrowed(self, name: str, values: Sequence[Value]) -> ModelChoices:
        """Return the choices with other values for a dimension, the default first."""
        if name in self.values:
            return replace(self, values={**self.values, name: tuple(values)})
        group = name.removeprefix(GROUP)
        if len(values) != 1:
            raise SpaceError(f"{name!r} can be set to one value; `per_op` has a dimension for each group.")
        kinds = {kind: tuple(g for g in groups if g != group) for kind, groups in self.kinds.items()}
        own = {name: (group,)}
        return replace(self, kinds={**kinds, **own}, values={**self.values, name: tuple(values)})

    def _alpha(self, group: str, value: Value) -> Value:
        return self.alphas.get(group, OFF) if value == AUTO else value


def _chosen(recipe: Recipe, group: str) -> Value:
    alpha = recipe.smoothing.get(group, OFF)
    return OFF if isinstance(alpha, tuple) else alpha
