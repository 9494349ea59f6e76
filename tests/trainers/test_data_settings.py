"""What the settings of data and batches do to a run: nothing where they only save memory or time, and exactly that
where they change what a step sees."""

import json
from dataclasses import replace

import pytest

from rlhf_core.config import DataConfig

OFFLINE = ["sft", "reward", "dpo", "kto"]
offline_job = pytest.mark.parametrize("job", OFFLINE)


@offline_job
def test_filling_micro_batches_by_tokens_changes_nothing(train, plain_run, job):
    whole, parts = plain_run(job), train(job, micro_batch_tokens=25)
    assert 0 < whole.distance(parts) < 1e-5  # 0 would be one group as before
    for row, other in zip(whole.metrics, parts.metrics, strict=True):
        for name in row.keys() - {"accuracy"}:  # told apart by rounding where the policy is still the reference
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=2e-5), name


@offline_job
def test_batches_by_tokens_change_the_steps_and_resume_to_the_bit(configure, train, train_with_stops, plain_run, job):
    changes = dict(max_tokens_per_batch=25, max_steps=5)
    uninterrupted = train(job, **changes)
    assert not uninterrupted.same_weights(train(job, max_steps=5))
    resumed = train_with_stops(configure(job, **changes), [2, 4])
    assert resumed.same_weights(uninterrupted) and resumed.metrics == uninterrupted.metrics


@offline_job
def test_a_cache_changes_nothing_and_run_json_knows_the_data(configure, train, plain_run, tmp_path, job):
    path = configure(job).data.path
    for _ in range(2):
        run = train(job, data=DataConfig(path=path, cache=str(tmp_path / "cache")))
        assert run.same_weights(plain_run(job)) and run.metrics == plain_run(job).metrics
    (about,) = json.loads((run.folder / "run.json").read_text())["data"]
    assert about["source"] == path and about["rows"] >= 10 and about["dropped"] == {}
    assert about["supervised_tokens"] == about["completion_tokens"] > 10


def test_a_weighted_mixture_resumes_to_the_bit(configure, train, train_with_stops, plain_run, material, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "rena vilano peta"}\n{"text": "kapi hilo"}\n')
    data = DataConfig(path=f"{material / 'sft.jsonl'},{tmp_path / 'texts.jsonl'}", weights=(2, 1))
    uninterrupted = train("sft", data=data)
    assert not uninterrupted.same_weights(plain_run("sft"))
    resumed = train_with_stops(configure("sft", data=data), [1, 3])
    assert resumed.same_weights(uninterrupted) and resumed.metrics == uninterrupted.metrics


def test_a_resumed_run_may_take_up_a_cache(configure, train_with_stops, train, plain_run, material, tmp_path):
    config = configure("sft", save_every=2, max_steps=4)
    train(config)
    data = DataConfig(path=material / "sft.jsonl", cache=str(tmp_path / "cache"))
    assert train(replace(config, data=data, resume=True)).same_weights(plain_run("sft"))
