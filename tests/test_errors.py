"""The exception tree is what its picture says."""

import inspect
import pickle
import re

import pytest

from raysq import errors
from raysq.errors import InputError, NoFeasibleRecipe, RaysqError, unknown

CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, RaysqError)}


def drawn_tree() -> dict[str, str | None]:
    """Return each class in the docstring's picture with the one it hangs from."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"((?:│|├|└|─| )*)([A-Z]\w+)", line)
        if match and match[2] in CLASSES and (match[1] or match[2] == "RaysqError"):
            depth = len(match[1]) // 4
            del path[depth:]
            parents[match[2]] = path[-1] if path else None
            path.append(match[2])
    return parents


def test_the_picture_shows_every_class_under_its_parent():
    assert drawn_tree() == {
        name: None if kind is RaysqError else kind.__bases__[0].__name__ for name, kind in CLASSES.items()
    }


def test_every_class_is_public_and_has_a_docstring():
    assert set(errors.__all__) == {*CLASSES, "shown", "unknown"}
    assert all(kind.__doc__ for kind in CLASSES.values())


def test_bad_input_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_no_feasible_recipe_carries_the_result():
    result = object()
    error = NoFeasibleRecipe("nothing met the goal", result)
    assert error.result is result
    assert str(error) == "nothing met the goal"


def test_no_feasible_recipe_pickles_with_its_result():
    again = pickle.loads(pickle.dumps(NoFeasibleRecipe("nothing met the goal", {"accuracy": 0.5})))
    assert (str(again), again.result) == ("nothing met the goal", {"accuracy": 0.5})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpee", "unknown strategy 'tpee'; known are random, tpe. Did you mean 'tpe'?"),
        ("xyz", "unknown strategy 'xyz'; known are random, tpe."),
        (None, "unknown strategy None; known are random, tpe."),
    ],
)
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(name, message):
    assert unknown("strategy", name, ["tpe", "random"]) == message
