"""The life of a run: its folder, how it stops, and how it resumes."""

import json
import math
import os
import signal
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from torch import nn

from rlhf_core.config import ConfigError, DataConfig, OptimConfig, RunConfig, from_dict, to_dict
from rlhf_core.control import AdaptiveKL
from rlhf_core.training import folder as folder_module
from rlhf_core.training import run as run_module
from rlhf_core.training.checkpoint import find_fault
from rlhf_core.training.folder import claim_folder, write_model_files
from rlhf_core.training.run import Interrupted, NonFiniteError, Run


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    job: ClassVar[str] = "toy"
    eval_data: DataConfig | None = None
    beta: float = 0.1


@dataclass(frozen=True, kw_only=True)
class OtherConfig(ToyConfig):
    job: ClassVar[str] = "other"


def settings(folder: Path, **changes) -> ToyConfig:
    return ToyConfig(**dict(model="m", data="d", output=folder / "run", progress=False) | changes)


def train(config: ToyConfig, total_steps: int = 6, *, during=lambda step: None) -> torch.Tensor:
    """A small trainer with everything a run can have. `during(step)` happens inside every step."""
    with Run(config, total_steps=total_steps, evaluate=lambda run: {"eval_loss": 0.5}, show=("loss",)) as run:
        model = nn.Linear(3, 1)
        run.add_model(
            "m", model, write=lambda folder: (folder / "weights.json").write_text(json.dumps(model.weight.tolist()))
        )
        control = run.add_state("kl", AdaptiveKL(0.1, target=1.0, horizon=100))
        for step in run.steps():
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step.number))
            loss = (model(inputs) * control.kl_coef - 1).square().mean()
            step.backward(loss)
            control.update(float(step.number), 10)
            during(step.number)
            step.metrics.mean({"loss": loss})
            step.metrics.set({"kl_coef": control.kl_coef})
    return model.weight.detach().clone()


def at(wanted: int, action):
    return lambda step: action() if step == wanted else None


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def rows(config: ToyConfig) -> list[dict]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def checkpoints(config: ToyConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output) / "checkpoints").glob("*"))


# ----------------------------------------------------------------------------------------------------- what it leaves


def test_what_a_finished_run_leaves(tmp_path, capsys):
    config = settings(tmp_path, optim=OptimConfig(lr=0.01, betas=(0.8, 0.9)), eval_data="held_out.jsonl", progress=True)
    train(config)
    folder = Path(config.output)
    assert {path.name for path in folder.iterdir()} == {"run.yaml", "run.json", "metrics.jsonl", "weights.json"}
    assert from_dict(ToyConfig, yaml.safe_load((folder / "run.yaml").read_text())) == config
    about = json.loads((folder / "run.json").read_text())
    assert {name: about[name] for name in ("job", "seed", "total_steps")} == {"job": "toy", "seed": 0, "total_steps": 6}
    assert about["versions"]["torch"] == version("torch")
    assert about["versions"].keys() >= {"rlhf-core", "transformers", "safetensors"}
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.splitlines()[-1] == f"toy: the model is in {folder}"


def test_a_run_without_progress_says_nothing(tmp_path, capfd):
    train(settings(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (2, [2, 4, 6]), (4, [4, 6])])
def test_when_it_evaluates(tmp_path, every, steps):
    config = settings(tmp_path, eval_every=every)
    train(config)
    assert [row["step"] for row in rows(config) if "eval_loss" in row] == steps


def test_checkpoints_on_the_way(tmp_path):
    config = settings(tmp_path, save_every=2, keep_checkpoints=2)
    train(config, total_steps=7)
    assert checkpoints(config) == ["step-000004", "step-000006"]


