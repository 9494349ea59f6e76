"""What goes wrong while scoring is an error that names who did it and to which sample, in the time that was allowed."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_core.config import ModelConfig
from rlhf_core.models.load import save_model
from rlhf_core.rollout.rewards import function_reward, load_model_reward, model_reward
from rlhf_core.rollout.timeouts import CallTimeout, call_within

PROMPTS = [[1, 5, 6], [1, 7], [1, 8]]
COMPLETIONS = [[8, 9, 2], [10], [11, 12]]
ROWS = [{"answer": 4}, {}, {"answer": 5}]


@pytest.fixture
def tokenizer(make_tokenizer):
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 40))]
    return make_tokenizer(words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def message_of(function, tokenizer, **options) -> str:
    with pytest.raises(ValueError) as caught:
        function_reward(function, tokenizer, **options)(PROMPTS, COMPLETIONS, ROWS)
    return str(caught.value)


def forever(prompts, completions, records):
    if "w10" in completions:
        time.sleep(60)
    return [0.0] * len(prompts)


# -------------------------------------------------------------------------------------------------------------- raising


def test_a_function_that_raises_is_named_with_the_sample(tokenizer):
    def judge(prompts, completions, records):
        return [row["answer"] for row in records]

    place = judge.__code__.co_firstlineno + 1
    assert message_of(judge, tokenizer) == (
        f"reward function judge: sample 1: KeyError: 'answer' ({__file__}:{place}); its completion begins 'w10'"
    )


def test_the_exception_itself_is_the_cause(tokenizer):
    def judge(prompts, completions, records):
        raise RuntimeError("no answer from the server")

    with pytest.raises(ValueError, match="judge: sample 0: RuntimeError: no answer from the server") as caught:
        function_reward(judge, tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert type(caught.value.__cause__) is RuntimeError


def test_a_generator_that_raises_half_way(tokenizer):
    def judge(prompts, completions, records):
        return (1 / row["answer"] for row in records)

    assert "reward function judge: sample 1: KeyError" in message_of(judge, tokenizer)


def test_a_fault_of_all_samples_together(tokenizer):
    def judge(prompts, completions, records):
        if len(prompts) > 1:
            raise MemoryError("too many")
        return [1.0]

    assert re.fullmatch(
        r"reward function judge: MemoryError: too many \(.*test_rewards_faults.py:\d+\) for 3 samples together, though "
        r"each alone is answered; the first of them: its completion begins 'w8 w9'",
        message_of(judge, tokenizer),
    )


def test_an_interruption_is_nobodys_fault(tokenizer):
    def judge(prompts, completions, records):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function_reward(judge, tokenizer, timeout=60)(PROMPTS, COMPLETIONS, ROWS)


def test_a_function_may_spoil_its_copies_of_the_rows(tokenizer):
    def judge(prompts, completions, records):
        for row in records:
            row.clear()
        return [0, 0, 0]

    rows = [{"answer": 4}, {}, {"answer": 5}]
    function_reward(judge, tokenizer)(PROMPTS, COMPLETIONS, rows)
    assert rows == ROWS


# -------------------------------------------------------------------------------------------------------------- hanging


def test_a_function_that_hangs_is_interrupted_and_the_sample_named(tokenizer):
    began = time.monotonic()
    said = message_of(forever, tokenizer, timeout=0.2)
    assert time.monotonic() - began < 10
    assert said == (
        "reward function forever: sample 1: no answer within reward_timeout=0.2 seconds; its completion begins 'w10'"
    )


def test_a_function_that_is_only_slow(tokenizer):
    def judge(prompts, completions, records):
        time.sleep(60 if len(prompts) > 1 else 0)
        return [0.0]

    said = message_of(judge, tokenizer, timeout=0.2)
    assert said.startswith("reward function judge: no answer within reward_timeout=0.2 seconds for 3 samples together")


def busy(event):
    while True:
        pass


def backtracking(event):
    re.fullmatch("(a|a)*b", "a" * 200)  # holds the interpreter: no other thread runs


def stubborn(event):
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def waiting(event):
    event.wait()


@pytest.mark.parametrize("function", [busy, backtracking, stubborn, waiting])
def test_whatever_hangs_is_interrupted(function):
    began = time.monotonic()
    with pytest.raises(CallTimeout):
        call_within(0.2, function, threading.Event())
    assert time.monotonic() - began < 10


def test_in_another_thread_too(tokenizer):
    """Where no alarm can be set, the waiting ends and the call is left behind."""
    event, said = threading.Event(), []

    def judge(prompts, completions, records):
        if "w10" in completions:
            event.wait()
        return [0.0] * len(prompts)

    def elsewhere():
        said.append(message_of(judge, tokenizer, timeout=0.2))
        said.append(call_within(60, lambda: "in time"))
        try:
            call_within(60, lambda: 1 / 0)
        except ZeroDivisionError:
            said.append("raised")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(30)
    event.set()
    assert "sample 1: no answer within reward_timeout=0.2 seconds; its completion begins 'w10'" in said[0]
    assert said[1:] == ["in time", "raised"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_an_alarm_of_someone_else_still_rings():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    before = signal.setitimer(signal.ITIMER_REAL, 0.5)
    began = time.monotonic()
    try:
        assert call_within(60, lambda: "in time") == "in time"
        with pytest.raises(CallTimeout):
            call_within(0.1, time.sleep, 60)
        assert rung == []
        while not rung and time.monotonic() - began < 30:
            time.sleep(0.05)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before[0]:  # pytest-timeout's
            signal.setitimer(signal.ITIMER_REAL, before[0])
    assert len(rung) == 1
    assert rung[0] - began >= 0.5


def test_no_alarm_is_left_behind():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ZeroDivisionError):
        call_within(0.3, lambda: 1 / 0)
    assert call_within(0.3, lambda: 5) == 5
    time.sleep(0.5)
    assert signal.getsignal(signal.SIGALRM) is handler


def test_the_shortest_patience_is_not_endless():
    with pytest.raises(CallTimeout):
        call_within(1e-9, time.sleep, 60)


def test_without_a_timeout_nothing_is_set(monkeypatch):
    monkeypatch.setattr(signal, "setitimer", None)
    assert call_within(None, lambda: 5) == 5


# -------------------------------------------------------------------------------------------------------- reward models


def test_a_score_that_is_not_finite(make_scorer, tokenizer):
    model = make_scorer()
    model.get_input_embeddings().weight.data[10] = torch.nan  # of w10, in the second completion
    with pytest.raises(
        ValueError, match="reward model: sample 1 got nan, expected a finite .* completion begins 'w10'"
    ):
        model_reward(model, tokenizer, tokenizer)(PROMPTS, COMPLETIONS, ROWS)


def test_a_prompt_too_long_for_the_reward_model_loses_its_left(make_scorer, make_tokenizer, tokenizer, caplog):
    """GPT-2 has no positions beyond its last, so a prompt is cut: its BOS stays, where the tokenizer has one."""
    model = make_scorer("gpt2", n_positions=32)
    long = [1, *range(3, 39)]
    reward = model_reward(model, tokenizer, tokenizer)
    cut = reward([long, long, long[:3]], [[10, 11], [10] * 31, [10, 11]], [{}] * 3)
    assert "reward model: 2 of 3 prompts lose their left; 32 positions" in caplog.text
    short = reward([[1, *long[-29:]], long[-1:], long[:3]], [[10, 11], [10] * 31, [10, 11]], [{}] * 3)
    assert torch.equal(cut.total, short.total)
    plain = make_tokenizer([f"w{number}" for number in range(40)], unk_token="w0", eos_token="w2")
    reward = model_reward(model, plain, plain)
    assert torch.equal(reward([long], [[10, 11]], [{}]).total, reward([long[-30:]], [[10, 11]], [{}]).total)
    with pytest.raises(ValueError, match="sample 1 has a completion of 32 tokens, expected at most 31, because"):
        reward([long, long], [[10], [10] * 32], [{}] * 2)


def test_several_labels_are_refused(make_policy, tokenizer, tmp_path):
    save_model(tmp_path, make_policy(auto=AutoModelForSequenceClassification, num_labels=3), tokenizer)
    with pytest.raises(ValueError, match="a classifier with 3 labels; a reward model has one"):
        load_model_reward(ModelConfig(path=str(tmp_path)), tokenizer)
    with pytest.raises(ValueError, match="3 labels"):
        model_reward(make_policy(auto=AutoModelForSequenceClassification, num_labels=3), tokenizer, tokenizer)
