"""The demo's language by hand, and the whole demo in its short version."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rlhf_core.demo.language import RHYMES, is_sentence, true_reward, write_couplet, write_line
from rlhf_core.demo.run import DemoConfig, demo


@pytest.mark.parametrize(
    ("second", "reward"),
    [
        ("kapi penira lari kovira .", 1.0),  # two new rhymes, a sentence
        ("kapi penira lari solano .", 0.6),  # one rhyme
        ("kapi lumira lari sadira .", 0.2),  # both words are in the first line
        ("penira lari penira .", 0.6),  # the same rhyme twice counts once
        ("penira kovira", 0.8),  # rhymes, but no sentence
        ("penira lari kovira", 0.8),  # no full stop
        ("solano lari zarak .", 0.2),
        ("", 0.0),
        (".", 0.0),
    ],
)
def test_true_reward_by_hand(second, reward):
    assert true_reward("vesa lumira tesu sadira", second) == pytest.approx(reward)


def test_lines_are_sentences_and_couplets_rhyme():
    rng = random.Random(1)
    assert all(is_sentence(write_line(rng)) for _ in range(200))
    assert not is_sentence("lari peta") and not is_sentence("solano lari") and not is_sentence("solano lari borg")
    for _ in range(100):
        first, second = write_couplet(rng, rhyming=1.0)
        ending = next(nouns for nouns in RHYMES.values() if first.split()[-1] in nouns)
        assert second.split()[-2] in ending and second.endswith(" .")
        assert true_reward(first, second) >= 0.2


@pytest.mark.slow  # two minutes; CI also runs the demo itself
@pytest.mark.timeout(600)
def test_the_demo_learns(tmp_path: Path, capsys):
    """The quick demo: PPO and DPO exceed SFT in the true reward, which no trainer uses."""
    table = demo(DemoConfig(output=str(tmp_path / "demo"), quick=True, progress=False))
    assert table["ppo"]["true reward"] > table["sft"]["true reward"] + 0.15, table
    assert table["dpo"]["true reward"] > table["sft"]["true reward"] + 0.08, table
    assert table["ppo"]["wins vs SFT"] > 0.7 and table["dpo"]["wins vs SFT"] > 0.58, table
    assert table["sft"]["KL to SFT"] == pytest.approx(0, abs=1e-5) and table["ppo"]["KL to SFT"] > 0.5
    printed = capsys.readouterr().out
    assert "held-out prompts" in printed and str(tmp_path / "demo") in printed
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
