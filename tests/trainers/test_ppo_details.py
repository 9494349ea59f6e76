"""PPO's details, each switched on: whole steps by hand, one completion at a time, with plain transformers and loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf_core.config import ConfigError, DataConfig, OptimConfig, SamplingConfig
from rlhf_core.data.loader import load_examples, step_examples
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import load_policy
from rlhf_core.rollout.critic import end_values, load_critic
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import OnlineRun
from rlhf_core.trainers import ppo
from tests.trainers.plain import (
    Played,
    descend,
    largest_difference,
    mean,
    record,
    spread,
    step_downhill,
    token_logprobs,
)

VOWELS, PICKY, SILENT, STEPWISE = (f"tests.trainers.plain:{name}" for name in ("vowels", "picky", "silent", "stepwise"))
FIXED = dict(kl__target=None, kl__coef=0.3)
ONE_UPDATE = dict(batch_size=10, minibatch_size=10, rollout_epochs=1)
STEP = dict(lr=0.05, schedule="constant", max_grad_norm=None)


@pytest.fixture
def steps(monkeypatch) -> list[Played]:
    """Of each rollout of the run that follows, copies of the models as they were, and its scores."""
    return record(monkeypatch)[0]


# ------------------------------------------------------------------------------------------------------- a step by hand


def plain_forward(model, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (T, V) at temperature 0.7 where each token is predicted, and (T + 1, H) states: one more at the end."""
    model.set_attn_implementation("eager")
    output = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
    states = output.hidden_states[-1][0, len(prompt) - 1 :]
    return (output.logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1), states


def estimate(kind: str, d: float) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[kind]


def whiten(rows: list[list[float]], *, shift: bool) -> list[list[float]]:
    flat = [value for row in rows for value in row]
    centre, width = mean(flat), math.sqrt(spread(flat) ** 2 + 1e-8)
    return [[(value - centre) / width + (0 if shift else centre) for value in row] for row in rows]


def step_by_hand(step: Played, config: ppo.PPOConfig, texts: list[Any]) -> dict[str, float]:
    """Move the step's own policy and critic by one update of plain gradient descent; returns metrics of the step."""
    given = list(zip(step.scores.total.tolist(), step.scores.valid.tolist(), strict=True))
    ended = [completion[-1] == 2 for completion in step.rollout.completions]
    raw = [score for score, valid in given if valid]
    centre, width = 0.0, 1.0
    if config.score.scale != "none":  # the first of its kind that the run has seen
        width = spread(raw, 1) + 1e-8
        centre = mean(raw) if config.score.scale == "normalize" else 0.0
    rows, paid = [], []
    for row, (score, valid) in enumerate(given):
        score = (score - centre) / width
        if config.score.clip is not None:
            score = max(min(score, config.score.clip), -config.score.clip)
        if not ended[row]:
            score = {
                "subtract": score - config.score.missing_eos_penalty,
                "replace": -config.score.missing_eos_penalty,
            }.get(config.score.missing_eos, score)
        if valid and (ended[row] or config.score.missing_eos != "mask"):
            rows.append(row)
            paid.append(score)

    news, kls, exact_kls, entropies, values, ends, old_kls = [], [], [], [], [], [], []
    for row in rows:
        prompt, completion = step.rollout.prompts[row], step.rollout.completions[row]
        logprobs, states = plain_forward(step.policy, prompt, completion)
        with torch.no_grad():
            ref_logprobs, _ = plain_forward(step.reference, prompt, completion)
        chosen = torch.arange(len(completion)), torch.tensor(completion)
        states = states.detach() if config.value.detach else states
        value = states @ step.critic.linear.weight[0] + step.critic.linear.bias
        news.append(logprobs[chosen])
        kls.append(logprobs[chosen] - ref_logprobs[chosen])
        exact_kls.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
        values.append(value[:-1])
        ends.append(value[-1].item())
        full = config.kl.estimator == "full"
        old_kls.append((exact_kls if full else kls)[-1].tolist())

    rewards, advantages, returns = [], [], []
    for i in range(len(rows)):
        kind, penalty = config.kl.estimator, 0.0 if config.kl.apply_to == "loss" else config.kl.coef
        rewards.append([-penalty * (kl if kind == "full" else estimate(kind, kl)) for kl in old_kls[i]])
        own = [0.0] * len(old_kls[i])
        if step.scores.tokens is not None:
            own = [reward / width for reward in step.scores.tokens[rows[i]].tolist()[: len(own)]]
        rewards[i] = [reward + part for reward, part in zip(rewards[i], own, strict=True)]
        rewards[i][-1] += paid[i] - sum(own)
    if config.whiten_rewards:
        rewards = whiten(rewards, shift=False)
    for i, row in enumerate(rows):
        old = values[i].tolist()
        after = ends[i] if config.score.missing_eos == "bootstrap" and not ended[row] else 0.0
        advantage, credit = 0.0, []
        for t in reversed(range(len(old))):
            later = old[t + 1] if t + 1 < len(old) else after
            advantage = rewards[i][t] + config.gamma * later - old[t]
            advantage += config.gamma * config.lam * credit[0] if credit else 0.0
            credit.insert(0, advantage)
        advantages.append(credit)
        returns.append([a + v for a, v in zip(credit, old, strict=True)])
    if config.whitens:
        advantages = whiten(advantages, shift=True)

    tokens = sum(map(len, advantages))
    loss = torch.zeros(())
    for i in range(len(rows)):
        ratio = (news[i] - news[i].detach()).exp()
        loss = loss - (ratio * torch.tensor(advantages[i])).sum() / tokens
        loss = loss + config.value.coef * 0.5 * (values[i] - torch.tensor(returns[i])).square().sum() / tokens
        if config.kl.apply_to != "reward":
            d = kls[i]
            kl = {"k1": ratio * d, "k2": d * d / 2, "k3": ratio * ((-d).exp() - 1 + d), "full": exact_kls[i]}
            loss = loss + config.kl.coef * kl[config.kl.estimator].sum() / tokens
        loss = loss - config.entropy_coef * entropies[i].sum() / tokens
    if texts:
        nlls = [-token_logprobs(step.policy, text.prompt, text.completions[0])[0] for text in texts]
        loss = loss + config.ptx_coef * torch.cat(nlls).mean()
    both = torch.nn.ModuleList([step.policy, step.critic])
    norm = step_downhill(both, loss, config.optim.lr)
    return {"paid_score": mean(paid), "kl": mean([sum(kl) for kl in old_kls]), "grad_norm": norm}


