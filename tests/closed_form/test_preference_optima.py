"""The minimum of preference losses in expectation over all pairs of completions, where it is a formula.

A pair (i, j) has probability mu_i mu_j, and the label "i is better" probability p_ij. With Bradley-Terry labels
p_ij = sigmoid(r_i - r_j). Notation: a_i = log(pi_i / ref_i).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.losses.preference import (
    Completions,
    Pairs,
    preference_loss,
    ranked_preference_loss,
    unpaired_preference_loss,
)

BETA = 0.5


def population_loss(
    name: str, space, labels: Tensor, *, lengths=None, offset=None, normalised=True, beta=BETA, **options
):
    """The expected loss over all ordered pairs, as a function of K logits.

    `lengths` (K,): a completion's first token is the choice, the others are certain. `offset` (K,): margins are
    offset_i - offset_j. Not `normalised`: the parameters are the log-probs, for losses whose two sides do not meet.
    """
    lengths = torch.ones(len(space), dtype=torch.int64) if lengths is None else torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    chosen, rejected = torch.nonzero(~torch.eye(len(space), dtype=torch.bool), as_tuple=True)

    def tokens(logprobs: Tensor) -> Tensor:
        return torch.nn.functional.pad(logprobs[:, None], (0, mask.shape[1] - 1))

    def loss(parameters: Tensor) -> Tensor:
        policy = tokens(parameters.log_softmax(-1) if normalised else parameters)
        reference = tokens(space.reference.log())
        pairs = Pairs(
            Completions(policy[chosen], mask[chosen], reference[chosen]),
            Completions(policy[rejected], mask[rejected], reference[rejected]),
            weights=space.sampler[chosen] * space.sampler[rejected] * labels[chosen, rejected],
            margin=None if offset is None else offset[chosen] - offset[rejected],
        )
        value, _ = preference_loss(name, pairs, beta=beta, normalizer=1, **options)
        return value

    return loss


@pytest.fixture
def population_log_ratios(minimise):
    """The a (K,) where the expected loss is least."""

    def solve(name: str, space, labels: Tensor, *, normalised: bool = True, **options) -> Tensor:
        solution = minimise(population_loss(name, space, labels, normalised=normalised, **options), len(space))
        return (solution.log_softmax(-1) if normalised else solution) - space.reference.log()

    return solve


def flipped(labels: Tensor, rate: float) -> Tensor:
    """Each label flipped with this probability."""
    return (1 - rate) * labels + rate * (1 - labels)


def spread(values: Tensor) -> float:
    return (values.max() - values.min()).item()


# ------------------------------------------------------------------------------------------------------------------ DPO


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_dpo(space, population_log_ratios, total_variation, beta):
    """pi* = ref exp(r / beta) / Z (Rafailov et al. 2023, arXiv:2305.18290, eq. 4 and 7), for any distribution of pairs.

    The minimum of each pair is at beta (a_i - a_j) = r_i - r_j, and a_i = r_i / beta + const satisfies all of them.
    """
    policy = space.tilted(population_log_ratios("sigmoid", space, space.preferences, beta=beta))
    assert total_variation(policy, space.tilted(space.rewards / beta)) < 1e-6
    assert total_variation(policy, (space.rewards / beta).softmax(-1)) > 0.1  # what it would be without a reference


def test_dpo_without_a_reference(space, population_log_ratios, total_variation):
    """A uniform reference: softmax(r / beta)."""
    log_ratios = population_log_ratios("sigmoid", space, space.preferences, reference_free=True)
    assert total_variation(space.tilted(log_ratios), (space.rewards / BETA).softmax(-1)) < 1e-6


def test_dpo_with_offsets(space, population_log_ratios, total_variation):
    """odpo: beta (a_i - a_j) - (g_i - g_j) = r_i - r_j, so ref exp((r + g) / beta): offsets add to the reward."""
    offset = torch.linspace(-1, 1, len(space), dtype=torch.float64).square()
    log_ratios = population_log_ratios("odpo", space, space.preferences, offset=offset)
    assert total_variation(space.tilted(log_ratios), space.tilted((space.rewards + offset) / BETA)) < 1e-6


LENGTHS = [1, 4, 2, 3, 1, 2, 5, 2]


def test_dpo_with_a_length_penalty(space, population_log_ratios, total_variation):
    """r_dpo: beta (a_i - a_j) + c (L_i - L_j) = r_i - r_j, so the reward is r - c L. DPO ignores lengths."""
    penalised = space.rewards - 0.3 * torch.tensor(LENGTHS)
    log_ratios = population_log_ratios("r_dpo", space, space.preferences, lengths=LENGTHS, length_coef=0.3)
    assert total_variation(space.tilted(log_ratios), space.tilted(penalised / BETA)) < 1e-6
    log_ratios = population_log_ratios("sigmoid", space, space.preferences, lengths=LENGTHS)
    assert total_variation(space.tilted(log_ratios), space.tilted(space.rewards / BETA)) < 1e-6


def test_dpo_over_mean_log_ratios(space, population_log_ratios):
    """sigmoid_norm: beta (a_i / L_i - a_j / L_j) = r_i - r_j, so a_i / L_i = r_i / beta + const."""
    log_ratios = population_log_ratios("sigmoid_norm", space, space.preferences, lengths=LENGTHS)
    assert spread(log_ratios / torch.tensor(LENGTHS) - space.rewards / BETA) < 1e-6
    assert spread(log_ratios - space.rewards / BETA) > 0.1


# ------------------------------------------------------------------------------------------------------------------ IPO


def win_rates(space) -> Tensor:
    """(K,) P_i = E_{j ~ mu}[p_ij], with p_ii = 1/2."""
    return space.preferences @ space.sampler


def test_ipo_has_a_target_of_its_own(space, population_log_ratios, total_variation):
    """ref exp(P / tau), P_i = E_{j ~ mu}[p_ij] (Azar et al. 2023, arXiv:2310.12036), with tau = beta; and not DPO's.

    With h_ij = a_i - a_j and the loss's target t = 1 / (2 beta), the derivative of the population loss

        sum_ij mu_i mu_j p_ij (h_ij - t)^2

    by a_i is, up to a factor 2 mu_i, and because h_ji = -h_ij and p_ji = 1 - p_ij,

        sum_j mu_j (p_ij (h_ij - t) - p_ji (h_ji - t)) = sum_j mu_j (h_ij - t (2 p_ij - 1))
                                                       = a_i - E_mu[a] - t (2 P_i - 1)

    which is 0 where a_i = 2 t P_i + const = P_i / beta + const. So the paper's tau is beta, and unlike DPO's the target
    depends on the distribution of the pairs.
    """
    policy = space.tilted(population_log_ratios("ipo", space, space.preferences))
    assert total_variation(policy, space.tilted(win_rates(space) / BETA)) < 1e-6
    assert total_variation(policy, space.tilted(space.rewards / BETA)) > 0.1
    assert total_variation(policy, space.tilted(space.preferences @ space.reference / BETA)) > 1e-3


def test_ipo_does_not_need_bradley_terry(space, population_log_ratios, total_variation):
    """Any preferences, here a cycle in which each beats the next: there are no rewards, but all have a P."""
    order = torch.arange(8)
    labels = torch.where((order[None] - order[:, None]) % 8 < 4, 0.9, 0.1).double()
    labels = torch.where((order[None] - order[:, None]) % 4 == 0, 0.5, labels)
    torch.testing.assert_close(labels + labels.T, torch.ones(8, 8, dtype=torch.float64))
    policy = space.tilted(population_log_ratios("ipo", space, labels))
    assert total_variation(policy, space.tilted(labels @ space.sampler / BETA)) < 1e-6


def test_ipo_over_mean_log_ratios(space, population_log_ratios):
    """The same with a_i / L_i for a_i."""
    log_ratios = population_log_ratios("ipo", space, space.preferences, lengths=LENGTHS)
    assert spread(log_ratios / torch.tensor(LENGTHS) - win_rates(space) / BETA) < 1e-6


def test_ipo_stops_where_dpo_would_not(space, population_log_ratios):
    """Certain labels: the minimum of IPO is at a gap of 1 / (2 beta); DPO's loss has no minimum."""
    pair = space.first(2)
    certain = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64)
    chosen, rejected = population_log_ratios("ipo", pair, certain).tolist()
    assert chosen - rejected == pytest.approx(1 / (2 * BETA), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- wrong labels


def test_robust_dpo_sees_through_flipped_labels(space, population_log_ratios, total_variation):
    """One label in five is flipped. `robust` with e = 0.2 is unbiased and reaches pi*.

    DPO fits beta (a_i - a_j) to logit((1 - 2e) p_ij + e), which is nearer to 0 than r_i - r_j.
    """
    labels, optimum = flipped(space.preferences, 0.2), space.tilted(space.rewards / BETA)
    policy = space.tilted(population_log_ratios("robust", space, labels, label_smoothing=0.2))
    assert total_variation(policy, optimum) < 1e-6
    fitted = space.tilted(population_log_ratios("sigmoid", space, labels))
    assert total_variation(fitted, optimum) > 0.1


def test_robust_dpo_is_unbiased_everywhere(space):
    """Not only where it ends: with flipped labels its expectation is that of DPO with the true ones, at any policy."""
    logits = torch.linspace(-2, 3, len(space), dtype=torch.float64).sin() * 3
    robust = population_loss("robust", space, flipped(space.preferences, 0.2), label_smoothing=0.2)
    torch.testing.assert_close(robust(logits), population_loss("sigmoid", space, space.preferences)(logits))


def test_conservative_dpo_is_dpo_on_flipped_labels(space, population_log_ratios, total_variation):
    """Smoothing clean labels by e is DPO on labels flipped with chance e: the opposite of `robust`."""
    smoothed = population_log_ratios("sigmoid", space, space.preferences, label_smoothing=0.2)
    fitted = population_log_ratios("sigmoid", space, flipped(space.preferences, 0.2))
    assert total_variation(space.tilted(smoothed), space.tilted(fitted)) < 1e-6
    assert total_variation(space.tilted(smoothed), space.tilted(space.rewards / BETA)) > 0.1


@pytest.mark.parametrize("name", ["sigmoid", "exo_pair"])
@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_certain_labels_end_at_their_confidence(space, population_log_ratios, name, smoothing):
    """sigmoid(beta (a_i - a_j)) = 1 - e: the minimum of the cross-entropy, and of EXO's reverse KL, to (1 - e, e)."""
    certain = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64)
    chosen, rejected = population_log_ratios(name, space.first(2), certain, label_smoothing=smoothing).tolist()
    assert 1 / (1 + math.exp(-BETA * (chosen - rejected))) == pytest.approx(1 - smoothing, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- f-divergences

F_DIVERGENCES = {  # options: f and f', as in Wang et al. 2023, arXiv:2309.16240, table 1, but for its name of alpha
    ("reverse_kl", 0.5): (lambda u: u * u.log(), lambda u: u.log() + 1),
    ("forward_kl", 0.5): (lambda u: -u.log(), lambda u: -1 / u),
    ("js", 0.5): (lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(), lambda u: (2 * u / (u + 1)).log()),
    ("alpha", 0.5): (lambda u: 4 * (1 - u.sqrt()) + 2 * (u - 1), lambda u: 2 - 2 / u.sqrt()),
    ("alpha", 0.3): (lambda u: (1 - u**0.3) / 0.21 + (u - 1) / 0.7, lambda u: (1 - u**-0.7) / 0.7),
}


@pytest.mark.parametrize(("divergence", "alpha"), F_DIVERGENCES)
def test_f_dpo(space, population_log_ratios, minimise, total_variation, divergence, alpha):
    """Its minimum is the policy with the most E[r] - beta D_f, D_f = E_ref[f(pi / ref)], found without the library.

    There r_i = beta f'(pi_i / ref_i) + const, which is what the loss is built on: checked by itself, four completions.
    The optimum of the reverse KL differs, so that an ignored option would be noticed.
    """
    f, slope = F_DIVERGENCES[divergence, alpha]
    four = space.first(4)
    options = dict(f_divergence=divergence, f_alpha=alpha)
    policy = four.tilted(population_log_ratios("sigmoid", four, four.preferences, **options))

    def negative_objective(logits: Tensor) -> Tensor:
        pi = logits.softmax(-1)
        return BETA * four.reference @ f(pi / four.reference) - pi @ four.rewards

    optimum = minimise(negative_objective, 4).softmax(-1)
    assert total_variation(policy, optimum) < 1e-6
    assert spread(slope(policy / four.reference) - four.rewards / BETA) < 1e-6
    if divergence != "reverse_kl":
        assert total_variation(policy, four.tilted(four.rewards / BETA)) > 0.01


# ------------------------------------------------------------------------------- losses that are sums over single sides


@pytest.mark.parametrize("name", ["sppo_hard", "nca_pair", "bco_pair"])
def test_losses_without_a_difference_of_sides(space, population_log_ratios, name):
    """Completion i is chosen with probability P_i (against another one) and rejected with 1 - P_i. In terms of a_i:

        sppo_hard   P (a - 1/2b)^2 + (1 - P) (a + 1/2b)^2                      least at b a = P - 1/2
        nca_pair    -P log s(b a) - 1/2 (P + 1 - P) log s(-b a)                least at b a = log(2 P)
        bco_pair    -P log s(b a) - (1 - P) log s(-b a)                        least at b a = logit P

    with b = beta and s = sigmoid. The log-probs are free parameters here: probabilities that sum to 1 have one degree
    of freedom less, and could not satisfy these equations exactly.
    """
    others = space.preferences @ space.sampler - space.sampler / 2
    chance = others / (1 - space.sampler)
    target = {"sppo_hard": chance - 0.5, "nca_pair": (2 * chance).log(), "bco_pair": chance.logit()}[name]
    log_ratios = population_log_ratios(name, space, space.preferences, normalised=False)
    torch.testing.assert_close(log_ratios, target / BETA, rtol=0, atol=1e-6)


def test_bco_without_pairs(space, minimise):
    """A binary classifier: beta a - delta = logit of the probability of being desirable. Ten labels each."""
    good = torch.tensor([1, 3, 5, 8])
    labels = (torch.arange(10) < good[:, None]).flatten()
    reference = space.first(4).reference.log().repeat_interleave(10)[:, None]

    def loss(logprobs: Tensor) -> Tensor:
        return unpaired_preference_loss(
            "bco",
            logprobs=logprobs.repeat_interleave(10)[:, None],
            ref_logprobs=reference,
            mask=torch.ones(40, 1, dtype=torch.bool),
            labels=labels,
            beta=BETA,
            delta=0.7,
        )[0]

    log_ratios = minimise(loss, 4) - space.first(4).reference.log()
    torch.testing.assert_close(log_ratios, ((good / 10).double().logit() + 0.7) / BETA, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- rankings


def test_dpo_over_rankings(space, minimise, total_variation):
    """Every order of three completions, with its Plackett-Luce probability under r: pi* again."""
    three = space.first(3)
    orders = torch.cartesian_prod(*[torch.arange(3)] * 3)
    orders = orders[orders.sort(-1).values.eq(torch.arange(3)).all(-1)]
    worth = three.rewards.exp()[orders]
    chances = (worth / worth.flip(-1).cumsum(-1).flip(-1)).prod(-1)
    assert len(orders) == 6 and chances.sum().item() == pytest.approx(1)
    reference = three.reference.log()

    def loss(logits: Tensor) -> Tensor:
        policy, mask = logits.log_softmax(-1), torch.ones(1, 3, 1, dtype=torch.bool)
        return sum(
            chance
            * ranked_preference_loss(
                "plackett_luce",
                logprobs=policy[order][None, :, None],
                ref_logprobs=reference[order][None, :, None],
                mask=mask,
                beta=BETA,
            )[0]
            for order, chance in zip(orders, chances, strict=True)
        )

    policy = minimise(loss, 3).softmax(-1)
    assert total_variation(policy, three.tilted(three.rewards / BETA)) < 1e-6
