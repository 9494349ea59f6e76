"""Each trainer learns something that a person can check, and learns the opposite when it is told the opposite."""

import importlib
import json
import math

import pytest

from rlhf_core.config import DataConfig, OptimConfig, SamplingConfig
from rlhf_core.data.loader import load_examples, micro_batches
from rlhf_core.losses import preference
from rlhf_core.models.forward import sequence_scores, token_logprobs
from rlhf_core.models.load import load_policy, load_reward_model
from tests.trainers.plain import sweep

FAST = OptimConfig(lr=2e-2, schedule="constant")
LIKED, DISLIKED = "dolo", "misu"
SUBJECTS = ["solano", "kelano", "mutano", "vilano", "tavelu", "morelu", "binelu", "harelu", "galosh", "tirosh"]


def pairs_file(folder, name: str, subjects: list[str], *, swapped: bool = False):
    """Prompts answered with a liked and with a disliked word, apart from that alike."""
    answers = (DISLIKED, LIKED) if swapped else (LIKED, DISLIKED)
    rows = [
        {"prompt": f"{subject} peta", "chosen": f"{answers[0]} {subject}", "rejected": f"{answers[1]} {subject}"}
        for subject in subjects
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------------------ SFT


def memorise(train, material):
    optim = OptimConfig(lr=2e-2, schedule="linear")
    return train("sft", max_steps=120, epochs=120, batch_size=10, optim=optim, eval_data=material / "sft.jsonl").metrics


def test_sft_memorises_its_rows(train, material):
    metrics = memorise(train, material)
    assert metrics[0]["nll"] > 3
    assert metrics[-1]["eval_nll"] < 0.2


@pytest.mark.slow
def test_sft_with_its_sign_flipped_does_not(train, material, monkeypatch):
    module = importlib.import_module("rlhf_core.trainers.sft")
    original = module.sft_loss

    def flipped(*args, **options):
        loss, stats = original(*args, **options)
        return -loss, stats

    monkeypatch.setattr(module, "sft_loss", flipped)
    assert memorise(train, material)[-1]["eval_nll"] > 3


def test_the_loss_of_sft_is_the_mean_over_all_tokens_of_the_step(train, material):
    """Not the mean of means: answers have from one to four words."""
    policy, tokenizer = load_policy(material / "policy")
    examples = load_examples(DataConfig(path=material / "sft.jsonl"), tokenizer, need="supervised")
    (batch,) = micro_batches(examples, None)
    expected = -token_logprobs(policy, batch).sum().item() / batch.num_completion_tokens
    for size in (None, 3):
        (row,) = train("sft", max_steps=1, batch_size=10, micro_batch_size=size).metrics
        assert row["nll"] == pytest.approx(expected, rel=1e-5)
        assert row["tokens"] == sum(len(example.completions[0]) for example in examples)


# --------------------------------------------------------------------------------------------------------- reward model


def judge(train, folder, *, swapped: bool, **changes) -> dict[str, float]:
    """The last evaluation on subjects that were not trained on."""
    data = pairs_file(folder, "train.jsonl", SUBJECTS[:6], swapped=swapped)
    evaluation = pairs_file(folder, "evaluation.jsonl", SUBJECTS[6:])
    run = train("reward", data=data, eval_data=evaluation, max_steps=15, optim=FAST, **changes)
    return run.metrics[-1]


def test_a_reward_model_prefers_the_liked_word(train, tmp_path):
    assert judge(train, tmp_path, swapped=False)["eval_accuracy"] == 1.0


def test_a_reward_model_of_swapped_pairs_prefers_the_other(train, tmp_path):
    assert judge(train, tmp_path, swapped=True)["eval_accuracy"] == 0.0


def test_the_centre_of_scores_is_held(train, tmp_path):
    def off_centre(center_coef: float) -> float:
        row = judge(train, tmp_path, swapped=False, center_coef=center_coef)
        return abs(row["eval_chosen_score"] + row["eval_rejected_score"])

    assert off_centre(10.0) < 0.5 * off_centre(0.0)


@pytest.mark.parametrize("size", [None, 3])
def test_the_numbers_of_a_reward_model_are_means_over_pairs(train, material, size):
    model, tokenizer = load_reward_model(material / "policy", seed=0)
    examples = load_examples(DataConfig(path=material / "pairs.jsonl"), tokenizer, need="preference")
    (batch,) = micro_batches(examples, None)
    chosen, rejected = sequence_scores(model, batch).detach().view(-1, 2).unbind(1)
    row = train("reward", max_steps=1, batch_size=10, micro_batch_size=size, center_coef=0.1).metrics[0]
    losses = (1 + (rejected - chosen).exp()).log() + 0.1 * (chosen + rejected).square()
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert row["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert row["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert row["chosen_score"] == pytest.approx(chosen.mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------------ DPO


def prefer(train, folder, *, swapped: bool, **changes) -> list[dict[str, float]]:
    data = pairs_file(folder, "train.jsonl", SUBJECTS[:6], swapped=swapped)
    evaluation = pairs_file(folder, "evaluation.jsonl", SUBJECTS[6:])
    changes = {"beta": 0.5} | changes
    return train("dpo", data=data, eval_data=evaluation, max_steps=15, optim=FAST, **changes).metrics


def test_dpo_prefers_the_liked_word(train, tmp_path):
    metrics = prefer(train, tmp_path, swapped=False)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["accuracy"] == 0.5  # all ties
    assert metrics[-1]["eval_accuracy"] == 1.0
    assert metrics[-1]["eval_loss"] < 0.3


def test_dpo_of_swapped_pairs_prefers_the_other(train, tmp_path):
    metrics = prefer(train, tmp_path, swapped=True)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["eval_accuracy"] == 0.0
    assert metrics[-1]["eval_loss"] > 1


BY_NAME = sorted(name for name, entry in preference.PREFERENCE_LOSSES.items() if not entry.needs)


@pytest.mark.parametrize("name", sweep(BY_NAME, ("hinge", "sppo_hard")))
def test_every_loss_by_name_learns_the_preference_and_its_opposite(train, tmp_path, name):
    """On evaluation subjects; trained on swapped pairs, the same loss learns the other taste."""
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    for swapped in (False, True):
        accuracy = prefer(train, tmp_path, swapped=swapped, loss=name, **smoothing)[-1]["eval_accuracy"]
        assert accuracy <= 0.25 if swapped else accuracy >= 0.75  # of four; ipo, held to a margin, overshoots in one


@pytest.mark.parametrize("name", ["orpo", "cpo", "sft"])
def test_a_loss_with_an_nll_term_ignores_micro_batches(train, material, name):
    """The term is a mean over the step's tokens, and answers have from one to four words."""
    whole, parts = (train("dpo", loss=name, max_steps=3, batch_size=10, micro_batch_size=size) for size in (None, 3))
    for row, other in zip(whole.metrics, parts.metrics, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_a_cached_reference_gives_the_same_run(train, tmp_path):
    """Cached or asked at every step: the same metrics and weights. By itself it is cached from the second epoch on."""
    live, cached = (train("dpo", epochs=3, reference__cache=choice) for choice in ("off", "on"))
    for row, other in zip(live.metrics, cached.metrics, strict=True):
        row["accuracy"] = other["accuracy"] if row["step"] == 1 else row["accuracy"]  # ties, told apart by rounding
        assert other == pytest.approx(row, rel=1e-3, abs=1e-6)
    assert live.distance(cached) < 1e-6
    by_itself = train("dpo", epochs=3)
    assert by_itself.same_weights(cached) and (by_itself.folder / "reference_logprobs").is_dir()
    assert not (live.folder / "reference_logprobs").exists()
    assert not (train("dpo", epochs=1).folder / "reference_logprobs").exists()


def test_a_cache_is_shared_between_runs_and_by_other_settings_of_the_loss(train, tmp_path, monkeypatch):
    module = importlib.import_module("rlhf_core.training.reference_cache")
    shared = dict(reference__cache="on", reference__cache_folder=str(tmp_path / "shared"))
    first = train("dpo", **shared)
    monkeypatch.setattr(module, "token_logprobs", lambda *args, **options: pytest.fail("the reference was asked"))
    assert train("dpo", **shared).same_weights(first)
    train("dpo", loss="ipo", beta=0.7, seed=3, **shared)


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 1}, {"model_layout": "padded"}, {"label_smoothing": 0.2}])
def test_the_first_loss_of_dpo_is_ln_2(train, material, changes):
    changes = dict(changes)
    if layout := changes.pop("model_layout", None):
        changes["model"] = {"path": material / "policy", "layout": layout}
    row = train("dpo", max_steps=1, **changes).metrics[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["margin"] == pytest.approx(0, abs=1e-6)


def test_dpo_against_another_reference_does_not_start_at_ln_2(train, plain_run):
    other = plain_run("sft").folder
    row = train("dpo", max_steps=1, beta=1.0, reference=other).metrics[0]
    assert abs(row["loss"] - math.log(2)) > 1e-3
    assert row["chosen_reward"] != 0


def test_the_reference_of_dpo_stays(train, monkeypatch):
    module = importlib.import_module("rlhf_core.training.reference")
    held = []
    original = module.load_reference

    def keep(*args, **options):
        model = original(*args, **options)
        held.extend((parameter, parameter.clone()) for parameter in model.parameters())
        assert not model.training
        return model

    monkeypatch.setattr(module, "load_reference", keep)
    train("dpo", optim=FAST)
    assert held
    assert all((now == before).all() and now.grad is None and not now.requires_grad for now, before in held)


def test_a_preference_loss_without_a_reference_loads_none(train, monkeypatch):
    entry = preference.PreferenceLoss(
        lambda pairs, *, beta, label_smoothing: -beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio),
        needs_reference=False,
    )
    monkeypatch.setitem(preference.PREFERENCE_LOSSES, "mine", entry)
    monkeypatch.setattr("rlhf_core.training.reference.load_reference", lambda *args, **options: pytest.fail("loaded"))
    metrics = train("dpo", loss="mine", batch_size=10).metrics
    assert metrics[-1]["loss"] < metrics[0]["loss"]


# ------------------------------------------------------------------------------------------------------------------ PPO


def please(train, function: str, value: str = "head") -> tuple[float, float]:
    """Liked words a completion at the start and at the end."""
    run = train(
        "ppo-" + value, reward_function=f"lumo_rewards:{function}", batch_size=40, minibatch_size=20, max_steps=12,
        epochs=99, kl__coef=0.01, kl__target=None, optim=OptimConfig(lr=1e-2, schedule="constant"),
        sampling=SamplingConfig(max_new_tokens=4),
    )  # fmt: skip
    sign = 1 if function == "likes" else -1
    scores = [sign * row["score"] for row in run.metrics]
    return scores[0], sum(scores[-3:]) / 3


@pytest.mark.parametrize("value", sweep(["head", "policy"], ("head",)))
def test_ppo_says_what_is_rewarded_more_often(train, value):
    start, end = please(train, "likes", value)
    assert start < 0.5
    assert end > 1.5


@pytest.mark.slow
def test_ppo_with_its_reward_negated_does_not(train):
    start, end = please(train, "dislikes")
    assert end <= start < 0.5


@pytest.mark.slow
def test_ppo_with_its_advantages_negated_does_not(train, monkeypatch):
    module = importlib.import_module("rlhf_core.trainers.ppo")
    original = module.masked_whiten
    monkeypatch.setattr(module, "masked_whiten", lambda *args, **options: -original(*args, **options))
    start, end = please(train, "likes")
    assert end <= start


def test_a_reward_function_of_the_wrong_kind_is_named(train):
    with pytest.raises(ValueError, match="lumo_rewards has no function adores"):
        train("ppo-head", reward_function="lumo_rewards:adores")
