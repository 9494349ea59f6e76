"""GRPO and its kin: metrics and whole updates by hand with plain transformers, and what groups without news do."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, OptimConfig, SamplingConfig
from rlhf_core.losses.policy import POLICY_LOSSES
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import OnlineRun
from rlhf_core.rollout.plan import plan_groups
from rlhf_core.trainers import grpo
from tests.trainers.plain import (
    all_logprobs,
    descend,
    expected_metrics,
    largest_difference,
    mean,
    record,
    spread,
    step_downhill,
    sweep,
    token_logprobs,
)

LIKES, VOWELS = "lumo_rewards:likes", "tests.trainers.plain:vowels"
PICKY, SILENT, BY_PROMPT = (f"tests.trainers.plain:{name}" for name in ("picky", "silent", "by_prompt"))
ONE_UPDATE = dict(batch_size=5, num_generations=3, minibatch_size=15, rollout_epochs=1)
MEASURED = dict(batch_size=10, minibatch_size=30)
LONG = SamplingConfig(max_new_tokens=6)

# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_metric_by_hand(train, material, talker, monkeypatch, temperature):
    """At the third step, away from the reference. One minibatch and one epoch: weights hold still."""
    played, scored = record(monkeypatch)
    run = train(
        "grpo", **ONE_UPDATE | MEASURED, reward_function=PICKY, max_steps=3, kl__coef=0.3,
        optim=OptimConfig(lr=3e-3, schedule="constant"), model=talker, reference=material / "policy",
        sampling=SamplingConfig(max_new_tokens=6, temperature=temperature),
    )  # fmt: skip
    row, rollout, scores = run.metrics[2], played[2].rollout, scored[2]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    left_out = tuple(i for i, valid in enumerate(scores.valid.tolist()) if not valid)
    assert 0 < len(left_out) < 30
    expected = expected_metrics(played[2], scores, reference, temperature, left_out=left_out)

    advantages = group_scores_by_hand(scores, 3, "group")
    logprobs = all_logprobs(played[2].policy, rollout, temperature)
    ref_logprobs = all_logprobs(reference, rollout, temperature)
    in_loss = [i for i in range(30) if i not in left_out]
    expected |= {
        "policy_loss": -mean([advantages[i] for i in in_loss]),  # ratios are 1
        "kl_loss": mean([(0.5 * (logprobs[i] - ref_logprobs[i]) ** 2).mean().item() for i in in_loss]),
        "flat_groups": sum(all(advantages[i] == 0 for i in range(first, first + 3)) for first in range(0, 30, 3)),
        "clip_fraction": 0.0,
        "lr": 3e-3,
    }
    assert row.keys() == expected.keys() | {"step", "grad_norm"}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def group_scores_by_hand(scores, size: int, scale: str) -> list[float]:
    """Advantages; a completion without a score has none."""
    total, valid = scores.total.tolist(), scores.valid.tolist()
    means, advantages = [], []
    for first in range(0, len(total), size):
        own = [total[i] for i in range(first, first + size) if valid[i]]
        means += [mean(own) if own else 0.0] * size
        deviation = spread(own, 1) if len(own) > 1 else 0.0
        divisor = deviation + 1e-4 if scale == "group" else 1.0
        advantages += [(total[i] - means[i]) / divisor if valid[i] else 0.0 for i in range(first, first + size)]
    if scale == "batch":
        deviation = spread([score for score, exists in zip(total, valid, strict=True) if exists], 1)
        advantages = [advantage / (deviation + 1e-4) for advantage in advantages]
    return advantages


def surrogate_by_hand(loss: str, new, old, advantage: float, options: dict) -> torch.Tensor:
    """(T,) of one completion: what each token adds."""
    log_ratio = new - old
    if loss in ("gspo", "luspo"):
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    ratio = log_ratio.exp()
    if loss == "cispo":
        return -ratio.detach().clamp(max=options.get("ratio_max", 5.0)) * advantage * new
    if loss == "sapo":
        tau = options.get("temperature_pos", 1.0) if advantage > 0 else options.get("temperature_neg", 1.05)
        return -4 / tau / (1 + (-tau * (ratio - 1)).exp()) * advantage
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(loss, (0.2, 0.2))
    low, high = options.get("clip", low), options.get("clip_high", options.get("clip", high))
    terms = []
    for one in ratio:
        inside = min(max(one, one.new_tensor(1 - low)), one.new_tensor(1 + high))
        worst = min(one * advantage, inside * advantage)
        if "dual_clip" in options and advantage < 0:
            worst = max(worst, one.new_tensor(options["dual_clip"] * advantage))
        terms.append(-worst)
    return torch.stack(terms)


def minibatches_of(takes_part: torch.Tensor, group_size: int, size: int, epochs: int, seed: int) -> list[torch.Tensor]:
    """The rows of each minibatch of step 1."""
    count = len(takes_part)
    tokens = [[1]] * count
    experience = Experience.sampled(tokens, tokens, torch.zeros(count, 1), takes_part, group_size=group_size)
    config = SimpleNamespace(minibatch_size=size, micro_batch_size=count, rollout_epochs=epochs, seed=seed)
    return [torch.cat(parts) for parts in plan_groups(experience.exclude(~takes_part), config, 1).minibatches]


def kl_by_hand(loss: str, new, old, reference, settings: dict) -> torch.Tensor:
    """(T,) of one completion."""
    log_ratio = (new - old).mean() if loss == "gspo" else new - old
    d = new - reference
    estimate = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[settings.get("kl__estimator", "k2")]
    return estimate * log_ratio.exp() if settings.get("kl__ratio") else estimate


UPDATES = {
    "grpo": {},
    "dr_grpo": {},
    "dapo": {"score__overlong_buffer": 4, "dynamic_sampling": 0},
    "gspo": {},
    "cispo": {"loss_options": {"ratio_max": 1.05}},
    "sapo": {"loss_options": {"temperature_pos": 1.3, "temperature_neg": 1.9}},
    "luspo": {},
    "bnpo": {"micro_batch_size": 5},
    "grpo scaled by the batch": {"scale": "batch"},
    "grpo with a narrow clip": {"loss_options": {"clip": 0.02, "clip_high": 0.05}},
    "grpo with a dual clip": {"loss_options": {"dual_clip": 1.3}},
    "grpo without the truncated": {"score__missing_eos": "mask"},
    "grpo with k1 times the ratio": {"kl__estimator": "k1", "kl__ratio": True},
    "gspo with k3 times the ratio": {"kl__estimator": "k3", "kl__ratio": True},
    "dapo scaled by the batch": {"scale": "batch", "dynamic_sampling": 0},
    "grpo without a KL penalty": {"kl__coef": 0.0},
    "grpo with a missing-EOS penalty": {
        "score__missing_eos": "subtract",
        "score__missing_eos_penalty": 0.7,
        "scale": "none",
    },
}


@pytest.mark.parametrize("name", UPDATES)
def test_two_updates_by_hand(train, material, talker, monkeypatch, name):
    """Two passes over one rollout, by gradient descent: the second has ratios, and clips. Some scores do not exist."""
    loss, settings = name.split(" ")[0], {"kl__coef": 0.3} | UPDATES[name]
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "grpo", **ONE_UPDATE | {"rollout_epochs": 2}, loss=loss, reward_function=PICKY, max_steps=1, seed=3,
        model=talker, reference=material / "policy", sampling=LONG,
        optim=OptimConfig(lr=0.5, schedule="constant", max_grad_norm=None), **settings,
    )  # fmt: skip
    policy, rollout, scores = played[0].policy, played[0].rollout, scored[0]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    total, lengths = scores.total.clone(), [len(completion) for completion in rollout.completions]
    if "score__overlong_buffer" in settings:  # max_new_tokens 6, buffer 4: from the third token on, a quarter each
        total -= torch.tensor([max(0, length - 2) / 4 for length in lengths])
        assert len(set(lengths)) > 2
    total -= settings.get("score__missing_eos_penalty", 0.0) * ~rollout.finished
    scale = settings.get("scale", "none" if loss == "dr_grpo" else "group")
    advantages = group_scores_by_hand(scores._replace(total=total), 3, scale)
    in_loss = [i for i, valid in enumerate(scores.valid.tolist()) if valid]
    if settings.get("dynamic_sampling") == 0 and scale == "batch":  # the spread is that of the groups that stay
        news = [i for i in in_loss if any(advantages[i // 3 * 3 : i // 3 * 3 + 3])]
        stay = scores._replace(total=total, valid=torch.tensor([i in news for i in range(15)]))
        assert 3 < len(news) < len(in_loss)
        advantages = group_scores_by_hand(stay, 3, scale)
    if settings.get("score__missing_eos") == "mask":
        in_loss = [i for i in in_loss if rollout.completions[i][-1] == 2]
    if "dynamic_sampling" in settings:
        in_loss = [i for i in in_loss if any(advantages[i // 3 * 3 : i // 3 * 3 + 3])]
    assert 3 < len(in_loss) < 15

    old, ref = all_logprobs(policy, rollout), all_logprobs(reference, rollout)
    takes_part = torch.tensor([i in in_loss for i in range(15)])
    orders = minibatches_of(takes_part, 3, 15, 2, seed=3)  # whose places matter to bnpo alone
    norms, ratios = [], []
    for epoch in (0, 1):
        if epoch == 1:
            ratios = [(a - b).exp() for a, b in zip(all_logprobs(policy, rollout), old, strict=True)]
        rows = orders[epoch].tolist()
        assert sorted(rows) == in_loss
        size = settings.get("micro_batch_size", len(rows))
        objective = 0.0
        for i in rows:
            new, _ = token_logprobs(policy, rollout.prompts[i], rollout.completions[i])
            terms = surrogate_by_hand(loss, new, old[i], advantages[i], settings.get("loss_options", {}))
            terms = terms + settings["kl__coef"] * kl_by_hand(loss, new, old[i], ref[i], settings)
            if loss in ("grpo", "gspo", "sapo"):
                objective += terms.mean() / len(rows)
            elif loss == "luspo":
                objective += terms.sum() / len(rows)
            elif loss == "dr_grpo":
                objective += terms.sum() / 6 / len(rows)
            elif loss == "bnpo":
                start = rows.index(i) // size * size
                objective += terms.sum() / sum(lengths[j] for j in rows[start : start + size]) / -(-len(rows) // size)
            else:
                objective += terms.sum() / sum(lengths[j] for j in rows)
        norms.append(step_downhill(policy, objective, 0.5))
    assert torch.cat(ratios).max() > 1.3 and torch.cat(ratios).min() < 0.8  # past every clip
    (row,) = run.metrics
    assert row["grad_norm"] == pytest.approx(mean(norms), rel=1e-3)
    assert row["ratio_max"] == pytest.approx(max(1.0, *(ratios[i].max().item() for i in in_loss)), rel=1e-3)
    assert largest_difference(policy, run.folder) < 2e-5


# ------------------------------------------------------------------------------------------------------------ it learns


def please(train, function: str = "likes", **changes) -> tuple[float, float]:
    """Liked words a completion at the start and at the end."""
    run = train(
        "grpo", **dict(
            reward_function=f"lumo_rewards:{function}", batch_size=10, num_generations=4, minibatch_size=20,
            max_steps=12, epochs=99, kl__coef=0.01, optim=OptimConfig(lr=1e-2, schedule="constant"),
            sampling=SamplingConfig(max_new_tokens=4), rollout_epochs=2,
        ) | changes
    )  # fmt: skip
    sign = 1 if function == "likes" else -1
    scores = [sign * row["score"] for row in run.metrics]
    return scores[0], sum(scores[-3:]) / 3


LOSSES = {
    "grpo": {}, "dr_grpo": {}, "dapo": {"dynamic_sampling": 1}, "cispo": {},
    "gspo": {"loss_options": {"clip": 0.1, "clip_high": 0.1}},
    "sapo": {}, "luspo": {}, "bnpo": {},
}  # fmt: skip


@pytest.mark.parametrize("loss", sweep(LOSSES, ("grpo",)))
def test_every_loss_says_what_is_rewarded_more_often_and_with_its_advantages_negated_does_not(train, monkeypatch, loss):
    start, end = please(train, loss=loss, **LOSSES[loss])
    assert start < 0.5
    assert end > 1.0
    original = grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda *args, **options: -original(*args, **options))
    start, end = please(train, loss=loss, **LOSSES[loss])
    assert end <= start


def test_every_loss_of_the_table_runs(train):
    others = POLICY_LOSSES.keys() - UPDATES  # those have whole updates by hand
    runs = {loss: train("grpo", loss=loss, max_steps=1) for loss in sorted(others)}
    assert len(runs) > 2
    assert all(run.metrics[0]["grad_norm"] > 0 for run in runs.values())


@pytest.mark.slow
def test_a_loss_of_ones_own(train, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from rlhf_core.losses.policy import register_policy_loss\n"
        "@register_policy_loss('mine')\n"
        "def mine(terms):\n"
        "    return -terms.log_ratio.exp() * terms.advantages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        start, end = please(train, loss="mine", loss_module="my_losses")
    finally:
        POLICY_LOSSES.pop("mine", None)
    assert start < 0.5 and end > 1.0


@pytest.mark.slow
def test_with_its_reward_negated_it_does_not(train):
    start, end = please(train, "dislikes")
    assert end <= start < 0.5


@pytest.mark.slow
def test_the_kl_penalty_is_applied(train, monkeypatch):
    """It keeps the policy near the reference, and one of 0 or of the wrong sign does not."""

    def drift(kl_coef: float) -> float:
        run = train(
            "grpo", reward_function=LIKES, max_steps=10, epochs=99, batch_size=10, num_generations=3, minibatch_size=15,
            kl__coef=kl_coef, kl__measure=True, optim=OptimConfig(lr=1e-2, schedule="constant"),
        )  # fmt: skip
        return sum(row["kl"] for row in run.metrics[-3:]) / 3

    free, penalised = drift(0.0), drift(3.0)
    assert penalised < 0.5 * free
    original = grpo.kl_loss

    def negated(*args, **options):
        term, stats = original(*args, **options)
        return -term, stats

    monkeypatch.setattr(grpo, "kl_loss", negated)
    assert drift(3.0) > free


@pytest.mark.filterwarnings("error")
def test_an_estimator_with_the_wrong_gradient_is_warned_about(configure):
    with pytest.raises(UserWarning, match="KL estimator 'k3' as a loss: its gradient is that of KL"):
        grpo.train(configure("grpo", kl__estimator="k3", max_steps=1))
    grpo.train(configure("grpo", kl__estimator="k3", kl__ratio=True, max_steps=1))


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_first_ratio_is_one(train, micro_batch_size):
    """Exactly: the same batches give the same rounding."""
    one = dict(minibatch_size=12, rollout_epochs=1, max_steps=2, batch_size=6, micro_batch_size=micro_batch_size)
    for row in train("grpo", **one).metrics:
        assert row["approx_kl"] == 0 and row["clip_fraction"] == 0 and row["ratio_max"] == 1


# -------------------------------------------------------------------------------------------------- groups without news


def start_of(material):
    return AutoModelForCausalLM.from_pretrained(material / "policy")


def test_groups_of_equal_scores_move_nothing_and_are_counted(train, material):
    run = train("grpo", reward_function="lumo_rewards:always_one", kl__coef=0.0)
    assert [row["flat_groups"] for row in run.metrics] == [6, 4, 6, 4]
    assert all(row["grad_norm"] == 0 and row["policy_loss"] == 0 and row["score_std"] == 0 for row in run.metrics)
    assert largest_difference(start_of(material), run.folder) == 0


def test_only_the_kl_moves_groups_of_equal_scores(train, plain_run):
    run = train("grpo", reward_function="lumo_rewards:always_one", reference=plain_run("sft").folder, rollout_epochs=1)
    assert all(row["policy_loss"] == 0 and row["grad_norm"] > 0 for row in run.metrics)


def test_a_rollout_of_flat_groups_that_are_left_out_is_no_update(train, material):
    run = train("grpo", reward_function="lumo_rewards:always_one", dynamic_sampling=2)
    assert [row["left_out_groups"] for row in run.metrics] == [6, 4, 6, 4]
    assert all(not {"grad_norm", "policy_loss", "lr"} & row.keys() for row in run.metrics)
    assert [row["score"] for row in run.metrics] == [1.0] * 4  # while what was seen is still said
    assert all(row["kl"] == "nan" for row in run.metrics)  # of nobody
    assert largest_difference(start_of(material), run.folder) == 0


@pytest.mark.parametrize("tries", [0, 1, 20])
def test_flat_groups_make_room_for_other_prompts(train, monkeypatch, tries):
    """Five of the ten prompts are one or two words long, and their completions all score the same."""
    played, _ = record(monkeypatch)
    learned_from = []
    original = grpo.policy_loss

    def watch(*args, mask, **options):
        learned_from.append(len(mask))
        return original(*args, mask=mask, **options)

    monkeypatch.setattr(grpo, "policy_loss", watch)
    run = train(
        "grpo", reward_function=BY_PROMPT, batch_size=10, num_generations=4, minibatch_size=40, rollout_epochs=1,
        max_steps=1, dynamic_sampling=tries, optim=OptimConfig(lr=1e-2),
    )  # fmt: skip
    (row,) = run.metrics
    flat = row["flat_groups"]
    assert flat >= 5
    assert len(played[0].rollout.prompts) == 40
    assert row["length"] == pytest.approx(mean([len(completion) for completion in played[0].rollout.completions]))
    assert sum(learned_from[1:]) == 4 * (10 - row["left_out_groups"])  # the first is the config's own rehearsal
    if tries == 0:
        assert len(played) == 1 and row["left_out_groups"] == flat
    else:
        assert len(played[1].rollout.prompts) == 4 * flat
        assert played[1].purpose != played[0].purpose
    if tries == 20:
        assert len(played) > 2 and row["left_out_groups"] == 0


def test_other_prompts_are_drawn_anew_in_every_try_and_step(train, monkeypatch):
    played, _ = record(monkeypatch)
    train(
        "grpo", reward_function="lumo_rewards:always_one", batch_size=10, dynamic_sampling=2, max_steps=2,
    )  # fmt: skip
    assert len(played) == 6
    asked = [tuple(map(tuple, one.rollout.prompts)) for one in played]
    assert len(set(asked)) == 6


# ----------------------------------------------------------------------------------------------------------- bad luck


def test_completions_without_a_score_are_excluded(train, material):
    run = train("grpo", reward_function=SILENT)
    assert [row["excluded"] for row in run.metrics] == [12, 8, 12, 8]
    assert [row["flat_groups"] for row in run.metrics] == [6, 4, 6, 4]
    assert all(row["score"] == row["score_std"] == "nan" for row in run.metrics)  # never 0
    assert all("grad_norm" not in row for row in run.metrics)
    assert largest_difference(start_of(material), run.folder) == 0


def test_when_every_completion_is_truncated(train, material):
    cut = dict(reward_function=VOWELS, sampling=SamplingConfig(max_new_tokens=2), max_steps=1, seed=1)
    kept, left = train("grpo", **cut), train("grpo", score__missing_eos="mask", **cut)
    for run in (kept, left):
        assert run.metrics[0]["eos_rate"] == 0 and run.metrics[0]["length"] == 2
    assert kept.metrics[0]["grad_norm"] > 0
    assert "grad_norm" not in left.metrics[0]
    assert largest_difference(start_of(material), left.folder) == 0


def test_a_group_stays_together_and_every_epoch_has_an_order_of_its_own():
    everyone = torch.ones(12, dtype=torch.bool)
    batches = [batch.tolist() for batch in minibatches_of(everyone, 3, 6, 2, seed=0)]
    assert [len(batch) for batch in batches] == [6] * 4
    for batch in batches:
        for first in (0, 3):
            start = batch[first]
            assert start % 3 == 0 and batch[first : first + 3] == [start, start + 1, start + 2]
    epochs = [batches[0] + batches[1], batches[2] + batches[3]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    some = torch.tensor([True, False, True] + [False] * 8 + [True])
    left = [batch.tolist() for batch in minibatches_of(some, 3, 3, 2, seed=0)]
    assert sorted(left[:2]) == sorted(left[2:]) == [[0, 2], [11]]  # nobody is left of two groups
    assert minibatches_of(~everyone, 3, 6, 2, seed=0) == []


def test_a_group_shares_its_prompt_in_the_batch(train, monkeypatch):
    """So that it is computed once: long prompts, three completions each."""
    sizes = []
    original = OnlineRun.forward

    def watch(self, model, batch, **options):
        packed = batch if isinstance(batch, PackedBatch) else batch.pack()
        sizes.append((packed.num_completions, len({span.prompt_start for span in packed.spans})))
        return original(self, model, batch, **options)

    monkeypatch.setattr(OnlineRun, "forward", watch)
    monkeypatch.setattr("rlhf_core.batch._SHARE_MIN_PROMPT", 1)
    monkeypatch.setattr("rlhf_core.batch._SHARE_MIN_RATIO", 0.0)
    train("grpo", **ONE_UPDATE, max_steps=1)
    assert sizes == [(15, 5)] * 2  # by the reference, and in the only update, whose own forward tells the log-probs
    train("grpo", **ONE_UPDATE | {"rollout_epochs": 2}, max_steps=1)
    assert sizes[2:] == [(15, 5)] * 4  # by the reference, when recalled, and in two updates


@pytest.mark.parametrize("job", ["grpo", "rloo", "reinforce"])
def test_a_reference_with_another_vocabulary_is_refused(train, material, tmp_path, job):
    for path in (material / "policy").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b'"dolo"', b'"dola"'))
    with pytest.raises(ValueError, match="its vocabulary is not the policy's, so their log-probs cannot be compared"):
        train(job, reference=tmp_path)


@pytest.mark.parametrize("job", ["grpo", "rloo", "reinforce"])
def test_one_epoch_after_another_sees_every_prompt(train, monkeypatch, job):
    """Ten prompts in batches of six: six and four, each once an epoch."""
    played, _ = record(monkeypatch)
    train(job)
    asked = [one.rollout.prompts[::2] for one in played if one.purpose[0] == "rollout"]
    assert [len(prompts) for prompts in asked] == [6, 4, 6, 4]
    epochs = [asked[0] + asked[1], asked[2] + asked[3]]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len({tuple(prompt) for prompt in epochs[0]}) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: expected 2 or more"),
        ({"minibatch_size": 7}, "minibatch_size=7: expected a multiple of num_generations=2"),
        ({"loss": "gpro"}, "loss='gpro': expected one of .*grpo.*; did you mean"),
        (
            {"loss": "cispo", "loss_options": {"clip": 0.2}},
            "loss_options='clip:0.2': expected an option of cispo: ratio_max",
        ),
        ({"loss_options": {"ratio_max": 3.0}}, "loss_options='ratio_max:3.0': expected an option of grpo: clip"),
        ({"loss": "sapo", "loss_options": {"temperature_pos": 0.0}}, "temperature_pos=0.0: expected more than 0"),
        ({"loss_options": {"clip": 0.0}}, "clip=0.0: expected more than 0"),
        ({"loss_options": {"dual_clip": 1.1}}, "dual_clip=1.1: expected more than 1"),
        ({"score__overlong_buffer": 6}, "score.overlong_buffer=6: expected 0 to sampling.max_new_tokens=5"),
        ({"dynamic_sampling": -1}, "dynamic_sampling=-1: expected 0 or more"),
        ({"rollout_epochs": 0}, "rollout_epochs=0: expected more than 0"),
        ({"kl__coef": math.nan}, "kl.coef=nan: expected a finite number"),
        ({"kl__estimator": "full"}, "kl.estimator='full': expected k1 or k2 or k3 or abs"),
        ({"scale": "groups"}, "scale='groups': expected one of auto, group, batch, none"),
    ],
)
def test_invalid_settings(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("grpo", **changes)
