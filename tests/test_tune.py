"""Whole searches through the front door on real Ray: what goes in stays as it was, what comes out was measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import raysq
from raysq import journal, strategies
from raysq.errors import CalibrationError, EvaluationError, NoFeasibleRecipe
from raysq.goal import Goal
from raysq.kernels import reference
from raysq.recipe import Precision
from raysq.result import Stage
from raysq.space import flatten
from raysq.tuning.conductor import Conductor
from raysq.tuning.records import to_result

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules
pytestmark = pytest.mark.slow

FEATURES, CLASSES = 16, 4
X = torch.randn(256, FEATURES, generator=torch.Generator().manual_seed(0))
# one slot: a second worker takes seconds to start, and then there is little left for it to do
QUICK = {"num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "latency": raysq.Latency(0.02, 0.02)}


class Log:
    """Lines in a file, from this and from worker processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    def add(self, what: object) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {what}\n")

    def here(self) -> list[str]:
        """What this process wrote."""
        return [what for pid, what in self._lines() if pid == os.getpid()]

    def elsewhere(self) -> list[str]:
        """What other processes wrote."""
        return [what for pid, what in self._lines() if pid != os.getpid()]

    def _lines(self) -> list[tuple[int, str]]:
        return [(int(line.split()[0]), line.split()[1]) for line in self.path.read_text().splitlines()]


class Net(nn.Module):
    """Counts, in a buffer, how often it ran, and logs the number of rows that it was given."""

    def __init__(self, log: Log | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(FEATURES, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(32, CLASSES)
        self.register_buffer("ran", torch.zeros(()))
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran += 1
        if self.log is not None:
            self.log.add(int(x.shape[0]))
        return self.fc2(self.drop(torch.relu(self.norm(self.fc1(x)))))


class Rows(Dataset[torch.Tensor]):
    """A dataset that logs which rows were read."""

    def __init__(self, log: Log, count: int) -> None:
        self.log = log
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        self.log.add(index)
        return X[index]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)).eval()


def agreement(model: nn.Module) -> Any:
    """Return an eval_fn: the share of rows on which the argmax is that of `model` in fp32."""
    with torch.no_grad():
        wanted = model(X).argmax(1)

    def eval_fn(candidate: nn.Module) -> float:
        return float((candidate(X).argmax(1) == wanted).float().mean())

    return eval_fn


