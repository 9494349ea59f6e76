"""Our PPO against TRL 1.12's on the same rollouts and weights: the numbers of every stage, and the updates it makes.

Both in float64. Where TRL is right, ours are its numbers. Where it is not, the difference is made by hand on top of
ours, and then nothing else differs; docs/ppo.md has the table.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_core.config import OptimConfig, SamplingConfig, ValueConfig
from rlhf_core.losses.policy import policy_loss
from rlhf_core.losses.value import value_loss
from rlhf_core.models.forward import policy_outputs, prepare, sequence_scores
from rlhf_core.ops.advantages import gae
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_mean, masked_whiten
from rlhf_core.ops.shaping import missing_eos_penalty
from rlhf_core.rollout.experience import Experience
from rlhf_core.trainers.ppo import PPOConfig, forward
from rlhf_core.training.optim import optimizer_step
from tests.parity import tiny
from tests.parity.golden import Case, Golden, hold, read

GOLDEN: Golden = read("trl_ppo")
DEFAULTS = dict(kl_coef=0.05, kl_estimator="k1", temperature=0.7, gamma=1.0, lam=0.95, vf_coef=0.1)
DEFAULTS |= dict(cliprange=0.2, cliprange_value=0.2, whiten_rewards=False, missing_eos_penalty=None, max_grad_norm=1.0)
DEFAULTS |= dict(gradient_accumulation_steps=1, num_mini_batches=2, pad="pad")
LEARNING_RATE = 0.02

every_case = pytest.mark.parametrize("name", GOLDEN.cases)
pytestmark = pytest.mark.filterwarnings("ignore:KL estimator 'k3' as a reward")


class Replay:
    """A case's rollout, models and settings, and what our functions make of them."""

    def __init__(self, name: str):
        self.case: Case = GOLDEN.cases[name]
        self.settings = DEFAULTS | self.case.settings
        self.theirs = self.case.results
        which = "eos" if self.settings["stop_token"] else "full"
        self.lengths = GOLDEN.inputs[f"{which}_lengths"]
        responses = GOLDEN.inputs[f"{which}_responses"]
        self.mask = torch.arange(responses.shape[1]) < self.lengths[:, None]
        self.last = self.lengths - 1
        # The slot after the last token, where there is one: TRL's place of the score, and of one value more.
        self.past_end = torch.arange(responses.shape[1]) == self.lengths[:, None]
        pad = tiny.EOS if self.settings["pad"] == "eos" else tiny.PAD
        completions = [row[:length].tolist() for row, length in zip(responses, self.lengths, strict=True)]
        self.rollout = Experience.sampled(
            prompts=[[token for token in row if token != pad] for row in self.theirs["queries"].tolist()],
            completions=completions,
            logprobs=torch.zeros(self.mask.shape),
            finished=torch.tensor([completion[-1] == tiny.EOS for completion in completions]),
        )
        self.config = PPOConfig(
            model="m",
            reward_model="r",
            data="d",
            output="o",
            value=ValueConfig(model="policy"),
            # TRL divides by the temperature plus this.
            sampling=SamplingConfig(temperature=self.settings["temperature"] + 1e-7),
        )
        self.models = tiny.ppo_models(GOLDEN.seed)
        for role, model in self.models.items():
            start = f"{role}."
            weights = {key: value for key, value in GOLDEN.inputs.items() if key.startswith(start)}
            model.load_state_dict({key.removeprefix(start): value for key, value in weights.items()})
            prepare(model)

    @property
    def policy(self) -> nn.Module:
        return self.models["policy"]

    @property
    def critic(self) -> nn.Module:
        return self.models["value_model"]

    def outputs(self, rows: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and values, and the values with one more after each end that the buffer has room for."""
        rows = list(range(len(self.mask))) if rows is None else rows
        batch = self.rollout.select(rows).pack()
        new = forward(SimpleNamespace(policy=self.policy, config=self.config), self.critic, batch)
        ends = sequence_scores(self.critic, batch)
        return new.logprobs, new.values, torch.where(self.past_end[rows], ends[:, None], new.values)

    def rewards(self) -> Tensor:
        """Our rewards, from TRL's own scores and log-probs."""
        price = dict(kl_coef=self.settings["kl_coef"], estimator=self.settings["kl_estimator"])
        theirs = (self.theirs[name] for name in ("scores", "logprobs", "ref_logprobs"))
        return kl_penalty(*theirs, self.mask, **price)[0]

    def moved(self, rewards: Tensor) -> Tensor:
        """The scores one slot later, where there is one."""
        scores = self.theirs["scores"][:, None]
        at_last = (torch.arange(self.mask.shape[1]) == self.last[:, None]) & self.past_end.any(1, keepdim=True)
        return rewards - scores * at_last + scores * self.past_end

    def bessel(self, mask: Tensor) -> float:
        """TRL's variance is divided by n - 1, ours by n."""
        return math.sqrt((mask.sum().item() - 1) / mask.sum().item())


@cache
def replay(name: str) -> Replay:
    return Replay(name)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    hold(Case({}, {"it": theirs}), tolerance, it=ours)


def cases_with(**settings: Any) -> list[str]:
    return [
        name
        for name, case in GOLDEN.cases.items()
        if all((DEFAULTS | case.settings)[key] == value for key, value in settings.items())
    ]


ENDED = cases_with(stop_token="eos", pad="pad")
FULL = cases_with(stop_token=None)


def test_the_rollouts_end_in_every_way():
    given = replay(ENDED[0])
    assert set(given.lengths.tolist()) == {1, 2, 3, 4, 5}
    cut_off = ~given.rollout.finished
    assert 0 < cut_off.sum() < (given.lengths == 5).sum()  # some of those that fill the buffer end there
    assert all(len(set(map(len, replay(name).rollout.prompts))) == 3 for name in ENDED + FULL)
    assert set(FULL + ENDED) == GOLDEN.cases.keys() - set(cases_with(pad="eos"))


# ------------------------------------------------------------------------------------------------------ act and score


@pytest.mark.parametrize("name", ENDED + FULL)
def test_log_probs_values_and_scores(name):
    """Of policy, reference, critic and reward model; TRL's places after the end hold a constant."""
    given = replay(name)
    batch = given.rollout.pack()
    with torch.no_grad():
        logprobs, _, values = given.outputs()
        ref_logprobs = policy_outputs(
            given.models["reference"], batch, temperature=given.config.sampling.temperature
        ).logprobs
        scores = sequence_scores(given.models["reward_model"], batch)
    if penalty := given.settings["missing_eos_penalty"]:
        scores = missing_eos_penalty(scores, given.rollout.finished, penalty=penalty)
    assert (given.theirs["logprobs"][~given.mask] == 1).all()
    close(logprobs[given.mask], given.theirs["logprobs"][given.mask])
    close(ref_logprobs[given.mask], given.theirs["ref_logprobs"][given.mask])
    close(values, given.theirs["values"])
    close(scores, given.theirs["scores"])


# -------------------------------------------------------------------------------------------------------------- credit


@pytest.mark.parametrize("name", [name for name in FULL if not replay(name).settings["whiten_rewards"]])
def test_rewards_and_advantages_where_no_slot_follows_the_last_token(name):
    given = replay(name)
    rewards = given.rewards()
    close(rewards, given.theirs["rewards"])
    options = dict(gamma=given.settings["gamma"], lam=given.settings["lam"])
    advantages, returns = gae(rewards, given.theirs["values"], given.mask, **options)
    close(returns, given.theirs["returns"])
    close(masked_whiten(advantages, given.mask) * given.bessel(given.mask), given.theirs["advantages"])


@pytest.mark.parametrize("name", ENDED)
def test_the_score_is_a_slot_late_and_the_last_token_sees_the_critic_instead(name):
    """Ours with the score moved and a mask of one slot more are TRL's, and as they are, they are not.

    Only with gamma = lambda = 1 would it be the same: the last token's advantage is then the score less its value.
    """
    given = replay(name)
    wide = given.mask | given.past_end
    rewards = given.moved(given.rewards())
    if given.settings["whiten_rewards"]:
        mean = masked_mean(rewards, wide)
        spread = masked_whiten(rewards, wide, shift_mean=False) - mean
        rewards = torch.where(wide, mean + spread * given.bessel(wide), 0.0)
    close(rewards, given.theirs["rewards"])
    options = dict(gamma=given.settings["gamma"], lam=given.settings["lam"])
    advantages, returns = gae(rewards, given.theirs["values"], wide, **options)
    close(returns, given.theirs["returns"])
    close(masked_whiten(advantages, given.mask) * given.bessel(given.mask), given.theirs["advantages"])

    if not given.settings["whiten_rewards"]:
        ours, _ = gae(given.rewards(), given.theirs["values"], given.mask, **options)
        has_slot = given.past_end.any(1)
        score, end = given.theirs["scores"][has_slot], given.theirs["values"][given.past_end]
        # At the last token: the score, against gamma times the end's value and lambda times what it is off by.
        expected = torch.zeros(len(given.mask), dtype=torch.float64)
        expected[has_slot] = score - options["gamma"] * (end + options["lam"] * (score - end))
        close((ours - advantages).gather(1, given.last[:, None]).squeeze(1), expected)
        assert (expected[has_slot].abs() > 1e-3).all()


@pytest.mark.parametrize("name", [name for name in FULL if replay(name).settings["whiten_rewards"]])
def test_whitening_divides_by_one_less(name):
    """Which is all that is left between the two where completions fill the buffer."""
    given = replay(name)
    plain, mask = given.rewards(), given.mask
    mean = masked_mean(plain, mask)
    whitened = masked_whiten(plain, mask, shift_mean=False)
    close(mean + (whitened - mean) * given.bessel(mask), given.theirs["rewards"])
    assert (whitened - given.theirs["rewards"]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- improve


def improve(given: Replay, *, wide_values: bool) -> dict[str, Tensor]:
    """Our losses on TRL's minibatches, advantages and returns, and plain gradient descent, through every update.

    `wide_values`: the critic's loss over one slot more than the policy's, as TRL has it.
    """
    settings, theirs = given.settings, given.theirs
    weights = [parameter for role in ("policy", "value_model") for parameter in given.models[role].parameters()]
    optimizer = torch.optim.SGD(weights, lr=LEARNING_RATE)
    value_mask = given.mask | given.past_end if wide_values else given.mask
    every = settings["gradient_accumulation_steps"]
    parts: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}
    for number, rows in enumerate(theirs["rows"], start=1):
        logprobs, values, all_values = given.outputs(rows.tolist())
        new_values = all_values if wide_values else values
        policy_term, stats = policy_loss(
            new_logprobs=logprobs,
            logprobs=theirs["logprobs"][rows],
            advantages=theirs["advantages"][rows],
            mask=given.mask[rows],
            clip=settings["cliprange"],
        )
        value_term, _ = value_loss(
            new_values=new_values,
            values=theirs["values"][rows],
            returns=theirs["returns"][rows],
            mask=value_mask[rows],
            value_clip=settings["cliprange_value"],
        )
        ((policy_term + settings["vf_coef"] * value_term) / every).backward()
        parts.append(
            {
                "new_logprobs": logprobs.detach().masked_fill(~given.mask[rows], 1.0),
                "vpred": new_values.detach(),
                "pg_loss": policy_term.detach(),
                "vf_loss": value_term.detach(),
                "clip_fraction": stats["clip_fraction"],
            }
        )
        if number % every == 0:
            for role in ("policy", "value_model"):
                grads = [parameter.grad.flatten() for parameter in given.models[role].parameters()]
                gradients[f"{role}_gradient"] = torch.cat(grads)
            optimizer.step()
            optimizer.zero_grad()
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]} | gradients


