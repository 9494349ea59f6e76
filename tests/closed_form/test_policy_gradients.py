"""PPO and RLOO, built from the library's functions, find the optimum of the KL-regularised reward by sampling.

Three symbols, at most three places: all 27 sequences, or the 15 where one symbol ends a sequence. The policy is a table
of logits, one row for each prefix, and the value model a table of values. Reference and rewards are random; the optimum
is ref exp(r / beta) / Z over whole sequences, and the total variation distance to it is enumerated.

First without sampling: the gradients of the losses, in expectation over every sequence, are those of the objective.

What makes this file fail, each tried: `MISTAKES` below, in both algorithms (wrong sign of the advantages, the KL
penalty or the scores, or either missing), and in the library k1 = -d, a KL penalty that is added, a score placed a
token early, a loss that is maximised, an inverted ratio, a value loss that is maximised. What does not, and is tested
elsewhere: clipping in PPO and of values, which bounds a step and not the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_core.losses.policy import policy_loss
from rlhf_core.losses.value import value_loss
from rlhf_core.ops.advantages import gae, rloo_advantages
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_whiten

BETA = 0.3
SAMPLES = 512  # a step


@dataclass
class Tree:
    """All N sequences, and their S distinct prefixes."""

    symbols: Tensor  # (N, 4) int64; the fourth place is padding
    prefixes: Tensor  # (N, 4) int64: the number of the prefix before each place
    mask: Tensor  # (N, 4) bool
    size: int  # S

    def tokens(self, table: Tensor) -> Tensor:
        """(S,) or (S, 3) -> (N, 4): the table's value at each place, or of each symbol; NaN at padding."""
        values = table[self.prefixes] if table.dim() == 1 else table[self.prefixes, self.symbols]
        return torch.where(self.mask, values, torch.nan)

    def logprobs(self, logits: Tensor) -> Tensor:
        return self.tokens(logits.log_softmax(-1))

    def distribution(self, logits: Tensor) -> Tensor:
        """(S, 3) -> (N,) probabilities of whole sequences."""
        return self.logprobs(logits).nansum(-1).exp()


def grow(end: int | None) -> Tree:
    """Sequences of three symbols, or up to the first `end`."""
    sequences, numbers = [], {(): 0}
    for sequence in ((a, b, c) for a in range(3) for b in range(3) for c in range(3)):
        sequence = sequence[: sequence.index(end) + 1] if end in sequence else sequence
        if sequence not in sequences:
            sequences.append(sequence)
    for sequence in sequences:
        for length in range(1, len(sequence)):
            numbers.setdefault(sequence[:length], len(numbers))
    places = [[(s[t], numbers[s[:t]], True) if t < len(s) else (0, 0, False) for t in range(4)] for s in sequences]
    symbols, prefixes, mask = torch.tensor(places).unbind(-1)
    return Tree(symbols, prefixes, mask.bool(), len(numbers))