DETAILS = [
    dict(),
    dict(reward_function=PICKY),
    dict(whiten_rewards=True),
    dict(whiten_advantages=False),
    dict(kl__estimator="k2"),
    dict(kl__estimator="k3"),
    dict(kl__estimator="abs"),
    dict(kl__estimator="full"),
    dict(kl__apply_to="loss"),
    dict(kl__apply_to="loss", kl__estimator="k2"),
    dict(kl__apply_to="loss", kl__estimator="k3"),
    dict(kl__apply_to="loss", kl__estimator="full"),
    dict(kl__apply_to="loss", kl__estimator="k2", whiten_advantages=True),
    dict(kl__apply_to="both", kl__estimator="full", whiten_advantages=False),
    dict(score__scale="scale"),
    dict(score__scale="normalize", reward_function=PICKY),
    dict(score__clip=0.25),
    dict(score__scale="normalize", score__clip=1.0, score__missing_eos="subtract", score__missing_eos_penalty=3.0),
    dict(score__missing_eos="subtract"),
    dict(score__missing_eos="replace", score__missing_eos_penalty=0.5),
    dict(score__missing_eos="mask"),
    dict(score__missing_eos="mask", reward_function=PICKY),
    dict(score__missing_eos="bootstrap", gamma=0.9),
    dict(entropy_coef=0.2),
    dict(value__detach=True),
    dict(ptx_coef=0.5),
    dict(reward_function=STEPWISE),
    dict(
        reward_function=STEPWISE,
        score__scale="normalize",
        score__clip=0.8,
        score__missing_eos="mask",
        whiten_rewards=True,
    ),
    dict(reward_function=STEPWISE, kl__apply_to="loss", kl__estimator="k2", score__missing_eos="replace"),
    dict(
        entropy_coef=0.2,
        ptx_coef=0.5,
        kl__apply_to="both",
        kl__estimator="full",
        score__missing_eos="replace",
        score__clip=1.0,
    ),
]


