"""Whatever a file holds, its reader returns what can be written again, or raises raysq's own error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import ANYTHING, BOMB, BYTES, MERGES, TEXTS, changed, torn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysq import calibration, cli, description, journal, listed_op, plain_data, warm_start
from raysq.errors import (
    InputError,
    OptionError,
    RecipeError,
    ResumeError,
    SpaceError,
    StorageError,
    shown,
    unknown,
)
from raysq.ipex_recipe import recipe_from_ipex
from raysq.journal_lines import to_dict
from raysq.listed_op import ListedOp
from raysq.op_times import OpTimes
from raysq.recipe import OpConfig, Precision, Recipe, Transform
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.run import Entry, Header, WarmStart
from raysq.sensitivity_cache import FILE as CACHE
from raysq.sensitivity_cache import SensitivityCache

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

RECIPE = Recipe(
    {"fc": OpConfig(Precision.INT8), "head": OpConfig(Precision.BF16)},
    {"fc/0": 0.5, "head/0": (1.0, 2.0)},
    (Transform.EQUALIZATION,),
)
RECORD = TrialRecord(
    trial=3,
    recipe=RECIPE,
    config={"linear": "int8", "float_calls.mse": 4},
    status=Status.FINISHED,
    stage=Stage.TIMED,
    accuracy=0.89,
    accuracy_drop=0.011,
    feasible=True,
    latency_ms=2.0,
    latency_ratio=0.4,
    ratio=Ratio(0.4, 0.39, 0.41),
    metrics={"accuracy": 0.89},
    size_bytes=1000,
)
TRIAL = Entry(RECORD, 2, ((1.0, 2.5),), {"cpu": "Zen", "threads": 2}, 1.5)
HEADER = Header(
    {"model": "m1"},
    {"tolerance": 0.01, "criterion": "relative", "higher_is_better": True},
    {"raysq": "0.1"},
    "reference",
    Baseline(0.9, {"accuracy": 0.9}, 5.0, "jit", {"jit": 5.0}, bf16_ratio=Ratio(0.8, 0.7, 0.9)),
    WarmStart((TRIAL,), (RECIPE,)),
    OpTimes({"fc": {Precision.INT8: 0.1}}, {"fc": 0.01}, (("fc", "head"),)),
    {"fc": {"op": "linear", "macs": 5}},
)
HEADER_LINE, TRIAL_LINE = {"schema": 1, **to_dict(HEADER)}, to_dict(TRIAL)
OP = asdict(
    ListedOp(
        *(0, "linear", "min_max", "per_channel", (0.1,), (3,), (0.2,), (0,), ((0.1, 0.2),)),
        *(("uint8",), ("uint8",), (True,), (False,), ("linear0.input0",), ("linear0.output0",)),
    )
)
TENSOR = {"id": 0, "orig_dtype": "torch.float32", "inf_dtype": "torch.quint8", "force_dtype": "torch.quint8"}
SUMMARY = {
    " ": {
        "q_op_infos": {
            "0": {
                "op_type": "<class 'torch.nn.modules.linear.Linear'>",
                "op_type_is_module": True,
                "fqn": "fc",
                "input_tensor_infos": [{**TENSOR, "scale": [0.1], "zero_point": [3]}],
                "weight_tensor_infos": [{**TENSOR, "inf_dtype": "torch.qint8", "scale": [0.1, 0.2]}],
                "output_tensor_infos": [{**TENSOR, "id": 1}],
                "activation_observer": {"name": "HistogramObserver", "qscheme": "torch.per_tensor_affine"},
            }
        },
        "nonq_op_infos": {},
        "layer_output_infos": [],
    }
}
DESCRIPTION = yaml.safe_load((Path(description.__file__).parent / "search_spaces" / "reference.yaml").read_text())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "document.json"


def as_recipe(path: Path) -> None:
    recipe = Recipe.from_json(path.read_bytes())
    assert Recipe.from_json(recipe.to_json()) == recipe


def as_journal(path: Path) -> None:
    header, entries = journal.read(path)
    lines = [{"schema": 1, **to_dict(header)}, *map(to_dict, entries)]
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    again, same = journal.read(path)
    assert [e.record for e in same] == [e.record for e in entries]
    assert again.baseline == header.baseline or "nan" in str(header.baseline)


def as_ipex_file(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        recipe = recipe_from_ipex(path)
    assert Recipe.from_json(recipe.to_json()) == recipe


def as_cache(path: Path) -> None:
    cache = SensitivityCache(path.parent, {"model": "m"})
    (path.parent / CACHE).write_bytes(path.read_bytes())
    for call, cost in cache.read().items():
        assert isinstance(call, str) and (cost is None or isinstance(cost, float))


def as_description(path: Path) -> None:
    assert description.load(path).ops is not None


def as_warm_start(path: Path) -> None:
    assert warm_start.read(path)


def as_settings(path: Path) -> None:
    assert isinstance(cli._yaml(path), dict)


READERS: dict[str, tuple[Callable[[Path], None], type[Exception] | tuple[type[Exception], ...], Any]] = {
    "recipe": (as_recipe, RecipeError, RECIPE.to_dict()),
    "warm start": (as_warm_start, RecipeError, RECIPE.to_dict()),
    "ipex 1.x": (as_ipex_file, (RecipeError, StorageError), [OP, {**OP, "id": 1}]),
    "ipex 2.x": (as_ipex_file, (RecipeError, StorageError), SUMMARY),
    "description": (as_description, SpaceError, DESCRIPTION),
    "settings": (as_settings, OptionError, {"workload": "a:b", "tolerance": 0.1}),
}
LINES = {
    "trial": (as_journal, ResumeError, [HEADER_LINE], TRIAL_LINE),
    "header": (as_journal, ResumeError, [], HEADER_LINE),
    "cost": (as_cache, StorageError, [], {"question": {"model": "m"}, "call": "fc", "cost": 0.5}),
}


def test_the_documents_that_are_changed_are_valid(file: Path) -> None:
    for read, _, document in READERS.values():
        file.write_text(json.dumps(document))
        read(file)
    for read, _, before, line in LINES.values():
        file.write_text("".join(json.dumps(each) + "\n" for each in [*before, line]))
        read(file)


def refused_or_read(read: Callable[[Path], None], error: Any, path: Path) -> None:
    try:
        read(path)
    except error as exc:
        assert isinstance(exc, InputError)
        assert len(str(exc)) < 5000  # it doesn't repeat all that it was given


@pytest.mark.parametrize("name", READERS)
@quick
@given(data=st.data())
def test_changed_documents(file: Path, name: str, data: st.DataObject) -> None:
    read, error, document = READERS[name]
    file.write_text(json.dumps(data.draw(changed(document) | ANYTHING)))
    refused_or_read(read, error, file)


@pytest.mark.parametrize("name", READERS)
@quick
@given(data=st.data())
def test_torn_documents(file: Path, name: str, data: st.DataObject) -> None:
    read, error, document = READERS[name]
    text = yaml.safe_dump(document) if read in (as_description, as_settings) else json.dumps(document)
    file.write_bytes(data.draw(torn(text.encode())))
    refused_or_read(read, error, file)


@pytest.mark.parametrize("name", LINES)
@quick
@given(data=st.data())
def test_changed_lines(file: Path, name: str, data: st.DataObject) -> None:
    read, error, before, line = LINES[name]
    lines = [*map(json.dumps, before), json.dumps(data.draw(changed(line) | ANYTHING))]
    file.write_text("".join(f"{each}\n" for each in lines))
    refused_or_read(read, error, file)


@pytest.mark.parametrize("name", [*READERS, *LINES])
@pytest.mark.parametrize("content", BYTES, ids=lambda content: repr(content[:12]))
def test_hostile_bytes(file: Path, name: str, content: bytes) -> None:
    read, error, *_ = {**READERS, **LINES}[name]
    file.write_bytes(content.replace(b"\n", b" ") + b"\n" if name in LINES else content)
    refused_or_read(read, error, file)


@pytest.mark.parametrize("name", [*READERS, *LINES])
def test_what_cannot_be_opened(tmp_path: Path, name: str) -> None:
    read, error, *_ = {**READERS, **LINES}[name]
    if read is as_cache:
        pytest.skip("no cache is an empty one")
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises((InputError, OSError)) as caught:
            read(path)
        assert read is as_recipe or isinstance(caught.value, InputError)


@pytest.mark.parametrize("text", [*TEXTS, MERGES, "&a [*a]", "a: &a {b: *a}", "a: 1\na: 2", "!!timestamp x"])
def test_yaml_is_read_or_refused(text: str) -> None:
    try:
        value = plain_data.from_yaml(text)
    except ValueError:
        return
    assert value is None or isinstance(value, dict | list | float | str)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 10,000,000 values"),
        (MERGES, "more than 10,000 keys"),
        ("&a [*a]", "nested deeper than 64 levels"),
        ("a: 1\na: 2", "key 'a' stands twice"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
    ],
)
def test_what_is_refused_of_yaml(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plain_data.from_yaml(text)


def test_what_yaml_is_for_is_read() -> None:
    text = "base: &base {dtype: [uint8]}\nlinear: {<<: *base, scheme: [asym]}\nconv: *base"
    read = plain_data.from_yaml(text)
    assert read["linear"] == {"dtype": ["uint8"], "scheme": ["asym"]} and read["conv"] == {"dtype": ["uint8"]}


@quick
@given(ANYTHING)
def test_any_spelling_of_a_calibrator(value: Any) -> None:
    try:
        found = calibration.parse(value)
    except RecipeError:
        return
    assert calibration.parse(str(found)) == found


@pytest.mark.parametrize("value", ["x" * 10**8, [0] * 10**6, 10**4000], ids=["text", "list", "number"])
def test_messages_stay_short(value: Any) -> None:
    assert len(unknown("name", value, ["one", "two"])) < 500
    assert len(shown(value)) < 300


@pytest.mark.parametrize("label", ["", "x"])
def test_numbers_of_another_type_are_named(tmp_path: Path, label: str) -> None:
    line = {**TRIAL_LINE, "record": {**TRIAL_LINE["record"], "trial": label}}
    (tmp_path / "journal.jsonl").write_text(f"{json.dumps(HEADER_LINE)}\n{json.dumps(line)}\n")
    with pytest.raises(ResumeError, match="line 2.*`trial` must be a whole number, got '" + label):
        journal.read(tmp_path / "journal.jsonl")


def test_an_ipex_file_that_was_read_is_written_as_it_was(tmp_path: Path) -> None:
    listed = json.loads(json.dumps([OP]))
    listed_op.write(tmp_path / "configure.json", map(ListedOp.from_dict, listed))
    assert listed_op.read(tmp_path / "configure.json") == listed