def look(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that changes nothing."""


# --- one search, many questions ---

ROWS, BATCH = 20, 5


@pytest.fixture(scope="module")
def searched(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A search over a model in train mode with a hook; its data, forwards and evaluations are logged."""
    directory = tmp_path_factory.mktemp("searched")
    read, ran, scored = (Log(directory / name) for name in ("read", "ran", "scored"))
    model = Net(ran).train()
    model.norm.eval()
    model.fc1.register_forward_hook(look)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = dict(model.fc1._forward_hooks)
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        wanted = Net().eval()(X).argmax(1)

    def eval_fn(candidate: nn.Module) -> float:
        scored.add("begin")
        candidate.eval()
        score = float((candidate(X).argmax(1) == wanted).float().mean())
        time.sleep(0.1)  # as real evaluations do, it leaves the others time to begin
        scored.add("end")
        return score

    result = raysq.tune(
        model,
        DataLoader(Rows(read, ROWS), batch_size=BATCH),
        eval_fn,
        tolerance=0.1,
        example_inputs=X[:2],  # so that calibration batches are known by their size
        max_trials=6,
        storage_path=directory,
        name="run",
        **QUICK,
    )
    return SimpleNamespace(**locals())


def test_calibration_data_is_read_once(searched: SimpleNamespace) -> None:
    assert searched.read.here() == [str(i) for i in range(ROWS)]
    assert searched.read.elsewhere() == []


def test_each_calibration_batch_runs_once(searched: SimpleNamespace) -> None:
    assert searched.ran.here().count(str(BATCH)) == ROWS / BATCH


def test_no_calibration_forward_happens_in_a_trial(searched: SimpleNamespace) -> None:
    sizes = searched.ran.elsewhere()
    assert sizes  # builds trace the model, so the log works there
    assert set(sizes) == {"2"}


def test_parameters_and_buffers_are_bit_identical(searched: SimpleNamespace) -> None:
    after = searched.model.state_dict()
    assert list(after) == list(searched.before)
    assert all(torch.equal(after[name], tensor) for name, tensor in searched.before.items())


def test_train_mode_and_hooks_stay(searched: SimpleNamespace) -> None:
    assert {name: module.training for name, module in searched.model.named_modules()} == searched.modes
    assert dict(searched.model.fc1._forward_hooks) == searched.hooks
    assert all(p.requires_grad and p.grad is None for p in searched.model.parameters())


def test_the_baseline_is_the_model_in_eval_mode(searched: SimpleNamespace) -> None:
    assert searched.result.baseline.accuracy == 1.0  # with dropout, hardly ever


def test_the_model_that_is_returned_is_the_one_that_was_measured(searched: SimpleNamespace) -> None:
    result = searched.result
    assert searched.eval_fn(result.model) == result.accuracy
    winner = next(t for t in result.trials if t.recipe == result.recipe)
    assert (winner.accuracy, winner.feasible, winner.stage) == (result.accuracy, True, Stage.TIMED)


def test_something_really_runs_in_int8(searched: SimpleNamespace) -> None:
    assert Precision.INT8 in searched.result.executed.values()


def test_max_trials_is_kept(searched: SimpleNamespace) -> None:
    assert 1 <= len(searched.result.trials) <= 6


def test_one_slot_evaluates_each_trial_once_and_one_at_a_time(searched: SimpleNamespace) -> None:
    assert searched.scored.elsewhere() == ["begin", "end"] * len(searched.result.trials)


def test_no_recipe_is_tried_twice(searched: SimpleNamespace) -> None:
    digests = [t.recipe.digest for t in searched.result.trials]
    assert len(set(digests)) == len(digests)


def test_the_journal_holds_every_trial(searched: SimpleNamespace) -> None:
    header, entries = journal.read(searched.directory / "run" / "journal.jsonl")
    assert [entry.record for entry in entries] == list(searched.result.trials)
    assert header.baseline == searched.result.baseline


def test_the_frame_has_a_row_per_trial(searched: SimpleNamespace) -> None:
    frame = searched.result.dataframe()
    promised = (
        "trial status stage accuracy accuracy_drop latency_ms latency_ratio speedup feasible "
        "build_s eval_s timing_s waiting_s overhead_s reason"
    )
    assert set(promised.split()) <= set(frame.columns)
    assert list(frame["trial"]) == [t.trial for t in searched.result.trials]


def test_what_is_saved_gives_the_same_outputs(searched: SimpleNamespace, tmp_path: Path) -> None:
    searched.result.save(tmp_path)
    assert torch.equal(raysq.load(tmp_path)(X), searched.result.model(X))


FRESH = """
import sys, torch
import intel_extension_for_pytorch
model = torch.jit.load("model.pt")
inputs = torch.load("inputs.pt", weights_only=True)
for _ in range(3):  # the first runs profile and compile; unfused kernels round differently
    outputs = model(*inputs)
assert "raysq" not in sys.modules
torch.save(outputs, "outputs.pt")
"""


def test_a_process_with_torch_and_ipex_only_runs_what_was_saved(searched: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("intel_extension_for_pytorch")
    searched.result.save(tmp_path)
    torch.save([X], tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH], cwd=tmp_path, check=True, env=one_thread())
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    torch.testing.assert_close(outputs, searched.result.model(X), rtol=0, atol=0)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# --- the programs of INC's quantization guide (seed 002), in raysq's names ---


class Small(nn.Module):
    """Stands for ResNet50."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


class Masked(nn.Linear):
    """Could take a label for its mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if mask is None else x * mask)


class AverageMeter:
    """Keeps the average, as the ImageNet example does."""

    def __init__(self) -> None:
        self.sum = self.count = 0.0

    def update(self, value: float, n: int) -> None:
        self.sum += value * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.sum / self.count


def validate(val_loader: Any, model: nn.Module, criterion: nn.Module, args: SimpleNamespace) -> float:
    """The ImageNet example's loop, unchanged."""
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, target in val_loader:
            output = model(images)
            loss = criterion(output, target)
            losses.update(loss.item(), images.size(0))
            top1.update((output.argmax(1) == target).float().mean().item() * args.percent, images.size(0))
    return top1.avg


@pytest.fixture
def val_loader() -> Iterator[Any]:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = Small().eval()(images).argmax(1)
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=False, num_workers=0)