@pytest.mark.filterwarnings("ignore:KL estimator:UserWarning")
@pytest.mark.parametrize("changes", DETAILS, ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_a_step_by_hand(configure, train, steps, material, monkeypatch, changes):
    """From a policy that has left the reference, and a critic that says something."""
    descend(monkeypatch)
    leave(monkeypatch)
    settings = dict(reward_function=VOWELS, lam=0.8, value__coef=0.7, **FIXED, **ONE_UPDATE) | changes
    if "ptx_coef" in changes:
        settings["ptx_data"] = material / "sft.jsonl"
    sampling = SamplingConfig(max_new_tokens=14, temperature=0.7)
    config = configure("ppo-head", **settings, max_steps=1, seed=3, optim=OptimConfig(**STEP), sampling=sampling)
    outcome, (step,) = train(config), steps
    texts = texts_of(config, material, 1) if config.ptx_data else []
    before = copy.deepcopy(step.policy)
    expected = step_by_hand(step, config, texts)
    row = outcome.metrics[0]
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    moved = largest_difference(before, outcome.folder)
    assert moved > 1e-3
    assert largest_difference(step.policy, outcome.folder) < 2e-3 * moved
    head = ValueHead.load(outcome.folder)
    torch.testing.assert_close(head.linear.weight, step.critic.linear.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.linear.bias, step.critic.linear.bias, rtol=1e-3, atol=1e-5)
    if config.reward_function == (STEPWISE,):  # completions with a number, with several, and with none
        several = step.scores.tokens.ne(0).any(-1)
        assert 0 < several.sum() < step.scores.valid.sum() < 10
    ended = step.rollout.finished.tolist()
    assert 0 < sum(ended) < 10  # else a missing end would not matter


def test_whitened_advantages_beside_kl_as_a_loss_are_a_choice_that_is_said(configure, train, capsys):
    """Else they would change at every step what a nat costs."""
    kinds = {"reward": {}, "loss": dict(kl__estimator="k2"), "both": dict(kl__estimator="full")}
    assert {kl_in: configure("ppo-head", kl__apply_to=kl_in, **more).whitens for kl_in, more in kinds.items()} == {
        "reward": True, "loss": False, "both": False,
    }  # fmt: skip
    for choice in (True, False):
        assert configure("ppo-head", whiten_advantages=choice).whitens is choice
    runs, said = [], []
    for choice in (None, False, True):
        runs.append(train("ppo-head", kl__apply_to="loss", kl__estimator="k2", whiten_advantages=choice, max_steps=2,
                          progress=True))  # fmt: skip
        said.append("whiten_advantages scales" in capsys.readouterr().err)
    assert said == [False, False, True]
    assert runs[0].same_weights(runs[1]) and not runs[0].same_weights(runs[2])


def leave(monkeypatch) -> None:
    """The run starts away from its reference, with a value head whose values are not 0."""
    original = ppo.load_critic

    def away(run, value):
        critic = original(run, value)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in run.policy.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if isinstance(critic, ValueHead):
            torch.nn.init.constant_(critic.linear.bias, 0.3)
            torch.nn.init.normal_(critic.linear.weight, std=0.2, generator=torch.Generator().manual_seed(6))
        return critic

    monkeypatch.setattr(ppo, "load_critic", away)


def texts_of(config: ppo.PPOConfig, material, update: int) -> list[Any]:
    _, tokenizer = load_policy(material / "policy")
    texts = load_examples(config.ptx_data, tokenizer, need="supervised")
    return step_examples(texts, config.minibatch_size, seed=config.seed, step=update)


def test_texts_mixed_in_are_a_mean_over_what_is_learned_of_them(configure, material):
    config = configure("ppo-head", ptx_data=material / "sft.jsonl", ptx_coef=0.5, minibatch_size=10)
    texts = [
        replace(text, supervised=([k == 0 for k in range(len(text.completions[0]))],))  # the first token alone
        for text in texts_of(config, material, 1)
    ]
    with OnlineRun(config) as run:
        found = ppo.backward_texts(run, texts, 1, 0)["ptx_nll"].item()
    nlls = [-token_logprobs(run.policy, text.prompt, text.completions[0])[0][0].item() for text in texts]
    assert found == pytest.approx(mean(nlls), rel=1e-5)


@pytest.mark.parametrize("value", ["policy", "reward"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_the_value_after_the_last_token_of_a_critic_with_its_own_trunk(configure, material, value, micro_batch_size):
    """The plain classifier's score at the last token where a completion was cut off, and 0 where it ended."""
    config = configure(f"ppo-{value}", score__missing_eos="bootstrap", micro_batch_size=micro_batch_size)
    with OnlineRun(config) as run:
        critic = load_critic(run, config.value)
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(0))
    prompts, completions = [[1, 5, 6], [1, 7], [1, 8, 9, 10]], [[11, 12], [13, 2], [14, 15, 16]]
    rollout = Experience.sampled(prompts, completions, torch.zeros(3, 3), torch.tensor([False, True, False]))
    found = end_values(run.policy, critic, rollout, micro_batch_size or config.minibatch_size)
    plain = copy.deepcopy(critic)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        scores = [plain(torch.tensor([p + c])).logits.item() for p, c in zip(prompts, completions, strict=True)]
    assert found.tolist() == pytest.approx([scores[0], 0.0, scores[2]], abs=1e-5)
    assert min(abs(scores[0]), abs(scores[2])) > 0.01


# ------------------------------------------------------------------------------------------------------ over many steps


def test_scores_are_scaled_by_the_moments_of_all_so_far(train, steps):
    run = train("ppo-head", reward_function=PICKY, score__scale="normalize", score__clip=1.2, max_steps=4, **FIXED)
    seen: list[float] = []
    clipped = 0
    for row, step in zip(run.metrics, steps, strict=True):
        new = step.scores.total[step.scores.valid].tolist()
        seen += new
        scaled = [(score - mean(seen)) / (spread(seen, 1) + 1e-8) for score in new]
        clipped += sum(abs(score) > 1.2 for score in scaled)
        assert row["paid_score"] == pytest.approx(mean([max(min(s, 1.2), -1.2) for s in scaled]), rel=1e-4, abs=1e-6)
        assert row["score"] == pytest.approx(mean(new), rel=1e-5)  # the metric is what the reward said
    assert clipped and any(row["excluded"] for row in run.metrics)


def test_scores_are_centred_on_the_starting_policys_own(train, steps, train_with_stops, configure):
    settings = dict(reward_function=PICKY, score__center=25, max_steps=3, **FIXED)
    run = train("ppo-head", **settings)
    start, *rollouts = steps
    assert start.purpose == ("score_center",)
    assert len(start.rollout.completions) == 25  # of ten prompts: the third time around for some
    assert len({tuple(prompt) for prompt in start.rollout.prompts[:10]}) == 10
    before = start.scores.total[start.scores.valid].tolist()
    assert 0 < len(before) < 25
    for row, step in zip(run.metrics, rollouts, strict=True):
        scores = step.scores.total[step.scores.valid].tolist()
        assert row["paid_score"] == pytest.approx(mean(scores) - mean(before), rel=1e-4, abs=1e-6)
    steps.clear()
    resumed = train_with_stops(configure("ppo-head", **settings), [1, 2])
    assert [step.purpose[0] for step in steps] == ["score_center", "rollout", "rollout", "rollout"]  # measured once
    assert resumed.same_weights(run) and resumed.metrics == run.metrics


def test_a_linear_kl_coefficient_goes_from_its_start_to_its_end(train):
    run = train("ppo-head", kl__control="linear", kl__coef=0.4, kl__coef_end=0.1, max_steps=4)
    assert [row["kl_coef"] for row in run.metrics] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    fixed = train("ppo-head", kl__control="fixed", kl__coef=0.4)
    assert {row["kl_coef"] for row in fixed.metrics} == {0.4}
    assert fixed.same_weights(train("ppo-head", kl__coef=0.4, kl__target=None))


BOLD = dict(batch_size=10, max_steps=3, optim=OptimConfig(lr=0.1, schedule="constant"))


@pytest.mark.parametrize("brake", [{"kl__stop": 1e-9}, {"ratio_limit": 1.0001}], ids=str)
def test_the_brakes_leave_the_first_minibatch_and_no_other(train, brake):
    """The policy moves with it, and all that come after are too far from the policy that sampled."""
    braked = train("ppo-head", **BOLD, **brake, minibatch_size=10, rollout_epochs=4)
    free = train("ppo-head", **BOLD, minibatch_size=10, rollout_epochs=1)
    assert braked.same_weights(free)
    assert {row["skipped"] for row in braked.metrics} == {3}
    braked = train("ppo-head", **BOLD, **brake, minibatch_size=4, rollout_epochs=2)
    skipped = {row["skipped"] for row in braked.metrics}
    assert skipped == {5} if "kl_stop" in brake else skipped <= {4, 5}  # of one minibatch all ratios may have fallen
    loose = train("ppo-head", **BOLD, **dict.fromkeys(brake, 1e9), minibatch_size=4, rollout_epochs=2)
    assert loose.same_weights(train("ppo-head", **BOLD, minibatch_size=4, rollout_epochs=2))
    assert {row["skipped"] for row in loose.metrics} == {0}


def test_the_distance_and_the_ratio_are_of_whole_minibatches(train, monkeypatch):
    """In whatever parts they go through the model; the ratio's limit lies between the largest of the parts."""
    asked: list[float] = []
    monkeypatch.setattr(ppo.KLEarlyStop, "stop", lambda self, approx_kl: asked.append(approx_kl))
    ratios = [row["ratio_max"] for row in train("ppo-head", **BOLD, minibatch_size=10, kl__stop=1.0).metrics]
    whole, asked[:] = list(asked), []
    settings = dict(**BOLD, minibatch_size=10, kl__stop=1.0, micro_batch_size=3)
    parts = train("ppo-head", **settings).metrics
    assert asked == pytest.approx(whole, rel=2e-2, abs=1e-6) and max(asked) > 0.1
    assert [row["ratio_max"] for row in parts] == pytest.approx(ratios, rel=2e-2)
    (row,) = train("ppo-head", **settings | dict(max_steps=1, ratio_limit=0.99 * ratios[0])).metrics
    assert row["skipped"] == 1


def test_a_stop_ends_the_updates_and_a_skip_goes_on(train, monkeypatch):
    """The second of six minibatches is far away: the stop loses it and all after, the skip it alone."""
    original = ppo.policy_loss

    def far_in_the_second(*args, **options):
        loss, stats = original(*args, **options)
        calls.append(1)
        far = len(calls) % 6 == 2
        return loss, stats | {"approx_kl": torch.tensor(float(far)), "ratio_max": torch.tensor(1.0 + 9 * far)}

    monkeypatch.setattr(ppo, "policy_loss", far_in_the_second)
    settings = dict(batch_size=10, minibatch_size=4, rollout_epochs=2, max_steps=1)
    for brake, skipped, asked in (({"kl__stop": 0.5}, 5, 2), ({"ratio_limit": 9.0}, 1, 6), ({"kl__stop": 0.7}, 0, 6)):
        calls: list[int] = []
        (row,) = train("ppo-head", **settings, **brake).metrics
        assert (row["skipped"], len(calls)) == (skipped, asked)


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy"])
def test_the_policy_waits_while_the_critic_warms_up(train, material, job):
    settings = dict(
        value__coef=1.0, entropy_coef=0.1, kl__apply_to="loss", ptx_data=material / "sft.jsonl", ptx_coef=1.0
    )
    warm = train(job, **settings, value__warmup=3, max_steps=3)
    start = AutoModelForCausalLM.from_pretrained(material / "policy")
    assert largest_difference(start, warm.folder) == 0
    critic = "value_head" if job == "ppo-head" else "value_model/model"
    assert load_file(warm.folder / f"{critic}.safetensors").popitem()[1].abs().max() > 0
    assert [row["kl"] for row in warm.metrics] == pytest.approx([0, 0, 0], abs=1e-6)
    assert all("ptx_nll" not in row for row in warm.metrics)
    after = train(job, **settings, value__warmup=3, max_steps=4)
    assert largest_difference(start, after.folder) > 1e-4
    assert "ptx_nll" in after.metrics[3]


def test_a_critic_that_was_warmed_up_knows_more_at_the_first_step_of_the_policy(train):
    settings = dict(reward_function="lumo_rewards:always_one", value__coef=1.0, lam=1.0, value__clip=None, kl__coef=0.0,
                    kl__target=None, epochs=99, optim=OptimConfig(lr=3e-2, schedule="constant"))  # fmt: skip
    warm = train("ppo-head", **settings, value__warmup=15, max_steps=16)
    assert warm.metrics[0]["value_loss"] > 0.2 > 0.1 > warm.metrics[15]["value_loss"]


def test_texts_are_mixed_into_each_update_in_their_turn(train, configure, material, monkeypatch):
    settings = dict(ptx_data=material / "sft.jsonl", ptx_coef=0.3, batch_size=10, minibatch_size=4, rollout_epochs=2)
    config = configure("ppo-head", **settings, max_steps=2, optim=OptimConfig(lr=1e-12))
    row = train(config).metrics[1]
    policy, _ = load_policy(material / "policy")
    nlls = []
    for update in range(7, 13):  # the second step's six
        losses = [-token_logprobs(policy, t.prompt, t.completions[0])[0] for t in texts_of(config, material, update)]
        nlls.append(torch.cat(losses).mean().item())
    assert row["ptx_nll"] == pytest.approx(mean(nlls), rel=1e-4)
    assert len(set(nlls)) > 3


def test_texts_that_are_mixed_in_are_learned(train, material):
    def nll(ptx_coef: float) -> float:
        data = {"ptx_data": material / "sft.jsonl"} if ptx_coef else {}
        settings = dict(max_steps=10, optim=OptimConfig(lr=1e-2), reward_function=VOWELS)
        policy, tokenizer = load_policy(train("ppo-head", **settings, **data, ptx_coef=ptx_coef).folder)
        texts = load_examples(DataConfig(path=material / "sft.jsonl"), tokenizer, need="supervised")
        return mean([-token_logprobs(policy, t.prompt, t.completions[0])[0].mean().item() for t in texts])

    assert nll(3.0) < nll(0.0) - 0.5


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize(("update", "rate"), [("ema", 0.3), ("sync", 1.0)])
def test_the_reference_follows_the_policy(train, steps, update, rate):
    settings = dict(reference__update=update, reference__every=2, max_steps=5, optim=OptimConfig(lr=3e-2))
    run = train("ppo-head", **settings, **({"reference__rate": rate} if update == "ema" else {}))
    for number in range(1, 5):  # steps[number] began after `number` steps
        before, after = steps[number - 1].reference, steps[number].reference
        policy = dict(steps[number].policy.named_parameters())
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            expected = old + rate * (policy[name] - old) if number % 2 == 0 else old
            torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
    kls = [abs(row["kl"]) for row in run.metrics]
    assert kls[1] > 1e-3
    assert (kls[2] < 1e-5) == (update == "sync")  # the third step begins where the second left both


def test_a_reference_of_another_architecture_cannot_follow(configure, material, tmp_path):
    other = LlamaConfig.from_pretrained(material / "policy", num_hidden_layers=1)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(material / "policy").save_pretrained(tmp_path / "other")
    config = configure("ppo-head", reference=tmp_path / "other", reference__update="ema")
    with pytest.raises(ConfigError, match="reference.update='ema': expected a reference of the policy's own arch"):
        ppo.train(config)


# ---------------------------------------------------------------------------------------------------- the first ratio


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}, {"reward_function": PICKY}], ids=str)
def test_the_first_ratio_is_one_to_the_last_bit(train, job, changes):
    run = train(job, **{"reward_function": VOWELS} | changes, batch_size=10, minibatch_size=10, rollout_epochs=1)
    assert {(row["ratio_max"], row["approx_kl"], row["clip_fraction"]) for row in run.metrics} == {(1.0, 0.0, 0.0)}