class Task:
    """A random reference and random rewards, and the optimum."""

    def __init__(self, tree: Tree, seed: int):
        self.tree, self.generator = tree, torch.Generator().manual_seed(seed)
        self.reference = torch.randn(tree.size, 3, generator=self.generator)
        self.rewards = torch.randn(len(tree.mask), generator=self.generator)
        self.start = tree.distribution(self.reference)
        self.optimum = (self.start.log() + self.rewards / BETA).softmax(-1)

    def train(self, update, policy: Tensor, *others: Tensor, steps: int, lr: float) -> Tensor:
        """Sample, update, anneal; returns the distribution of the policy."""
        optimizer = torch.optim.Adam([policy, *others], lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            with torch.no_grad():
                chances, logprobs = self.tree.distribution(policy), self.tree.logprobs(policy)
                ref_logprobs = self.tree.logprobs(self.reference)
            drawn = torch.multinomial(chances, SAMPLES, replacement=True, generator=self.generator)
            update(optimizer, drawn, self.rewards[drawn], logprobs[drawn], ref_logprobs[drawn], self.tree.mask[drawn])
        return self.tree.distribution(policy.detach())


@dataclass
class Mistake:
    """Factors that should be 1."""

    advantages: int = 1
    penalty: int = 1
    scores: int = 1

    def rewards(self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Rewards per token. A penalty of -1: policy and reference exchanged, so that k1 = d is -d."""
        pair = (ref_logprobs, logprobs) if self.penalty < 0 else (logprobs, ref_logprobs)
        return kl_penalty(self.scores * scores, *pair, mask, kl_coef=BETA * abs(self.penalty))[0]


def ppo(task: Task, mistake: Mistake, *, steps: int = 150, lr: float = 0.1) -> Tensor:
    """KL penalty, GAE, whitening, then epochs over minibatches of clipped losses, as in trainers/ppo.py."""
    policy, critic = task.reference.clone().requires_grad_(), torch.zeros(task.tree.size, requires_grad=True)

    def update(optimizer, drawn, scores, logprobs, ref_logprobs, mask):
        values = task.tree.tokens(critic.detach())[drawn]
        rewards = mistake.rewards(scores, logprobs, ref_logprobs, mask)
        advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
        advantages = mistake.advantages * masked_whiten(advantages, mask)
        for _ in range(2):
            for part in torch.randperm(SAMPLES, generator=task.generator).split(SAMPLES // 2):
                policy_term, _ = policy_loss(
                    "ppo",
                    new_logprobs=task.tree.logprobs(policy)[drawn[part]],
                    logprobs=logprobs[part],
                    advantages=advantages[part],
                    mask=mask[part],
                    clip=0.2,
                )
                value_term, _ = value_loss(
                    new_values=task.tree.tokens(critic)[drawn[part]],
                    values=values[part],
                    returns=returns[part],
                    mask=mask[part],
                    value_clip=0.2,
                )
                optimizer.zero_grad()
                (policy_term + 0.5 * value_term).backward()
                optimizer.step()

    return task.train(update, policy, critic, steps=steps, lr=lr)


def rloo(task: Task, mistake: Mistake, *, steps: int = 300, lr: float = 0.1) -> Tensor:
    """A sequence's score minus its KL penalty, relative to the mean of the others in its group; no values, no ratio."""
    policy = task.reference.clone().requires_grad_()

    def update(optimizer, drawn, scores, logprobs, ref_logprobs, mask):
        rewards = mistake.rewards(scores, logprobs, ref_logprobs, mask)
        advantages = mistake.advantages * rloo_advantages(rewards.sum(-1), group_size=4)
        new_logprobs = task.tree.logprobs(policy)[drawn]
        loss, _ = policy_loss(
            "reinforce", new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages, mask=mask
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return task.train(update, policy, steps=steps, lr=lr)


TREES = {"27": grow(None), "15": grow(end=2)}
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@trees
@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_the_expected_gradient_is_the_objectives(name, tree):
    """J = E[r] - beta KL(pi || ref) over whole sequences, differentiated by autograd, equals sum_y p(y) loss(y).

    On policy, at lambda 1, for any values: they are a baseline. With RLOO, over all groups of two.
    """
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, tree.size, 3, dtype=torch.float64, generator=generator)
    values, scores = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (tree.size, len(tree.mask)))
    logits.requires_grad_()
    chances, ref_logprobs = tree.distribution(logits), tree.logprobs(reference)
    objective = chances @ (scores - BETA * (chances.log() - tree.distribution(reference).log()))
    (expected,) = torch.autograd.grad(-objective, logits)

    rewards, _ = kl_penalty(scores, tree.logprobs(logits).detach(), ref_logprobs, tree.mask, kl_coef=BETA)
    rows, weights = torch.arange(len(scores)), tree.distribution(logits.detach())
    advantages, _ = gae(rewards, tree.tokens(values), tree.mask, gamma=1.0, lam=1.0)
    if name == "reinforce":
        rows = torch.cartesian_prod(rows, rows)
        weights = weights[rows].prod(-1).repeat_interleave(2) / 2  # of a group; the mean over its two members
        rows = rows.flatten()
        advantages = rloo_advantages(rewards.sum(-1)[rows], group_size=2)
    loss, _ = policy_loss(
        name,
        new_logprobs=tree.logprobs(logits)[rows],
        logprobs=tree.logprobs(logits).detach()[rows],
        advantages=advantages,
        mask=tree.mask[rows],
        weights=weights[:, None],
        normalizer=1,
    )
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, rtol=0, atol=1e-12)


