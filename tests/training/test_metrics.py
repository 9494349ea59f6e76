"""Numbers that are averaged by weight, and written so that nothing is lost and nothing looks better than it was."""

import json
import math

import pytest
import torch

from rlhf_core.training.metrics import MetricWriter, StepMetrics


def rows(folder) -> list[dict]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def write(folder, steps, *, value=0.0, **options) -> None:
    writer = MetricWriter(folder, **options)
    for step in steps:
        writer.write(step, {"loss": value})
    writer.close()


def test_means_are_weighted():
    metrics = StepMetrics()
    metrics.mean({"loss": 1.0, "accuracy": torch.tensor(0.5)}, weight=3)
    metrics.mean({"loss": 5.0}, weight=1)
    metrics.mean({"accuracy": torch.tensor(1.0)}, weight=torch.tensor(1.0))
    metrics.mean({"once": 7})
    found = metrics.read()
    assert found == {"loss": 2.0, "accuracy": 0.625, "once": 7.0}
    assert all(type(value) is float for value in found.values())
    assert metrics.total("loss") == 8.0 and metrics.total("other") == 0.0


def test_sums_maxima_and_single_numbers():
    metrics = StepMetrics()
    for tokens, ratio in ((2, 1.5), (3, 2.5), (torch.tensor(4), 0.5)):
        metrics.sum({"tokens": tokens})
        metrics.maximum("ratio", torch.tensor(ratio))
        metrics.set({"last": ratio})
    assert metrics.read() == {"tokens": 9, "ratio": 2.5, "last": 0.5}
    assert metrics.largest("ratio").item() == 2.5
    metrics.maximum("ratio", torch.tensor(math.nan))
    assert math.isnan(metrics.read()["ratio"])


def test_metrics_hold_no_graph():
    weight = torch.ones(3, requires_grad=True)
    metrics = StepMetrics()
    metrics.mean({"loss": weight.sum()})
    assert not metrics.total("loss").requires_grad


def test_a_bad_number_is_not_averaged_away():
    metrics = StepMetrics()
    metrics.mean({"loss": 1.0})
    metrics.mean({"loss": math.nan})
    assert math.isnan(metrics.read()["loss"])


def test_rows_are_json_and_there_as_soon_as_they_are_written(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 0.5, "tokens": 3, "bad": math.nan, "worse": math.inf, "worst": -math.inf})
    assert rows(tmp_path) == [
        {"step": 1, "loss": 0.5, "tokens": 3, "bad": "nan", "worse": "inf", "worst": "-inf"}
    ]  # fmt: skip
    writer.write(2, {"loss": 0.25})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    writer.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, range(1, 8), value=1.0)
    write(tmp_path, [5, 6], value=2.0, resume_at=4)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_a_run_that_starts_anew_because_nothing_was_kept_drops_all(tmp_path):
    write(tmp_path, [1, 2], value=1.0)
    write(tmp_path, [1], value=2.0, resume_at=0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 2)]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 0.1}', "\x00\x00\x00"])
def test_a_torn_last_line_does_not_stop_a_resumption(tmp_path, torn):
    write(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, [3], value=2.0, resume_at=2)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 0), (2, 0), (3, 2)]


def test_dropping_lines_is_all_or_nothing(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])

    def fail(*args):
        raise OSError("killed")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="killed"):
        MetricWriter(tmp_path, resume_at=1)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_tensorboard_has_the_same_numbers(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars() -> dict[str, list[tuple[int, float]]]:
        events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    write(tmp_path, [1, 2, 3], value=1.0, tensorboard=True)
    assert scalars() == {"loss": [(1, 1), (2, 1), (3, 1)]}
    write(tmp_path, [3, 4], value=2.0, tensorboard=True, resume_at=2)
    assert scalars() == {"loss": [(1, 1), (2, 1), (3, 2), (4, 2)]}


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf-core\[tensorboard\]'"):
        MetricWriter(tmp_path, tensorboard=True)
    MetricWriter(tmp_path / "..", tensorboard=False).close()