# ---------------------------------------------------------------------------------------- resumed, and in micro-batches


def everything(material) -> dict[str, Any]:
    """Every option that has a state, or that adds up over micro-batches."""
    return dict(
        reward_function=PICKY, kl__control="linear", kl__apply_to="both", kl__estimator="full", score__center=7,
        score__scale="normalize", score__clip=2.0, score__missing_eos="bootstrap", kl__stop=0.1, ratio_limit=3.0,
        entropy_coef=0.05, ptx_data=material / "sft.jsonl", ptx_coef=0.3, reference__update="ema", reference__rate=0.2,
        value__warmup=1, whiten_rewards=True,
    )  # fmt: skip


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy"])
def test_a_run_with_every_option_is_resumed_to_the_bit(train, configure, train_with_stops, material, job):
    for changes in (
        {"recorded": "auto"},
        {"reference__update": "sync", "reference__every": 3, "kl__control": "adaptive"},
    ):
        settings = everything(material) | changes
        whole = train(job, **settings)
        resumed = train_with_stops(configure(job, **settings), [1, 3])
        assert resumed.same_weights(whole)
        assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy"])
def test_micro_batches_do_not_matter_with_every_option(train, material, job):
    whole = train(job, **everything(material))
    for size in (1, 3):
        parts = train(job, **everything(material), micro_batch_size=size)
        assert whole.distance(parts) < 1e-5
        for row, other in zip(whole.metrics, parts.metrics, strict=True):
            assert other == pytest.approx(row, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("layout", ["padded"])
def test_the_layout_does_not_matter_with_every_option(train, material, layout):
    runs = [train("ppo-head", **everything(material), model=dict(path=material / "policy", layout=name))
            for name in ("packed", layout)]  # fmt: skip
    assert 0 < runs[0].distance(runs[1]) < 1e-5


# ------------------------------------------------------------------------------------------------- what it will not do


def test_a_rollout_without_a_score_is_an_error(train):
    with pytest.raises(ValueError, match="^the reward scored none of 6 completions: there is nothing to learn from$"):
        train("ppo-head", reward_function=SILENT)


def test_a_rollout_without_an_end_is_an_error_where_those_are_masked(train):
    message = (
        r"^sampling.max_new_tokens=1: none of 6 completions ended, and score.missing_eos='mask' excludes all of them"
    )
    with pytest.raises(ValueError, match=message):
        train("ppo-head", score__missing_eos="mask", sampling=SamplingConfig(max_new_tokens=1), seed=3)


SERVER = SamplingConfig(
    engine="server", server_url="http://localhost:8000", server_weights="w", server_refresh="true", temperature=0.7
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl__apply_to": "both"}, "kl.apply_to='both': expected estimator='full'"),
        ({"kl__coef": 0.0}, "kl.coef=0.0: expected more than 0 with control='adaptive'"),
        ({"ratio_limit": 1.0}, "ratio_limit=1.0: expected more than 1"),
        ({"kl__stop": 0.0}, "kl.stop=0.0: expected more than 0"),
        ({"score__clip": -1.0}, "score.clip=-1.0: expected more than 0"),
        ({"ptx_coef": 1.0}, "ptx_coef=1.0: expected more than 0 with ptx_data, 0 without"),
        ({"ptx_data": "texts.jsonl"}, "ptx_coef=0.0: expected more than 0 with ptx_data, 0 without"),
        ({"reference__rate": 1.5}, "reference.rate=1.5: expected between 0 and 1"),
        ({"reference__every": 0}, "reference.every=0: expected more than 0"),
        ({"entropy_coef": -0.1}, "entropy_coef=-0.1: expected 0 or more"),
        ({"value__warmup": -1}, "value.warmup=-1: expected 0 or more"),
        (
            {"score__missing_eos": "never"},
            "score.missing_eos='never': expected one of none, subtract, replace, mask, bootstrap",
        ),
        ({"kl__estimator": "mse"}, "kl.estimator='mse': expected one of k1, k2, k3, abs, full"),
        ({"reward_function": VOWELS, "reward_lcb": 1.0}, "reward_lcb=1.0: expected a reward_model beside it"),
        ({"reward_function": VOWELS, "end_unfinished": True}, "end_unfinished=True: expected a reward_model beside it"),
        ({"importance": "token", "sampling": SERVER}, "importance='token': expected none with a server at a sampling"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(configure, changes, message):
    with pytest.raises(ConfigError) as caught:
        configure("ppo-head", **{"kl__target": 6.0} | changes)
    assert str(caught.value).startswith(message)


def test_a_trunk_of_its_own_has_nothing_to_detach(configure):
    with pytest.raises(ConfigError, match="value.detach=True: expected"):
        configure("ppo-policy", value__detach=True)


@pytest.mark.parametrize(("kl_in", "estimator"), [("reward", "k3"), ("reward", "full"), ("loss", "abs")])
def test_a_kl_penalty_whose_gradient_is_not_the_kls_is_warned_of(train, kl_in, estimator):
    with pytest.warns(UserWarning, match=f"KL estimator '{estimator}' as a {kl_in}"):
        train("ppo-head", kl__apply_to=kl_in, kl__estimator=estimator, max_steps=1)