def test_seed_program_without_tuning(val_loader: Any, tmp_path: Path) -> None:
    model = Small()

    q_model = raysq.quantize(model, calib=val_loader)
    q_model.save(tmp_path / "output")

    images, _ = next(iter(val_loader))
    assert Precision.INT8 in q_model.executed.values()
    assert torch.equal(raysq.load(tmp_path / "output")(images), q_model(images))


def test_seed_program_with_accuracy_aware_tuning(cluster: None, val_loader: Any, tmp_path: Path) -> None:
    model = Small()
    criterion, args = nn.CrossEntropyLoss(), SimpleNamespace(percent=100.0)

    def eval_func(model: nn.Module) -> float:
        return validate(val_loader, model, criterion, args)

    result = raysq.tune(
        model, val_loader, eval_func, tolerance=0.05, max_trials=3, storage_path=tmp_path / "runs", **QUICK
    )
    result.save(tmp_path / "output")

    assert result.baseline.accuracy == 100.0
    assert result.accuracy >= 95.0
    assert eval_func(raysq.load(tmp_path / "output")) == result.accuracy


def test_a_label_that_could_be_an_input_is_asked_about() -> None:
    loader = DataLoader(TensorDataset(X, torch.zeros(len(X))), batch_size=64)
    with pytest.raises(CalibrationError) as caught:
        raysq.quantize(Masked(FEATURES, CLASSES), loader, backend="reference")
    line = "calib=raysq.Calibration(loader, inputs=lambda b: b[0], target=lambda b: b[1])"
    assert line in str(caught.value)
    calib = eval(line.removeprefix("calib="), {"raysq": raysq, "loader": loader})
    assert raysq.quantize(Masked(FEATURES, CLASSES), calib, backend="reference")(X).shape == (256, CLASSES)


# --- a Hugging Face model and an evaluation written for it ---


@pytest.fixture(scope="module")
def bert() -> SimpleNamespace:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
        initializer_range=0.5,  # random weights of the usual size give nearly the same logits for any input
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batches = []
    for _ in range(4):
        ids = torch.randint(1, 50, (8, 12))
        mask = torch.ones_like(ids)
        mask[::2, 9:] = 0
        with torch.no_grad():
            labels = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return SimpleNamespace(model=model, batches=batches)


def hugging_face_eval(dataloader: Any) -> Any:
    """Return an evaluation as the library's examples write it: no_trainer.py, labels within the batch."""

    def evaluate(model: Any) -> dict[str, float]:
        model.eval()
        correct = total = 0
        losses = []
        for batch in dataloader:
            batch = {k: v.to(model.device) for k, v in batch.items()}
            with torch.no_grad():
                outputs = model(**batch)
            losses.append(outputs.loss.item())
            predictions = outputs.logits.argmax(dim=-1)
            correct += (predictions == batch["labels"]).sum().item()
            total += len(predictions)
            assert type(outputs).__name__ == "SequenceClassifierOutput"
            assert model.config.num_labels == outputs.logits.shape[-1]
            assert outputs[0] is outputs.loss
        return {"accuracy": correct / total, "loss": sum(losses) / len(losses)}

    return evaluate


def test_hugging_face_evaluation_runs_unchanged(cluster: None, bert: SimpleNamespace, tmp_path: Path) -> None:
    eval_fn = hugging_face_eval(bert.batches)
    result = raysq.tune(
        bert.model,
        bert.batches,
        eval_fn,
        tolerance=0.2,
        max_trials=2,
        storage_path=tmp_path,
        **QUICK,
    )
    assert result.baseline.metrics["accuracy"] == 1.0  # agreement with fp32
    scored = eval_fn(result.model)
    assert scored["accuracy"] == result.accuracy >= 0.8
    assert set(next(t.metrics for t in result.trials if t.metrics)) == {"accuracy", "loss"}


# --- what eval_fn may return ---


@pytest.fixture
def tune(cluster: None, tmp_path: Path) -> Any:
    def start(model: nn.Module, eval_fn: Any, **options: Any) -> raysq.Result:
        given = {"backend": "reference", "goal": Goal(0.1), "max_trials": 2, "storage_path": tmp_path, "name": "run"}
        return raysq.tune(model, [X[:128]], eval_fn, **{**QUICK, **given, **options})

    return start