@trees
def test_the_expected_gradient_of_the_full_kl_is_the_objectives(tree):
    """The same objective with the exact KL of each state, both in the rewards and as a loss.

    Neither suffices alone: the rewards lack the choice at the state itself, the loss lacks the choices before it.
    """
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, tree.size, 3, dtype=torch.float64, generator=generator)
    values, scores = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (tree.size, len(tree.mask)))
    logits.requires_grad_()
    chances, ref_chances = tree.distribution(logits), tree.distribution(reference)
    (expected,) = torch.autograd.grad(-(chances @ (scores - BETA * (chances / ref_chances).log())), logits)

    logprobs, ref_logprobs = logits.log_softmax(-1), reference.log_softmax(-1)
    exact_kl = tree.tokens((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    taken, ref_taken = tree.tokens(logprobs), tree.tokens(ref_logprobs)
    full = dict(kl_coef=BETA, estimator="full", kl=exact_kl.detach(), with_loss=True)
    rewards, _ = kl_penalty(scores, taken.detach(), ref_taken, tree.mask, **full)
    advantages, _ = gae(rewards, tree.tokens(values), tree.mask, gamma=1.0, lam=1.0)
    weights = chances.detach()
    policy_term, _ = policy_loss(
        "ppo", new_logprobs=taken, logprobs=taken.detach(), advantages=advantages, mask=tree.mask,
        weights=weights[:, None], normalizer=1,
    )  # fmt: skip
    kl_term = BETA * (weights * torch.where(tree.mask, exact_kl, 0.0).sum(-1)).sum()
    of_rewards, of_loss = (torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (policy_term, kl_term))
    torch.testing.assert_close(of_rewards + of_loss, expected, rtol=0, atol=1e-12)
    for alone in (of_rewards, of_loss):
        assert (alone - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("algorithm", "tolerance", "seed", "tree"),
    [
        (ppo, 0.02, 0, TREES["15"]),
        (rloo, 0.01, 1, TREES["27"]),
        pytest.param(ppo, 0.02, 1, TREES["15"], marks=pytest.mark.slow),
        pytest.param(ppo, 0.02, 0, TREES["27"], marks=pytest.mark.slow),
        pytest.param(ppo, 0.02, 1, TREES["27"], marks=pytest.mark.slow),
        pytest.param(rloo, 0.01, 0, TREES["15"], marks=pytest.mark.slow),
        pytest.param(rloo, 0.01, 1, TREES["15"], marks=pytest.mark.slow),
        pytest.param(rloo, 0.01, 0, TREES["27"], marks=pytest.mark.slow),
    ],
)
def test_the_optimum_is_found(total_variation, algorithm, tolerance, seed, tree):
    task = Task(tree, seed)
    assert total_variation(task.start, task.optimum) > 0.3
    assert total_variation(algorithm(task, Mistake()), task.optimum) < tolerance


MISTAKES = {
    "the advantages' sign": Mistake(advantages=-1),
    "the penalty's sign": Mistake(penalty=-1),
    "no penalty": Mistake(penalty=0),
    "the scores' sign": Mistake(scores=-1),
    "no scores": Mistake(scores=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("algorithm", [ppo, rloo])
def test_the_check_can_fail(total_variation, algorithm, mistake):
    """With any of these mistakes it ends far from the optimum."""
    task = Task(TREES["27"], 0)
    assert total_variation(algorithm(task, mistake), task.optimum) > 0.3


@pytest.mark.parametrize(("end", "sequences", "prefixes"), [(None, 27, 13), (2, 15, 7)])
def test_the_trees_are_complete(end, sequences, prefixes):
    """Any table gives probabilities of all sequences that sum to 1."""
    tree = grow(end)
    assert tree.mask.shape == (sequences, 4) and tree.size == prefixes
    logits = torch.randn(prefixes, 3, generator=torch.Generator().manual_seed(0))
    assert tree.distribution(logits).sum().item() == pytest.approx(1)
    assert not tree.mask[:, 3].any()
