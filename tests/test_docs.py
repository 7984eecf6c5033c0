"""What README, docs/ and docstrings show is run as it stands there; what can't be run here says why.

A block that can't be run has a comment before it, `<!-- not run: needs a cloud -->`. The blocks of a page share their
names, from top to bottom, and begin with those of `world`.
"""

from __future__ import annotations

import doctest
import functools
import importlib
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pages import PAGES, ROOT, Block, blocks, tables
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raysq
from raysq import api, cli, demo
from raysq.compat import QuantConf, calibrate
from raysq.kernels import base

LANGUAGES = {"python", "sh", "yaml", "text", "{eval-rst}"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
TO_RUN = [page for page in PAGES if any(b.language == "python" and b.not_run is None for b in blocks(page))]
READS_RUNS = ("inspect", "show", "report", "compare")  # commands of raysq that take no longer than reading a file
OF_OTHERS = {"export", "optuna-dashboard", "sed", "tensorboard"}  # not ours to check
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a block as words, continued lines joined, comments and a trailing & left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if word != "&"] for words in found if words]


def ids(found: list[Block]) -> dict[str, Any]:
    return {"argvalues": found, "ids": [block.place for block in found]}


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("block", **ids(BLOCKS))
def test_a_block_names_its_language_and_why_it_is_not_run(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.place}: write ```python, ```sh, ```yaml or ```text"
    if block.not_run is not None:
        assert len(block.not_run) >= 10, f"{block.place}: say why it can't be run here"


@pytest.mark.parametrize("block", **ids([b for b in BLOCKS if b.language == "python"]))
def test_python_compiles(block: Block) -> None:
    compile(block.code, str(block.page), "exec")


@pytest.mark.parametrize("block", **ids([b for b in BLOCKS if b.language == "yaml"]))
def test_tune_files_hold_arguments_of_tune(block: Block) -> None:
    settings = yaml.safe_load(block.text)
    assert set(settings) <= {"workload", "save", *signature(raysq.tune).parameters}


@pytest.mark.parametrize("block", **ids(SHELL))
def test_commands_exist_with_their_options(block: Block) -> None:
    for words in commands(block):
        program, rest = words[0], words[1:]
        if program not in OF_OTHERS:
            CHECKS[program](rest)


def check_raysq(words: list[str]) -> None:
    _, unknown = cli._parser().parse_known_args(words)
    assert not unknown


def check_make(words: list[str]) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets
    assert {word for word in words if "=" not in word} <= set(targets[1].split())


def check_pip(words: list[str]) -> None:
    """Extras in brackets are ours; a folder is this repo, and a constraints file stands in it."""
    assert words[0] == "install"
    for extras in re.findall(r"(?:raysq|\.)\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).exists()


def check_python(words: list[str]) -> None:
    """Scripts stand in the repo, and their options in their source; -m takes pytest here."""
    if words[0] == "-m":
        return
    script = ROOT / words[0]
    if script.parent.name != "benchmarks" and not script.exists():  # a script of the user's
        assert len(words) == 1
        return
    source = script.read_text()
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{words[0]} has no option {option}"


def check_ray(words: list[str]) -> None:
    """Ray's own parser takes the command; nothing is called."""
    from ray.scripts.scripts import cli as group

    command, context = group, None
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
        context = command.context_class(command, info_name=name, parent=context)
    command.make_context(command.name, words, parent=context)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "raysq": check_raysq,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "ray": check_ray,
}


def test_scripts_of_benchmarks_read_their_options_by_argparse() -> None:
    """So that an option which stands in the source, as is looked at above, is one of the script's."""
    scripts = {words[1] for block in SHELL for words in commands(block) if words[1:2] and "benchmarks/" in words[1]}
    assert len(scripts) > 3
    for script in scripts:
        assert "argparse.ArgumentParser(" in (ROOT / script).read_text(), script


def test_the_quick_start_lists_every_extra() -> None:
    ((_, *rows),) = tables(ROOT / "docs" / "quick-start.md", "Install")
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert listed == set(PYPROJECT["project"]["optional-dependencies"])