@pytest.mark.parametrize("name", ENDED + FULL)
def test_losses_and_gradients_of_every_update(name):
    """The gradient of the last update is that of weights which all before it have moved."""
    given = Replay(name)
    ours = improve(given, wide_values=True)
    clip_fraction = ours.pop("clip_fraction").mean()
    for each, tensor in ours.items():
        close(tensor, given.theirs[each])
    assert given.theirs["updates"] == len(given.theirs["rows"]) // given.settings["gradient_accumulation_steps"]
    assert clip_fraction > given.theirs["clip_fraction"] * unfilled(given) > 0


def unfilled(given: Replay) -> int:
    """With several minibatches, each of one micro-batch, TRL's gauges are means over places that were never filled."""
    settings = given.settings
    return settings["gradient_accumulation_steps"] if settings["num_mini_batches"] > 1 else 1


def test_the_value_loss_counts_a_slot_that_is_no_token():
    given = Replay(ENDED[0])
    ours = improve(given, wide_values=False)
    assert ((ours["vf_loss"] - given.theirs["vf_loss"]).abs() > 1e-3).all()
    close(ours["pg_loss"][0], given.theirs["pg_loss"][0])


def test_gradients_are_not_clipped():
    """TRL's optimizer was given the very gradient that ours is before clipping; ours is then clipped."""
    [name] = cases_with(max_grad_norm=0.01)
    given = Replay(name)
    theirs = torch.cat([given.theirs["policy_gradient"], given.theirs["value_model_gradient"]])
    assert theirs.norm() > 100 * given.settings["max_grad_norm"]
    parameter = nn.Parameter(torch.zeros_like(theirs))
    parameter.grad = theirs.clone()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer_step(optimizer, OptimConfig(lr=1.0, max_grad_norm=0.01, schedule="constant"), 1, 1)
    assert parameter.detach().norm().item() == pytest.approx(0.01, rel=1e-4)