def test_saving_the_model_is_all_or_nothing(tmp_path):
    config = settings(tmp_path)
    train(config)
    before = (tmp_path / "run" / "weights.json").read_text()

    def fail(folder: Path) -> None:
        (folder / "weights.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_model_files(tmp_path / "run", fail)
    assert (tmp_path / "run" / "weights.json").read_text() == before

    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_text("whole")

    for _ in range(2):  # what the failure left does not matter; folders are replaced too
        write_model_files(tmp_path / "run", write)
    assert (tmp_path / "run" / "inner" / "x").read_text() == "whole"
    assert not (tmp_path / "run" / ".saving").exists()


# --------------------------------------------------------------------------------------------------- whose folder it is


def test_a_new_or_an_empty_folder_is_taken(tmp_path):
    config = settings(tmp_path)
    claim_folder(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    claim_folder(config)


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="expected a folder, found a file"):
        claim_folder(settings(tmp_path))


def test_a_used_folder_is_refused_and_nothing_in_it_changes(tmp_path):
    config = settings(tmp_path)
    train(config)
    with pytest.raises(ConfigError, match="not empty. --resume continues its run, --overwrite starts anew"):
        train(config)
    assert (tmp_path / "run" / "weights.json").exists()


def test_overwrite_deletes_what_the_earlier_run_left(tmp_path):
    train(settings(tmp_path, save_every=3))
    (tmp_path / "run" / "old").write_text("old")
    config = settings(tmp_path, overwrite=True, seed=1)
    train(config, total_steps=2)
    assert not (tmp_path / "run" / "old").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [row["step"] for row in rows(config)] == [1, 2]


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_a_folder_that_no_run_made_is_not_touched(tmp_path, flag):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"not the folder of a run \(it has no run.json\), so nothing in it is touched"
    ):
        claim_folder(settings(tmp_path, **{flag: True}))
    assert (tmp_path / "run" / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize("field", ["model", "data", "eval_data"])
@pytest.mark.parametrize("place", [".", "inside.jsonl", "deep/inside.jsonl"])
def test_a_run_does_not_destroy_its_own_input(tmp_path, monkeypatch, flag, field, place):
    train(settings(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "deep").mkdir()
    for name in ("inside.jsonl", "deep/inside.jsonl"):
        (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ConfigError, match="writing to it would destroy the input run"):
        claim_folder(settings(tmp_path, **{flag: True, field: os.path.join("run", place)}))
    assert (tmp_path / "run" / "deep" / "inside.jsonl").exists()


def test_missing_tensorboard_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard=True: .*pip install 'rlhf-core\[tensorboard\]'"):
        claim_folder(settings(tmp_path, tensorboard=True))
    claim_folder(settings(tmp_path))


# ------------------------------------------------------------------------------------------------------ how it stops


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_finishes_its_step_and_goes_on_from_there(tmp_path, number):
    straight = settings(tmp_path / "straight")
    expected = train(straight)
    config = settings(tmp_path)
    for step in (2, 5):
        with pytest.raises(Interrupted) as stopped:
            train(replace(config, resume=step > 2), during=at(step, lambda: interrupt(number)))
        kept = Path(config.output) / "checkpoints" / f"step-{step:06d}"
        assert str(stopped.value) == (
            f"toy: stopped after step {step} of 6. Kept {kept}; the same command with --resume goes on from there."
        )
        assert find_fault(kept) is None
        assert [row["step"] for row in rows(config)] == list(range(1, step + 1))
        assert not (Path(config.output) / "weights.json").exists()
    assert torch.equal(train(replace(config, resume=True)), expected)
    assert rows(config) == rows(straight)


def test_a_run_says_at_once_that_it_was_heard(tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(settings(tmp_path, progress=True), during=at(1, interrupt))
    assert "toy: finishing this step, then stopping (again to stop at once)" in capsys.readouterr().err


def test_asked_twice_it_stops_at_once(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(config, during=at(3, lambda: [interrupt(), interrupt()]))
    assert not isinstance(stopped.value, Interrupted)
    assert checkpoints(config) == []
    assert [row["step"] for row in rows(config)] == [1, 2]


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []
    train(settings(tmp_path), during=at(1, lambda: seen.append(signal.getsignal(signal.SIGINT))))
    with pytest.raises(RuntimeError):
        train(settings(tmp_path / "b"), during=at(1, lambda: _raise(RuntimeError())))
    assert seen[0] is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def _raise(error: BaseException):
    raise error


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path):
    straight = settings(tmp_path / "straight")
    expected = train(straight)
    config = settings(tmp_path, save_every=2)
    with pytest.raises(RuntimeError, match="crash"):
        train(config, during=at(5, lambda: _raise(RuntimeError("crash"))))
    assert checkpoints(config) == ["step-000002", "step-000004"]
    assert torch.equal(train(replace(config, resume=True)), expected)
    assert rows(config) == rows(straight)


def test_a_crash_before_the_first_checkpoint_starts_anew(tmp_path):
    straight = settings(tmp_path / "straight")
    expected = train(straight)
    config = settings(tmp_path)
    with pytest.raises(RuntimeError, match="crash"):
        train(config, during=at(3, lambda: _raise(RuntimeError("crash"))))
    assert torch.equal(train(replace(config, resume=True)), expected)
    assert rows(config) == rows(straight)


def test_resume_in_a_new_folder_starts(tmp_path):
    expected = train(settings(tmp_path / "straight"))
    assert torch.equal(train(settings(tmp_path, resume=True)), expected)


def test_a_finished_run_that_is_resumed_only_saves_again(tmp_path):
    config = settings(tmp_path, save_every=6)
    expected = train(config)
    (Path(config.output) / "weights.json").unlink()
    assert torch.equal(train(replace(config, resume=True), during=lambda step: pytest.fail("a step")), expected)
    assert (Path(config.output) / "weights.json").exists()


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    straight = settings(tmp_path / "straight")
    expected = train(straight)
    config = settings(tmp_path, save_every=2)
    with pytest.raises(RuntimeError, match="crash"):
        train(config, during=at(5, lambda: _raise(RuntimeError("crash"))))
    (Path(config.output) / "checkpoints" / "step-000004" / "m.safetensors").write_bytes(b"")
    assert torch.equal(train(replace(config, resume=True)), expected)
    assert rows(config) == rows(straight)


def test_the_clock_goes_on(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])

    def tick(step: int):
        now[0] += 10
        if step == 3 and now[0] < 2000:
            interrupt()

    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        train(config, during=tick)
    now[0] = 5000.0
    train(replace(config, resume=True), during=tick)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [10, 20, 30, 40, 50, 60]


# ------------------------------------------------------------------------------------------------- stopping from inside


def test_leaving_the_loop_early_is_an_error(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"toy: the loop left run.steps\(\) in step 1 of 6.*Call run.stop\(\)"),
        Run(settings(tmp_path), total_steps=6) as run,
    ):
        run.add_model("m", nn.Linear(1, 1), write=lambda folder: (folder / "weights.json").write_text("[]"))
        for _ in run.steps():
            break
    assert not (tmp_path / "run" / "weights.json").exists()
    with pytest.raises(KeyError), Run(settings(tmp_path / "other"), total_steps=6) as run:  # an error stays what it is
        run.add_model("m", nn.Linear(1, 1))
        for _ in run.steps():
            raise KeyError


def test_a_run_that_is_stopped_evaluates_and_saves_its_model(tmp_path):
    config = settings(tmp_path)
    with Run(config, total_steps=6, evaluate=lambda run: {"eval_loss": 0.5}) as run:
        model = nn.Linear(1, 1)
        run.add_model("m", model, write=lambda folder: (folder / "weights.json").write_text("[]"))
        for step in run.steps():
            step.backward(model.weight.sum())
            if step.number == 2:
                run.stop()
    assert (tmp_path / "run" / "weights.json").exists()
    assert [(row["step"], row.get("eval_loss")) for row in rows(config)] == [(1, None), (2, 0.5)]
    assert run.evaluation == {"eval_loss": 0.5} and run.last_step == 2


# -------------------------------------------------------------------------------------------- what may change meanwhile


@pytest.mark.parametrize(
    ("changes", "name", "old", "new"),
    [
        ({"batch_size": 8}, "batch_size", 16, 8),
        ({"micro_batch_size": 2}, "micro_batch_size", None, 2),
        ({"seed": 1}, "seed", 0, 1),
        ({"max_steps": 3}, "max_steps", None, 3),
        ({"epochs": 2}, "epochs", 1.0, 2.0),
        ({"beta": 0.2}, "beta", 0.1, 0.2),
        ({"model": "other"}, "model.path", "m", "other"),
        ({"data": DataConfig(path="d", limit=3)}, "data.limit", None, 3),
        ({"eval_data": "e"}, "eval_data", None, to_dict(DataConfig(path="e"))),
        ({"optim": OptimConfig(lr=1.0)}, "optim.lr", 1e-5, 1.0),
        ({"optim": OptimConfig(betas=(0.9, 0.9))}, "optim.betas", [0.9, 0.999], [0.9, 0.9]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_changed_is_named(tmp_path, changes, name, old, new):
    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        train(config, during=at(2, interrupt))
    before = rows(config)
    with pytest.raises(ConfigError) as refused:
        train(replace(config, resume=True, **changes))
    assert str(refused.value) == (
        f"{name}={new!r}: the run in {config.output} was started with {old!r}; a resumed run goes on as it began"
    )
    assert rows(config) == before
    assert from_dict(ToyConfig, yaml.safe_load((Path(config.output) / "run.yaml").read_text())) == config


def test_another_job_does_not_go_on_with_this_ones_weights(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        train(config, during=at(2, interrupt))
    with pytest.raises(ConfigError, match="job='other': .* was started with 'toy'"):
        train(OtherConfig(**vars(replace(config, resume=True))))


def test_what_may_change(tmp_path):
    expected = train(settings(tmp_path / "straight"))
    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        train(config, during=at(2, interrupt))
    (tmp_path / "run").rename(tmp_path / "moved")
    free = dict(output=tmp_path / "moved", save_every=2, keep_checkpoints=1, eval_every=2, device="cpu", progress=True)
    again = replace(config, resume=True, **free)
    assert torch.equal(train(again), expected)
    assert checkpoints(again) == ["step-000006"]


def test_a_lost_settings_file_does_not_lose_the_run(tmp_path):
    """What the run was started with is in the checkpoint, under its checksums."""
    expected = train(settings(tmp_path / "straight"))
    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        train(config, during=at(2, interrupt))
    (Path(config.output) / "run.yaml").write_text("")
    assert torch.equal(train(replace(config, resume=True)), expected)


# --------------------------------------------------------------------------------------------------- what is not finite


def spoiled(steps: set[int]):
    """A gradient that is not finite in the given steps, as the logged norm says."""

    def log(self, step, metrics):
        return original(self, step, metrics | ({"grad_norm": math.nan} if step in steps else {}))

    original = Run.log
    return log


def test_five_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "log", spoiled({3, 4, 5, 6, 7, 8}))
    config = settings(tmp_path)
    with pytest.raises(NonFiniteError, match=r"in each of the last 5 steps \(to 7\).*metrics.jsonl; a lower optim.lr"):
        train(config, total_steps=20)
    assert [row["grad_norm"] for row in rows(config)][2:] == ["nan"] * 5
    assert not (Path(config.output) / "weights.json").exists()


def test_a_good_step_between_bad_ones_starts_the_count_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "log", spoiled(set(range(1, 20)) - {5, 10, 15}))
    train(settings(tmp_path), total_steps=19)


# ------------------------------------------------------------------------------------------------------- the best one

GOOD = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: math.nan}


def train_evaluated(
    config: ToyConfig, values: dict[int, float], *, metric="eval_metric", during=lambda step: None
) -> None:
    """Ten steps of a model that holds the number of its last step; an evaluation returns its step's value."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()

    def evaluate(run: Run) -> dict[str, float]:
        return {metric: values[round(model.weight.item())]}

    with Run(config, total_steps=10, evaluate=evaluate) as run:
        run.add_model(
            "m", model, write=lambda folder: (folder / "weights.json").write_text(json.dumps(model.weight.item()))
        )
        for step in run.steps():
            with torch.no_grad():
                model.weight.add_(1)
            during(step.number)


def best_of(config: ToyConfig) -> tuple[float, int]:
    """The model that was kept, which is the number of its step, and the step that it says it is from."""
    folder = Path(config.output, "best")
    return json.loads((folder / "weights.json").read_text()), json.loads((folder / "best.json").read_text())["step"]


EVALUATED = dict(eval_data="d", eval_every=2, keep_best="eval_metric")


def test_the_best_model_is_kept_the_first_of_equals_and_never_one_that_is_not_a_number(tmp_path, capsys):
    config = settings(tmp_path, **EVALUATED | {"progress": True})
    train_evaluated(config, GOOD)
    assert best_of(config) == (4.0, 4)
    assert json.loads(Path(config.output, "weights.json").read_text()) == 10.0
    assert "the best model (eval_metric 0.9 at step 4) is in" in capsys.readouterr().err
    assert not [path for path in Path(config.output).iterdir() if path.name.startswith(".best")]


@pytest.mark.parametrize("metric", ["eval_loss", "eval_nll", "eval_kl"])
def test_of_a_loss_the_least_is_the_best(tmp_path, metric):
    config = settings(tmp_path, **EVALUATED | {"keep_best": metric})
    train_evaluated(config, GOOD, metric=metric)
    assert best_of(config) == (2.0, 2)


@pytest.mark.parametrize("stops", [[3], [4], [5, 9]], ids=str)
def test_the_best_is_the_same_after_stops(tmp_path, stops):
    config = settings(tmp_path, **EVALUATED)
    for stop in stops:
        with pytest.raises(Interrupted):
            train_evaluated(config, GOOD, during=at(stop, interrupt))
        config = replace(config, resume=True)
    train_evaluated(config, GOOD)
    assert best_of(config) == (4.0, 4)


def test_the_best_is_the_same_after_a_crash_behind_it(tmp_path):
    """Checkpoint at 3, best at 4, crash at 5: step 4 is done again, and is no better than itself."""
    config = settings(tmp_path, **EVALUATED, save_every=3)

    def crash() -> None:
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train_evaluated(config, GOOD, during=at(5, crash))
    assert best_of(config) == (4.0, 4)
    train_evaluated(replace(config, resume=True), GOOD)
    assert best_of(config) == (4.0, 4)
    Path(config.output, "best").replace(Path(config.output, ".best-old"))  # killed between two renames
    train_evaluated(replace(config, resume=True), GOOD)
    assert best_of(config) == (4.0, 4)


def test_a_run_that_starts_anew_forgets_the_best_of_another(tmp_path):
    config = settings(tmp_path, **EVALUATED)
    train_evaluated(config, GOOD)
    for checkpoint in Path(config.output).glob("checkpoints/*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    train_evaluated(replace(config, resume=True), {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.2, 10: 0.1})
    assert best_of(config) == (6.0, 6)


def test_keeping_the_best_needs_a_metric_and_evaluations(tmp_path):
    for changes, message in (
        ({"keep_best": "loss"}, "keep_best='loss': expected an evaluation metric"),
        ({"eval_every": 0}, "keep_best='eval_metric': expected eval_data, and eval_every more than 0"),
        ({"eval_data": None}, "keep_best='eval_metric': expected eval_data"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(tmp_path, **EVALUATED | changes)
    with pytest.raises(
        ConfigError, match="keep_best='eval_meric': expected one of eval_metric; did you mean eval_metric"
    ):
        train_evaluated(settings(tmp_path, **EVALUATED | {"keep_best": "eval_meric"}), GOOD)
    with (
        pytest.raises(ConfigError, match="keep_best='eval_metric': expected none, for toy saves no model"),
        Run(settings(tmp_path / "other", **EVALUATED), total_steps=1) as run,
    ):
        next(run.steps())


def test_kernels_that_cannot_run_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="kernels='triton': .*but the inputs are on 'cpu'"):
        claim_folder(RunConfig(model="m", data="d", output=str(tmp_path / "run"), kernels="triton", device="cpu"))