# ------------------------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """What pages and docstrings take for granted: the demo's CNN, its data under all usual names, and a task for it.

    `model`, `calib`, `eval_fn` and their aliases of other tools; `other`, a model of the same architecture; loaders of
    (x, y); `images` and `labels`; `batches` of inputs alone; a loss, and a training loop `fit(model, loader)`.
    """
    model, calib, eval_fn = demo.workload()
    images, labels = (torch.cat(parts) for parts in zip(*calib, strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=50)
    torch.manual_seed(1)
    other = demo.DigitsCNN().eval()
    other.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})

    def fit(module: nn.Module, data: Any) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

    return {
        **{
            "raysq": raysq,
            "torch": torch,
            "model": model,
            "model_origin": model,
            "other": other,
            "calib": calib,
            "calib_dataloader": calib,
        },
        **{"eval_fn": eval_fn, "eval_func": eval_fn, "eval_on_another_split": eval_fn},
        **dict.fromkeys(("loader", "train_loader", "test_loader", "val_loader", "dataloader"), loader),
        **{"images": images, "labels": labels, "dataset": loader.dataset, "batches": [x for x, _ in loader]},
        **{"x": images[:1], "example_input": images[:50], "loss_fn": F.cross_entropy, "fit": fit},
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Searches are real, but of two trials with short timings; they lie in an empty directory that is home too."""

    def short(tune: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(tune)
        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["max_trials"] = min(kwargs.get("max_trials", 2), 2)
            given = {"latency": raysq.Latency(0.02, 0.02), "num_threads": 1, "max_concurrent_trials": 1, "verbose": 0}
            return tune(*args, **{**given, **kwargs})

        return called

    monkeypatch.setattr(raysq, "tune", short(raysq.tune))
    monkeypatch.setattr(api, "tune", raysq.tune)  # what autotune calls
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def runs(cluster: None, quick: None, world: dict[str, Any]) -> Iterator[None]:
    """Give the directory the runs that pages name: `raysq_runs/RUN` and `raysq_runs/OTHER`."""
    raysq.tune(world["model"], world["calib"], world["eval_fn"], backend="onednn", name="RUN")
    shutil.copytree("raysq_runs/RUN", "raysq_runs/OTHER")
    yield


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as readers have it
@pytest.mark.parametrize("page", TO_RUN, ids=[str(page.relative_to(ROOT)) for page in TO_RUN])
def test_a_page_runs_from_top_to_bottom(
    page: Path, request: pytest.FixtureRequest, cluster: None, quick: None, world: dict[str, Any]
) -> None:
    if "s3://" in page.read_text():
        request.getfixturevalue("s3").create_bucket(Bucket="bucket")
    names = {**world, "__name__": "__main__"}  # as in a script: its functions travel to workers by value
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            exec(compile(block.code, str(page), "exec"), names)
        if block.language == "sh" and block.not_run is None:
            run_cheap(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", **ids([b for b in SHELL if b.page not in TO_RUN and b.not_run is None]))
def test_commands_about_runs_run(block: Block, request: pytest.FixtureRequest) -> None:
    if any(words[0] == "raysq" and words[1] in READS_RUNS for words in commands(block)):
        request.getfixturevalue("runs")
        run_cheap(block)


def run_cheap(block: Block) -> None:
    for program, *words in commands(block):
        if program == "raysq" and words[0] in READS_RUNS:
            assert cli.main(words) == 0, f"{block.place}: {shlex.join([program, *words])}"


# -------------------------------------------------------------------------------------------------------- docstrings

SOURCES = {
    "raysq."
    + ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__").rstrip("."): path.read_text()
    for folder, inside in ((ROOT / "raysq", "**/*.py"), (ROOT, "kernels/*.py"))
    for path in sorted(folder.glob(inside))
}
EXAMPLES = [
    pytest.param(name.rstrip("."), marks=[pytest.mark.slow] if "doctest: +SKIP" in text else [])
    for name, text in SOURCES.items()
    if ">>>" in text
]


class WhereWritten(doctest.OutputChecker):
    """An output counts where the docstring shows one."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(
    name: str, request: pytest.FixtureRequest, quick: None, world: dict[str, Any]
) -> None:
    """Those that plain doctest skips, since they need a model, data or Ray, are run here too."""
    try:
        module = importlib.import_module(name)
    except ImportError as exc:
        pytest.skip(f"{name} can't be imported here: {exc}")
    surroundings = {**vars(module), **world}
    tests = [
        test for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=surroundings) if test.examples
    ]
    assert tests
    for test in tests:
        if any(example.options.pop(doctest.SKIP, False) for example in list(test.examples)):
            for example in test.examples:
                example.options.pop(doctest.SKIP, None)
            test.globs.update(request.getfixturevalue("prepared_world"))
        said: list[str] = []
        failed, _ = doctest.DocTestRunner(checker=WhereWritten(), verbose=False).run(test, out=said.append)
        assert not failed, "".join(said)


@pytest.fixture
def prepared_world(cluster: None, quick: None, world: dict[str, Any]) -> dict[str, Any]:
    """What docstrings take for granted inside of the package; in the current directory, IPEX's configure.json."""
    prepared = raysq.prepare(world["model"], world["calib"], backend="onednn")
    conf = QuantConf()
    with calibrate(conf):
        world["model"](world["x"])
    conf.save("configure.json")
    return {
        **{"prepared": prepared, "space": prepared.space, "graph": prepared.space.graph},
        **{"capabilities": base.get(prepared.engine).capabilities()},
        **{"trainable": raysq.trainable(prepared, world["eval_fn"])},
    }