def test_accumulation_turns_minibatches_into_micro_batches():
    """Two minibatches of 8 with two accumulation steps: one update for both, as if one of 16 had been asked for.

    Their losses are averaged alike, whatever the number of their tokens. Ours are means over all tokens.
    """
    [one] = cases_with(gradient_accumulation_steps=2, num_mini_batches=1)
    [two] = cases_with(gradient_accumulation_steps=2, num_mini_batches=2)
    theirs, given = replay(two).theirs, Replay(one)
    assert theirs["updates"] == given.theirs["updates"] == 2
    close(theirs["policy_gradient"], given.theirs["policy_gradient"])
    losses = improve(given, wide_values=True)["pg_loss"][:2]
    tokens = torch.stack([given.mask[rows].sum() for rows in given.theirs["rows"][:2]])
    assert (losses.mean() - (losses * tokens).sum() / tokens.sum()).abs() > 1e-4


# -------------------------------------------------------------------------------------------------- gauges and padding


@every_case
def test_gauges_take_in_padding(name):
    """TRL's approx_kl is half the squared log-ratio, over all slots; over tokens it is another number."""
    given = replay(name)
    rows, new = given.theirs["rows"], given.theirs["new_logprobs"]
    log_ratio, mask = new - given.theirs["logprobs"][rows], given.mask[rows]
    share = unfilled(given)
    close((log_ratio.square() / 2).mean(), given.theirs["approx_kl"] * share)
    close(log_ratio.exp().mean(), given.theirs["ratio"] * share)
    over_tokens = masked_mean(log_ratio.square() / 2, mask)
    assert (over_tokens > given.theirs["approx_kl"] * share * 1.2) == (not mask.all())