def test_a_generator_of_sums_and_counts_gives_their_mean(tune: Any) -> None:
    model = mlp()
    wanted = model(X).argmax(1)

    def eval_fn(candidate: nn.Module) -> Iterator[tuple[torch.Tensor, int]]:
        for rows in torch.arange(len(X)).split(100):  # the last batch is smaller
            yield (candidate(X[rows]).argmax(1) == wanted[rows]).sum(), len(rows)

    result = tune(model, eval_fn)
    assert result.accuracy == pytest.approx(agreement(model)(result.model), abs=1e-12)


def test_of_a_dict_the_metric_of_the_goal_counts(tune: Any) -> None:
    model = mlp()
    plain = agreement(model)

    def eval_fn(candidate: nn.Module) -> dict[str, float]:
        return {"top1": plain(candidate), "rows": 256}

    result = tune(model, eval_fn, goal=Goal(0.1, metric="top1"))
    assert result.accuracy == plain(result.model)
    assert all(t.metrics == {"top1": t.accuracy, "rows": 256} for t in result.trials)


def test_where_lower_is_better_a_loss_may_grow_by_the_tolerance(tune: Any) -> None:
    model = mlp()
    wanted = model(X).argmax(1)

    def eval_fn(candidate: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(candidate(X), wanted)

    result = tune(model, eval_fn, goal=Goal(0.1, higher_is_better=False))
    grown = (result.accuracy - result.baseline.accuracy) / result.baseline.accuracy
    assert result.accuracy_drop == pytest.approx(grown)
    assert grown <= 0.1


# --- limits ---


def test_stop_at_first_ends_with_the_first_that_holds(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("raysq.api.measured_times")  # single calls are timed to find the fastest only
    result = tune(mlp(), agreement(mlp()), max_trials=20, stop_at_first=True)
    assert [t.feasible for t in result.trials] == [False] * (len(result.trials) - 1) + [True]


def test_timeout_ends_the_search_and_keeps_what_it_found(tune: Any) -> None:
    plain = agreement(mlp())

    def eval_fn(candidate: nn.Module) -> float:
        time.sleep(0.5)
        return plain(candidate)

    result = tune(mlp(), eval_fn, strategy="random", max_trials=1000, timeout_s=40)
    assert 1 <= len(result.trials) < 250  # a plateau would have ended it at 250


def test_timeout_before_the_first_trial_says_so(tune: Any) -> None:
    with pytest.raises(EvaluationError, match="ended before its first trial"):
        tune(mlp(), agreement(mlp()), timeout_s=0.01)


# --- nothing meets the goal ---


@pytest.fixture(scope="module")
def infeasible(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> NoFeasibleRecipe:
    model = mlp()
    with torch.no_grad():
        wanted = model(X)

    def eval_fn(candidate: nn.Module) -> float:
        return 1.0 - float((candidate(X) - wanted).abs().mean())  # 1 for fp32 only: int8 always rounds

    options = {"tolerance": 1e-7, "max_trials": 5, "storage_path": tmp_path_factory.mktemp("infeasible")}
    with pytest.raises(NoFeasibleRecipe, match="larger tolerance") as caught:
        raysq.tune(model, [X[:128]], eval_fn, backend="reference", strategy="random", **QUICK, **options)
    return caught.value


def test_the_exception_carries_the_closest_recipe(infeasible: NoFeasibleRecipe) -> None:
    result = infeasible.result
    int8 = [t for t in result.trials if t.int8_calls]
    assert not result.feasible
    assert result.accuracy_drop == min(t.accuracy_drop for t in int8) > 0
    assert result.model(X).shape == (256, CLASSES)


def test_the_exception_carries_every_trial(infeasible: NoFeasibleRecipe) -> None:
    frame = infeasible.result.dataframe()
    assert len(frame) == len(infeasible.result.trials) == 5
    assert not frame["feasible"].any()
    assert all(frame["reason"] != "")


def test_infeasible_trials_are_not_timed(infeasible: NoFeasibleRecipe) -> None:
    assert {t.stage for t in infeasible.result.trials} == {Stage.EVALUATED}


# --- warm start ---


@pytest.fixture(scope="module")
def earlier(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[raysq.Result]:
    """A finished search of `mlp`, and as long as it is used there is one fp32 form: chance decides between equals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.Engine, "float_forms", lambda engine: ("jit",))
        yield _earlier(tmp_path_factory.mktemp("earlier"))


def _earlier(directory: Path) -> raysq.Result:
    given = {"tolerance": 0.1, "backend": "reference", "strategy": "random", "max_trials": 4}
    return raysq.tune(
        mlp(),
        [X[:128]],
        agreement(mlp()),
        storage_path=directory,
        name="run",
        **given,
        **QUICK,
    )


def test_a_warm_start_repeats_no_trial_of_a_run_of_the_same(earlier: raysq.Result, tune: Any, tmp_path: Path) -> None:
    before = {t.recipe.digest for t in earlier.trials}
    result = tune(mlp(), agreement(mlp()), strategy="random", max_trials=3, warm_start=earlier.journal.parent)
    own = [t for t in result.trials if t.trial >= 0]
    assert [t.trial for t in own] == [0, 1, 2]
    assert before.isdisjoint(t.recipe.digest for t in own)  # the same seed: without it they would be the same
    assert {t.recipe.digest for t in result.trials if t.trial < 0} == before
    header, entries = journal.read(tmp_path / "run" / "journal.jsonl")
    assert [entry.record for entry in entries] == own
    again = tune(mlp(), agreement(mlp()), strategy="random", max_trials=3, resume=tmp_path / "run")
    assert [t.recipe for t in again.trials] == [t.recipe for t in result.trials]  # without a `warm_start` again


def test_a_known_recipe_can_win_without_a_trial(earlier: raysq.Result, tune: Any) -> None:
    result = tune(mlp(), agreement(mlp()), stop_at_first=True, warm_start=earlier.journal)
    assert all(t.trial < 0 for t in result.trials)
    assert agreement(mlp())(result.model) == result.accuracy


def test_a_warm_start_carries_recipes_to_another_model_of_the_architecture(earlier: raysq.Result, tune: Any) -> None:
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)).eval()
    result = tune(other, agreement(other), max_trials=2, warm_start=earlier.journal)
    assert [(t.trial, t.label) for t in result.trials] == [(0, "warm start"), (1, "warm start")]
    assert {t.recipe for t in result.trials} <= {t.recipe for t in earlier.trials}


def test_a_warm_start_takes_what_save_wrote(earlier: raysq.Result, tune: Any, tmp_path: Path) -> None:
    earlier.save(tmp_path / "saved")
    first, *_ = tune(mlp(), agreement(mlp()), max_trials=1, warm_start=tmp_path / "saved").trials
    assert (first.recipe, first.label) == (earlier.recipe, "warm start")


# --- replay ---


@pytest.mark.parametrize("strategy", ["auto", "tpe", "tpe_hyperopt"])  # all are replayed on the simulation
def test_replaying_a_journal_gives_the_same_suggestions(strategy: str, tune: Any, tmp_path: Path) -> None:
    trials = 10
    tune(mlp(), agreement(mlp()), strategy=strategy, max_trials=trials, seed=7)
    header, entries = journal.read(tmp_path / "run" / "journal.jsonl")

    prepared = raysq.prepare(mlp(), [X[:128]], backend="reference", num_threads=1, seed=7)
    goal = Goal(0.1)
    searcher = strategies.get(strategy).bind(prepared.space, goal, trials, 7, prepared.source, times=header.op_times)
    conductor = Conductor(searcher, prepared.space, goal, trials)
    ended = deque(entries)
    for entry in sorted(entries, key=lambda e: e.record.trial):
        while len(conductor.history) < entry.seen:
            record = ended.popleft().record
            conductor.on_trial_complete(str(record.trial), to_result(record))
        suggestion = conductor.suggest(str(entry.record.trial))
        assert prepared.space.recipe(flatten(suggestion)) == entry.record.recipe
    assert len(entries) >= 5


def test_all_backends_are_tried_and_the_fastest_that_holds_is_shipped(tune: Any, tmp_path: Path) -> None:
    result = tune(mlp(), lambda model: 1.0, backend="auto")
    ran = [standing for standing in result.backends if standing.holds]
    assert result.backends[-1].backend == "torch.compile" and not result.backends[-1].holds
    assert {"onednn", "ipex"} <= {standing.backend for standing in result.backends}, result.backends
    fastest = min(ran, key=lambda standing: standing.latency_ratio)
    assert (result.backend, result.latency_ratio) == (fastest.backend, fastest.latency_ratio)
    result.save(tmp_path)
    assert torch.equal(raysq.load(tmp_path)(X), result.model(X))
