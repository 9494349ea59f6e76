"""PPO's numbers, recomputed by hand from what was sampled, with plain transformers and loops in place of ours."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_core.config import ConfigError, DataConfig, OptimConfig, SamplingConfig
from rlhf_core.models.heads import ValueHead
from rlhf_core.rollout import engines
from rlhf_core.rollout.critic import load_critic
from rlhf_core.rollout.online import OnlineRun
from rlhf_core.rollout.plan import shuffled_minibatches
from rlhf_core.trainers import ppo
from tests.trainers.plain import Played, all_logprobs, mean, record

LIKES = dict(reward_function="lumo_rewards:likes")


@pytest.fixture
def steps(monkeypatch) -> list[Played]:
    """Copies of the models and rollouts of each step of the run that follows."""
    return record(monkeypatch)[0]


def by_hand(model, prompt: list[int], completion: list[int], temperature: float):
    """Log-probs and entropies of a completion's tokens and the states that predict them, from an ordinary forward."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
    rows = slice(len(prompt) - 1, -1)
    logprobs = (output.logits[0, rows] / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1), output.hidden_states[-1][0, rows]


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_metric_by_hand(train, material, steps, monkeypatch, temperature):
    """At the third step, when the policy has left the reference. One minibatch and one epoch: weights hold still."""
    temperatures, original = [], engines.sample
    monkeypatch.setattr(
        engines,
        "sample",
        lambda *args, **options: temperatures.append(options["temperature"]) or original(*args, **options),
    )
    sampling = SamplingConfig(max_new_tokens=5, temperature=temperature)
    run = train(
        "ppo-head", **LIKES, max_steps=3, rollout_epochs=1, minibatch_size=10, batch_size=10, kl__target=None,
        kl__coef=0.3, gamma=0.9, lam=0.8, optim=OptimConfig(lr=3e-2, schedule="constant"), sampling=sampling,
    )  # fmt: skip
    row, step = run.metrics[2], steps[2]
    assert temperatures == [temperature] * 3
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")

    kls, entropies, scores, values, returns, ended, squares = [], [], [], [], [], [], []
    for prompt, completion in zip(step.rollout.prompts, step.rollout.completions, strict=True):
        logprobs, entropy, states = by_hand(step.policy, prompt, completion, temperature)
        ref_logprobs, _, _ = by_hand(reference, prompt, completion, temperature)
        value = (states @ step.critic.linear.weight[0] + step.critic.linear.bias).tolist()
        kl = (logprobs - ref_logprobs).tolist()
        score = float(completion.count(run_token("dolo", material)))
        rewards = [-0.3 * one for one in kl]
        rewards[-1] += score
        advantage, credit = 0.0, []
        for t in reversed(range(len(completion))):
            later = value[t + 1] if t + 1 < len(completion) else 0.0
            advantage = rewards[t] + 0.9 * later - value[t] + 0.9 * 0.8 * advantage
            credit.insert(0, advantage + value[t])
        kls.append(sum(kl))
        entropies += entropy.tolist()
        scores.append(score)
        values += value
        returns += credit
        ended.append(completion[-1] == 2)
        squares += [0.5 * (v - r) ** 2 for v, r in zip(value, credit, strict=True)]

    lengths = [len(completion) for completion in step.rollout.completions]
    assert len(set(lengths)) > 1 and 0 < sum(ended) < 10  # else masks would not matter
    assert abs(sum(kls)) > 0.1
    residuals = [r - v for r, v in zip(returns, values, strict=True)]
    expected = {
        "score": sum(scores) / 10,
        "score_std": math.sqrt(variance(scores)),
        "kl": sum(kls) / 10,
        "length": sum(lengths) / 10,
        "eos_rate": sum(ended) / 10,
        "entropy": sum(entropies) / len(entropies),
        "value_mean": sum(values) / len(values),
        "value_loss": sum(squares) / len(squares),
        "explained_variance": 1 - variance(residuals) / variance(returns),
        "policy_loss": 0.0,  # ratios are 1, and whitened advantages have the mean 0
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "value_clip_fraction": 0.0,
        "ratio_max": 1.0,
        "kl_coef": 0.3,
        "lr": 3e-2,
        "paid_score": sum(scores) / 10,
        "excluded": 0,
        "skipped": 0,
    }
    assert row.keys() == expected.keys() | {"step", "grad_norm"}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def run_token(word: str, material) -> int:
    return json.loads((material / "policy" / "tokenizer.json").read_text())["model"]["vocab"][word]


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy", "ppo-reward"])
def test_the_first_step_starts_at_the_reference(train, job):
    run = train(job, rollout_epochs=1, minibatch_size=6, max_steps=2, optim=OptimConfig(lr=0.1, schedule="constant"))
    first, second = run.metrics
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(second["kl"]) > 1e-2
    for row in (first, second):  # one update a rollout: by the policy that sampled it
        assert row["approx_kl"] < 1e-10
        assert row["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["clip_fraction"] == 0


def test_later_updates_of_a_rollout_leave_the_policy_that_sampled_it(train):
    row = train("ppo-head", rollout_epochs=3, optim=OptimConfig(lr=0.1, schedule="constant")).metrics[0]
    assert row["approx_kl"] > 1e-4
    assert row["ratio_max"] > 1.2
    assert row["clip_fraction"] > 0


def test_the_adaptive_kl_coefficient_follows_its_formula(train):
    run = train("ppo-head", max_steps=6, kl__coef=0.2, kl__target=0.05, kl__horizon=50, optim=OptimConfig(lr=1e-2))
    coefficient = 0.2
    clipped = set()
    for number, row in enumerate(run.metrics):
        assert row["kl_coef"] == pytest.approx(coefficient, rel=1e-9)  # the coefficient of this step
        error = min(max(row["kl"] / 0.05 - 1, -0.2), 0.2)
        clipped.add(abs(error) == 0.2)
        coefficient *= 1 + error * (6, 4)[number % 2] / 50  # the last batch of an epoch is smaller
    assert True in clipped
    assert coefficient != 0.2


def test_a_fixed_kl_coefficient_stays(train):
    run = train("ppo-head", kl__target=None, kl__coef=0.2, optim=OptimConfig(lr=1e-2))
    assert {row["kl_coef"] for row in run.metrics} == {0.2}


def test_each_step_draws_anew(train, steps, tmp_path):
    """The same prompt under the same weights is completed in another way the next time."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "galosh"}) + "\n")
    train("ppo-head", data=tmp_path / "one.jsonl", max_steps=3, optim=OptimConfig(lr=1e-12))
    drawn = [step.rollout.completions[0] for step in steps]
    assert len(set(map(tuple, drawn))) == 3


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy"])
def test_the_critic_learns_what_a_completion_is_worth(train, monkeypatch, job):
    """Every completion is worth 1, and nothing else counts: so is then every state."""

    def run(value_coef: float, max_steps: int) -> float:
        metrics = train(
            job, reward_function="lumo_rewards:always_one", max_steps=max_steps, epochs=99, kl__coef=0.0,
            kl__target=None, value__clip=None, value__coef=value_coef, lam=1.0,
            optim=OptimConfig(lr=2e-2, schedule="constant"),
        ).metrics  # fmt: skip
        return metrics[-1]["value_loss"]

    assert run(1.0, max_steps=12) < 0.1
    assert run(0.0, max_steps=2) == pytest.approx(0.5)  # what saying 0 costs


@pytest.mark.slow
def test_the_kl_penalty_is_applied(train):
    """A KL penalty keeps the policy near the reference, and without one it leaves."""

    def drift(kl_coef: float) -> float:
        run = train(
            "ppo-head", **LIKES, max_steps=10, epochs=99, batch_size=30, minibatch_size=10, kl__coef=kl_coef,
            kl__measure=True, kl__target=None, optim=OptimConfig(lr=1e-2, schedule="constant"),
        )  # fmt: skip
        return sum(row["kl"] for row in run.metrics[-3:]) / 3

    assert drift(1.0) < 0.5 * drift(0.0)


def test_every_minibatch_is_clipped_with_the_critics_gradients(train, monkeypatch):
    seen = []
    original = torch.nn.utils.clip_grad_norm_

    def watch(parameters, max_norm):
        parameters = list(parameters)
        norm = original(parameters, max_norm)
        after = torch.stack([p.grad.norm() for p in parameters]).norm().item()
        seen.append((len(parameters), norm.item(), after))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
    run = train("ppo-head", optim=OptimConfig(lr=1e-3, max_grad_norm=1e-2))
    assert len(seen) == 2 * (2 + 1 + 2 + 1)  # epochs, and minibatches of 4 in rollouts of 6, 4, 6, 4
    policy = len(list(AutoModelForCausalLM.from_pretrained(run.folder).parameters()))
    assert {count for count, _, _ in seen} == {policy + 2}
    assert all(before > 1e-2 and after == pytest.approx(1e-2, rel=1e-3) for _, before, after in seen)
    assert run.metrics[0]["grad_norm"] == pytest.approx(sum(before for _, before, _ in seen[:4]) / 4)


def test_every_row_of_a_rollout_is_in_one_minibatch_an_epoch_and_orders_differ(configure):
    config = configure("ppo-head", rollout_epochs=3, minibatch_size=4)
    epochs = [list(shuffled_minibatches(10, config.minibatch_size, config, step)) for step in (1, 1, 2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2] * 3
        orders = [torch.cat(batches[start : start + 3]).tolist() for start in (0, 3, 6)]
        assert all(sorted(order) == list(range(10)) for order in orders)
        assert len(set(map(tuple, orders))) == 3
    first, again, other = (torch.cat(batches).tolist() for batches in epochs)
    assert first == again != other


def test_a_critic_of_its_own_starts_as_it_was_told(configure, material):
    critics = {}
    for kind in ("head", "policy", "reward"):
        config = configure(f"ppo-{kind}")
        with OnlineRun(config) as run:
            critics[kind] = load_critic(run, config.value)
            embedding = run.policy.get_input_embeddings().weight
        assert kind == "head" or critics[kind].get_input_embeddings().weight is not embedding
    assert isinstance(critics["head"], ValueHead)
    assert torch.equal(critics["policy"].get_input_embeddings().weight, embedding)
    assert not critics["policy"].score.weight.any()
    from_reward = critics["reward"]
    assert not torch.equal(from_reward.get_input_embeddings().weight, embedding)
    assert from_reward.score.weight.any()


def test_prompts_leave_room_for_the_completion(configure, steps, tmp_path):
    rows = [{"prompt": " ".join(["solano"] * count)} for count in (5, 100)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configure("ppo-head", **LIKES, data=tmp_path / "long.jsonl", max_steps=1)
    ppo.train(config)
    longest = max(map(len, steps[0].rollout.prompts))
    assert longest == 32 - 5  # the model's context, less what is sampled


def test_a_completion_longer_than_the_context_is_refused_before_any_work(configure):
    config = configure("ppo-head", **LIKES, sampling=SamplingConfig(max_new_tokens=31))
    with pytest.raises(ConfigError, match=r"sampling.max_new_tokens=31: expected at most 30, .* have 32 tokens"):
        ppo.train(config)


def test_a_length_limit_is_of_prompt_and_completion_together(configure, material):
    config = configure("ppo-head", data=DataConfig(path=material / "prompts.jsonl", max_length=6))
    with pytest.raises(ConfigError, match=r"sampling.max_new_tokens=5: expected at most 4"):
        ppo.train(config)


def test_generation_settings_that_disagree_are_said(train, material, tmp_path, capsys):
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in (material / "policy").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    GenerationConfig(eos_token_id=2, do_sample=True, top_k=50, top_p=0.9).save_pretrained(folder)
    run = train("ppo-head", model=folder, max_steps=1, progress=True)
    said = capsys.readouterr().err
    assert "samples from the full distribution and ignores the generation config's top_k=50, top_p=0.9" in said
    assert run.same_weights(train("ppo-head", max_steps=1))


def test_evaluation_prompts_are_scored_at_the_end(train, material):
    run = train("ppo-head", eval_data=material / "prompts.jsonl", max_steps=2, optim=OptimConfig(lr=3e-2))
    assert "eval_score" not in run.metrics[0]
    last = run.metrics[1]
    assert math.isfinite(last["eval_score"])
    assert abs(last["eval_kl"]) > 1e-3  # after the update, so not the reference any more


def test_evaluation_prompts_are_always_completed_with_the_same_draws(train, material):
    run = train(
        "ppo-head", eval_data=material / "prompts.jsonl", eval_every=1, max_steps=2, optim=OptimConfig(lr=1e-12)
    )
    first, second = run.metrics
    assert first["eval_score"] == pytest.approx(second["eval_score"], abs=1e-6)
    assert first["score"] != second["score"]  # while each rollout draws anew


def test_a_value_model_needs_the_policys_vocabulary(configure, material, tmp_path):
    folder = tmp_path / "reward_model"
    folder.mkdir()
    for path in (material / "reward_model").glob("*"):
        if path.is_file():
            text = path.read_bytes()
            (folder / path.name).write_bytes(text.replace(b'"dolo"', b'"dola"') if "tokenizer" in path.name else text)
    with pytest.raises(
        ConfigError, match="value.model='reward': expected a reward model with the policy's own vocabulary"
    ):
        ppo.train(configure("ppo-reward", reward_model=folder))


def test_the_evaluation_by_hand(train, material, talker, monkeypatch):
    """Compute eval_score and eval_kl from plain forwards of the one completion of each evaluation prompt."""
    played, _ = record(monkeypatch)
    run = train(
        "ppo-head", model=talker, reference=material / "policy", eval_data=material / "prompts.jsonl", max_steps=1,
        optim=OptimConfig(lr=3e-3),
    )  # fmt: skip
    (evaluated,) = (each for each in played if each.purpose == ("evaluation",))
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    own, ref = (all_logprobs(model, evaluated.rollout) for model in (evaluated.policy, reference))
    kl = mean([(a - b).sum().item() for a, b in zip(own, ref, strict=True)])
    assert kl > 0.5
    assert run.metrics[-1]["eval_kl"] == pytest.approx(kl, rel=1e-3)
    assert run.metrics[-1]["eval_score"] == pytest.approx(evaluated.scores.total.mean().item(), rel=1e-5)