@every_case
def test_clip_fraction_leaves_out_ratios_whose_clipping_changes_nothing(name):
    """Ours counts every ratio out of its range, TRL those of them where the clipped loss is the larger one."""
    given = replay(name)
    clip = given.settings["cliprange"]
    shares = {"binding": [], "out of range": []}
    for rows, new in zip(given.theirs["rows"], given.theirs["new_logprobs"], strict=True):
        stored = {key: given.theirs[key][rows] for key in ("logprobs", "advantages")}
        # With the end token as padding its own last token is out of the mask.
        mask = given.mask[rows] & (stored["logprobs"] != 1)
        ratio = (new - stored["logprobs"]).exp()
        clipped_is_larger = -stored["advantages"] * ratio.clamp(1 - clip, 1 + clip) > -stored["advantages"] * ratio
        shares["binding"].append(masked_mean(clipped_is_larger.double(), mask))
        ours = policy_loss(new_logprobs=new, mask=mask, clip=clip, **stored)[1]["clip_fraction"]
        close(ours, masked_mean(((ratio - 1).abs() > clip).double(), mask))
        shares["out of range"].append(ours)
    theirs = given.theirs["clip_fraction"] * unfilled(given)
    close(torch.stack(shares["binding"]).mean(), theirs)
    assert torch.stack(shares["out of range"]).mean() > theirs


def test_a_pad_token_that_is_the_end_token_takes_the_end_away():
    """No completion that stops in its buffer keeps its end: TRL has neither a log-prob nor an advantage for it."""
    [name] = cases_with(pad="eos")
    given = replay(name)
    ended = given.rollout.finished
    last = (torch.arange(len(given.mask)), given.last)
    assert (given.theirs["logprobs"][last] == 1).equal(ended)
    assert (given.theirs["advantages"][last] == 0).equal(ended)
    before = given.mask & ~(ended[:, None] & (torch.arange(given.mask.shape[1]) == given.last[:, None]))
    with torch.no_grad():
        logprobs, _, _ = given.outputs()
    close(logprobs[before], given.theirs["logprobs"][before])
