"""Every paired preference loss of the table: a value derived by hand, its gradient, and common properties.

tests/losses/test_preference.py tests DPO in more depth, tests/closed_form the minimisers, tests/parity compares with
other libraries.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss, wpo_weights
from rlhf_core.losses.registry import options_of
from tests.losses.pairs_of import pairs_of

NAMES = sorted(PREFERENCE_LOSSES)
TRL_NAMES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
ACROSS_PAIRS = {"aot", "aot_unpaired", "beta_dpo"}  # a pair's loss depends on the others of the batch
STOPPED_GRADIENT = {"beta_dpo", "tdpo2"}  # a part of the formula has no gradient
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, pairs: int = 4, width: int = 5, scale: float = 3.0) -> dict[str, torch.Tensor]:
    """Random token log-probs, float64, of different lengths, and every extra tensor that some loss needs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for side in ("chosen", "rejected"):
        tensors[f"{side}_mask"] = torch.arange(width) < torch.randint(1, width + 1, (pairs, 1), generator=generator)
        for name in (f"{side}_logprobs", f"ref_{side}_logprobs", f"{side}_kl"):
            values = scale * torch.rand(pairs, width, dtype=torch.float64, generator=generator)
            tensors[name] = values if name.endswith("kl") else -values
    return tensors | {"margin": torch.rand(pairs, dtype=torch.float64, generator=generator)}


def call(name: str, tensors: dict[str, torch.Tensor], **options):
    """The loss with what it needs and nothing else; exo_pair needs smoothed labels."""
    needs = PREFERENCE_LOSSES[name].needs
    extra = {"margin": ("margin",), "kl": ("chosen_kl", "rejected_kl")}
    kept = plain(tensors) | {key: tensors[key] for need in needs for key in extra[need]}
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    return preference_loss(name, pairs_of(**kept), **smoothing | options)


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the tensors that only some losses need."""
    return {key: value for key, value in tensors.items() if key not in ("margin", "chosen_kl", "rejected_kl")}


def by_hand_pair(swap: bool = False) -> dict[str, torch.Tensor]:
    """Chosen (-1, -1), reference (-1.5, -1): a = 1/2, l = -2, L = 2. Rejected (-3), reference (-2): b = -1, l = -3.

    d = 3/2, over lengths 1/4 + 1 = 5/4. Sums of KL 1/4 and 3/4; margin 1. `swap` exchanges the two completions.
    """
    nan = math.nan
    first, second = ("rejected", "chosen") if swap else ("chosen", "rejected")
    return {
        f"{first}_logprobs": torch.tensor([[-1.0, -1.0]], dtype=torch.float64),
        f"ref_{first}_logprobs": torch.tensor([[-1.5, -1.0]], dtype=torch.float64),
        f"{first}_mask": torch.tensor([[True, True]]),
        f"{first}_kl": torch.tensor([[0.1, 0.15]], dtype=torch.float64),
        f"{second}_logprobs": torch.tensor([[-3.0, nan]], dtype=torch.float64),
        f"ref_{second}_logprobs": torch.tensor([[-2.0, nan]], dtype=torch.float64),
        f"{second}_mask": torch.tensor([[True, False]]),
        f"{second}_kl": torch.tensor([[0.75, nan]], dtype=torch.float64),
        "margin": torch.tensor([1.0], dtype=torch.float64),
    }


# beta 2, so beta a = 1, beta b = -2, beta d = 3. s(x) = sigmoid, p(x) = ln(1 + e^-x) = -ln s(x):
# p(1) = .3132617, p(2) = .1269280, p(3) = .0485874, p(-1) = 1.3132617, s(1) = .7310586, s(3) = .9525741
BY_HAND = {
    "sigmoid": ({}, 0.0485874),  # p(3)
    "sigmoid_norm": ({}, 0.0788897),  # p(2 * 5/4)
    "robust": ({"label_smoothing": 0.1}, -0.3264126),  # (.9 p(3) - .1 p(-3)) / .8 = (.0437287 - .3048587) / .8
    "exo_pair": ({}, 0.0187008),  # q = s(3): q (ln q - ln .9) + (1 - q) (ln(1 - q) - ln .1) = .0540806 - .0353798
    "discopop": ({"tau": 1.0}, 0.0497302),  # m = s(3): (1 - m) p(3) + m e^-3 = .0023043 + .0474259
    "beta_dpo": ({"gap_mean": 1.0}, 0.0200398),  # beta' = 2 (1 + .6 (1.5 - 1)) = 2.6: p(2.6 * 1.5)
    "odpo": ({}, 0.1269280),  # p(3 - 1)
    "r_dpo": ({"length_coef": 0.5}, 0.0297504),  # one token longer: p(3 + .5)
    "dpop": ({"swap": True, "dpop_lambda": 0.5}, 4.0181499),  # a = -1, d = -3/2: p(2 (-3/2 - .5 * 1)) = p(-4)
    "cal_dpo": ({}, 0.8264133),  # p(3/2) + (1/2 - 1/4)^2 + (-1 + 1/4)^2 = .2014133 + .625
    "tdpo1": ({}, 0.1269280),  # p(2 (3/2 - (3/4 - 1/4)))
    "tdpo2": ({}, 0.0788897),  # p(2 (3/2 - 1/2 (3/4 - 1/4)))
    "hinge": ({"beta": 0.5}, 0.25),  # 1 - 3/4
    "ipo": ({}, 1.0),  # (5/4 - 1/4)^2
    "sppo_hard": ({}, 0.625),  # (1/2 - 1/4)^2 + (-1 + 1/4)^2
    "nca_pair": ({}, 1.0333565),  # p(1) + p(-1) / 2 + p(2) / 2
    "bco_pair": ({}, 0.4401897),  # p(1) + p(2)
    "apo_zero": ({}, 0.3881443),  # 1 - s(1) + s(-2)
    "apo_down": ({}, 0.7784845),  # s(1) + 1 - s(3)
    "aot": ({}, 0.0485874),  # one pair has nothing to sort
    "aot_unpaired": ({}, 0.0485874),
    "sft": ({}, 1.0),  # (1 + 1) / 2
    "cpo": ({}, 1.1269280),  # p(2 (-2 + 3)) + 1
    "simpo": ({}, 0.0297504),  # p(2 (-1 + 3) - 1/2)
    "alphapo": ({"reward_alpha": -1.0}, 0.6273713),  # r = p - 1: p(2 (e^-1 - e^-3) - 1/2) = p(.1361848)
    "orpo": ({}, 1.1724115),  # odds .5819767 and .0523957, log ratio 2.4076060: 1 + 2 p(2.4076060)
}


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name):
    """The pair of `by_hand_pair`; the derivation is beside each number."""
    options, expected = BY_HAND[name]
    options = {"beta": 2.0} | options
    loss, stats = call(name, by_hand_pair(options.pop("swap", False)), **options)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    assert not any(value.requires_grad for value in stats.values())


def test_every_loss_of_trl_is_here():
    assert set(TRL_NAMES) <= set(NAMES) == set(BY_HAND)


LN2 = math.log(2)
AT_EQUALITY = {  # policy == reference, beta 1/2
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "beta_dpo", "r_dpo", "dpop", "aot", "aot_unpaired", "robust"), LN2),
    "hinge": 1.0,
    "ipo": 1.0,  # (1 / (2 beta))^2
    "sppo_hard": 2.0,
    "cal_dpo": LN2 + 2,
    "exo_pair": LN2 * -1 - math.log(0.9 * 0.1) / 2,  # the KL of (1/2, 1/2) from (.9, .1)
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": LN2 / 2 + 1 / 2,
}


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_where_policy_and_reference_agree(seed):
    """Every log-ratio is 0, so the loss is a known constant, whatever the completions (r_dpo: without penalty)."""
    pairs = draw(seed)
    pairs |= {f"{side}_logprobs": pairs[f"ref_{side}_logprobs"] for side in ("chosen", "rejected")}
    for name, expected in AT_EQUALITY.items():
        options = {"length_coef": 0.0} if name == "r_dpo" else {}
        loss, stats = call(name, pairs, beta=0.5, **options)
        assert loss.item() == pytest.approx(expected, abs=1e-12), name
        assert stats["accuracy"] == 0.5 and stats["margin"] == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STOPPED_GRADIENT])
def test_gradcheck(name):
    """With respect to the tokens of both sides, in float64. (aot's sort is smooth away from ties.)"""
    pairs = draw(3, pairs=3, width=3, scale=1.5)
    inputs = tuple(pairs.pop(f"{side}_logprobs").requires_grad_() for side in ("chosen", "rejected"))

    def loss(chosen, rejected):
        return call(name, pairs | {"chosen_logprobs": chosen, "rejected_logprobs": rejected}, beta=0.7)[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_beta_dpo_and_tdpo2_stop_gradients():
    """No gradient through beta' and the chosen side's KL: it is that of "sigmoid" and "odpo" with these constants."""
    pairs = draw(4)
    chosen = pairs["chosen_logprobs"].requires_grad_()
    terms = [pairs[f"{s}_logprobs"] - pairs[f"ref_{s}_logprobs"] for s in ("chosen", "rejected")]
    chosen_sum, rejected_sum = (
        (x * pairs[f"{s}_mask"]).sum(-1) for s, x in zip(("chosen", "rejected"), terms, strict=True)
    )
    gap = chosen_sum - rejected_sum
    beta = 0.3 * (1 + 0.6 * (gap.mean().item() - 0.2))
    (gradient,) = torch.autograd.grad(call("beta_dpo", pairs, beta=0.3, gap_mean=0.2)[0], chosen)
    (expected,) = torch.autograd.grad(call("sigmoid", pairs, beta=max(beta, 1e-3))[0], chosen)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)

    pairs["chosen_kl"].requires_grad_(), pairs["rejected_kl"].requires_grad_()
    inputs = (chosen, pairs["chosen_kl"], pairs["rejected_kl"])
    gradients = torch.autograd.grad(call("tdpo2", pairs, beta=0.3)[0], inputs, allow_unused=True)
    assert gradients[1] is None
    sums = {s: torch.where(pairs[f"{s}_mask"], pairs[f"{s}_kl"], 0.0).sum(-1).detach() for s in ("chosen", "rejected")}
    offset = pairs | {"margin": 0.3 * 0.5 * (sums["rejected"] - sums["chosen"])}
    (expected,) = torch.autograd.grad(call("odpo", offset, beta=0.3)[0], chosen)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-12, atol=0)
    assert (gradients[2][pairs["rejected_mask"]] > 0).all() and (gradients[2][~pairs["rejected_mask"]] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_order_and_padding_change_nothing(name, seed):
    """Pairs in another order, rows padded with infinities, and pairs without tokens among them."""
    pairs = draw(seed)
    loss, stats = call(name, pairs)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = {}
    for key, tensor in pairs.items():
        tensor = tensor[order]
        if key != "margin":
            tensor = F.pad(tensor, (0, 3), value=0 if key.endswith("mask") else math.inf)
        empty = torch.zeros_like(tensor[:1]) if tensor.dtype == torch.bool else torch.full_like(tensor[:1], math.nan)
        moved[key] = torch.cat([tensor[:2], empty, tensor[2:]])
    moved_loss, moved_stats = call(name, moved)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved_stats, stats, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ACROSS_PAIRS])
@settings(max_examples=10, deadline=None)
@given(seed=seeds, cut=st.integers(1, 3))
def test_micro_batches_add_up(name, seed, cut):
    """Any split, with the counts of the whole batch: the same loss and gradient."""
    pairs = draw(seed)
    counts = dict(normalizer=4, token_normalizer=pairs["chosen_mask"].sum())
    results = []
    for parts in ([slice(0, 4)], [slice(0, cut), slice(cut, 4)]):
        inputs = [pairs[f"{side}_logprobs"].clone().requires_grad_() for side in ("chosen", "rejected")]
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            rows = {key: tensor[part] for key, tensor in pairs.items()}
            rows |= {"chosen_logprobs": inputs[0][part], "rejected_logprobs": inputs[1][part]}
            total = total + call(name, rows, **counts)[0]
        total.backward()
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in inputs]
        results.append((total.detach(), *gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    if name in ("sft", "cpo", "orpo"):  # without counts it is the mean over tokens
        torch.testing.assert_close(call(name, pairs)[0], results[0][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_without_tokens(name):
    """A pair with an empty side is not counted. No pair at all is an error, or 0 with a normalizer."""
    for empty in (("chosen",), ("rejected",), ("chosen", "rejected")):
        pairs = draw(5)
        rest = {key: tensor[1:] for key, tensor in pairs.items()}
        for side in empty:
            pairs[f"{side}_mask"] = pairs[f"{side}_mask"].clone()
            pairs[f"{side}_mask"][0] = False
        inputs = [pairs[f"{side}_logprobs"].requires_grad_() for side in ("chosen", "rejected")]
        loss, _ = call(name, pairs)
        torch.testing.assert_close(loss.detach(), call(name, rest)[0], rtol=1e-12, atol=0)
        for gradient in torch.autograd.grad(loss, inputs, allow_unused=True):
            assert gradient is None or ((gradient[0] == 0).all() and gradient.isfinite().all())
    for side in ("chosen", "rejected"):
        pairs = draw(14) | {f"{side}_mask": torch.zeros(4, 5, dtype=torch.bool)}
        with pytest.raises(ValueError, match=f"{side}.mask is False everywhere"):
            call(name, pairs)
        inputs = [pairs[f"{each}_logprobs"].requires_grad_() for each in ("chosen", "rejected")]
        loss, stats = call(name, pairs, normalizer=8, token_normalizer=20)
        assert loss == 0 and all(value == 0 for value in stats.values())
        for gradient in torch.autograd.grad(loss, inputs, allow_unused=True):
            assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_stay_finite(name):
    """Log-probs of 0 and -1000, references of 0 and -1000: value and gradient are finite, in float32 and float64."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    ratios = (-1000.0, 0.0, 1000.0)
    for dtype, chosen, rejected in itertools.product((torch.float32, torch.float64), ratios, ratios):
        pairs = dict(chosen_mask=mask, rejected_mask=mask, margin=torch.ones(1, dtype=dtype))
        for side, log_ratio in (("chosen", chosen), ("rejected", rejected)):
            pairs[f"{side}_logprobs"] = torch.tensor([[min(log_ratio, 0.0)]], dtype=dtype, requires_grad=True)
            pairs[f"ref_{side}_logprobs"] = torch.tensor([[min(-log_ratio, 0.0)]], dtype=dtype)
            pairs[f"{side}_kl"] = torch.full((1, 1), 1000.0, dtype=dtype)
        loss, _ = call(name, pairs)
        assert loss.isfinite() and loss.dtype == dtype
        inputs = [pairs[f"{side}_logprobs"] for side in ("chosen", "rejected")]
        for gradient in torch.autograd.grad(loss, inputs, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- the options


def test_a_mix_is_the_weighted_sum():
    """MPO's: 0.8 sigmoid + 0.2 bco_pair + 1 sft, with each part in the stats."""
    pairs, names, weights = draw(6), ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    parts = [call(name, pairs)[0] for name in names]
    kept = pairs_of(**plain(pairs))
    loss, stats = preference_loss(names, kept, loss_weights=weights)
    torch.testing.assert_close(loss, sum(w * part for w, part in zip(weights, parts, strict=True)))
    for name, part in zip(names, parts, strict=True):
        torch.testing.assert_close(stats[f"loss_{name}"], part)
    torch.testing.assert_close(preference_loss(names, kept)[0], sum(parts))


def test_options_go_to_the_loss_that_has_them():
    pairs = draw(7)
    kept = pairs_of(**plain(pairs))
    mixed, _ = preference_loss(["simpo", "dpop"], kept, gamma=0.9, dpop_lambda=3.0)
    apart = call("simpo", pairs, gamma=0.9)[0] + call("dpop", pairs, dpop_lambda=3.0)[0]
    torch.testing.assert_close(mixed, apart)
    with pytest.raises(ValueError, match="gama=0.9: simpo, dpop has no such option; did you mean 'gamma'"):
        preference_loss(["simpo", "dpop"], kept, gama=0.9)


def test_ld_dpo_by_hand():
    """alpha 1/4. Chosen longer by its second token, of log-ratio 0: a = 1/2 still, but l_c = -1 - 1/4.

    With the sides exchanged the loss of cpo, on log-probs, shows the same: p(2 (-3 + 5/4)) = p(-3.5) = 3.5297504.
    """
    pair = by_hand_pair()
    assert call("sigmoid", pair, beta=2.0, ld_alpha=0.25)[0].item() == pytest.approx(0.0485874, abs=1e-7)
    assert call("cpo", pair, beta=2.0, ld_alpha=0.25, nll_coef=0.0)[0].item() == pytest.approx(0.0297504, abs=1e-7)
    swapped = by_hand_pair(swap=True)
    assert call("cpo", swapped, beta=2.0, ld_alpha=0.25, nll_coef=0.0)[0].item() == pytest.approx(3.5297504, abs=1e-7)


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "aot"])
def test_ld_dpo_between_its_ends(name):
    """At 1 nothing changes; at 0 the longer completion ends where the shorter one does (for losses without lengths)."""
    pairs = draw(8)
    torch.testing.assert_close(call(name, pairs, ld_alpha=1.0)[0], call(name, pairs)[0])
    shorter = torch.minimum(pairs["chosen_mask"].sum(-1), pairs["rejected_mask"].sum(-1))
    cut = torch.arange(5) < shorter[:, None]
    torch.testing.assert_close(
        call(name, pairs, ld_alpha=0.0)[0], call(name, pairs | {"chosen_mask": cut, "rejected_mask": cut})[0]
    )


def test_wpo_by_hand():
    """Tokens of probability 1/2 and 1/4 where the expected one is 1/4 and 1/2: mean log (ln 2 - ln 2) / 2, weight 1.

    With the first token alone: 2. Pair weights of 2 turn the hinge losses 1 and 3 into 2 and 6.
    """
    logprobs, expected = torch.tensor([[0.5, 0.25]] * 2).log(), torch.tensor([[0.25, 0.5]] * 2).log()
    mask = torch.tensor([[True, True], [True, False]])
    weights = wpo_weights(logprobs.requires_grad_(), expected, mask)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0]))
    assert not weights.requires_grad

    one = torch.ones(2, 1, dtype=torch.bool)
    pairs = dict(chosen_mask=one, rejected_mask=one, chosen_logprobs=torch.tensor([[-1.0], [-3.0]]))
    pairs |= {f"{name}_logprobs": torch.full((2, 1), -1.0) for name in ("rejected", "ref_chosen", "ref_rejected")}
    assert preference_loss("hinge", pairs_of(**pairs), beta=1.0)[0] == (1 + 3) / 2
    weighted, _ = preference_loss("hinge", pairs_of(**pairs, weights=torch.tensor([2.0, 2.0])), beta=1.0)
    assert weighted == (2 + 6) / 2


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot", "tdpo1"])
def test_reference_free_is_a_reference_of_zeros(name):
    pairs = draw(10)
    zeros = {f"ref_{side}_logprobs": torch.zeros(4, 5, dtype=torch.float64) for side in ("chosen", "rejected")}
    without = {key: value for key, value in pairs.items() if not key.startswith("ref")}
    for ref_terms in (without, pairs):  # log-probs of a reference are ignored
        torch.testing.assert_close(call(name, ref_terms, reference_free=True)[0], call(name, pairs | zeros)[0])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", NAMES)
def test_an_option_is_supported_or_an_error(name):
    """Label smoothing, f-divergence, LD-DPO, pair weights: an option that a loss declares changes it; others raise."""
    pairs, entry = draw(11), PREFERENCE_LOSSES[name]
    unchanged = call(name, pairs)[0]
    if "label_smoothing" in options_of(entry.function):
        assert call(name, pairs, label_smoothing=0.3)[0] != unchanged
    else:
        with pytest.raises(ValueError, match=f"label_smoothing=0.3: not defined for '{name}'"):
            call(name, pairs, label_smoothing=0.3)
    for field, value in (("f_divergence", "js"), ("ld_alpha", 0.5)):
        if getattr(entry, field):
            assert call(name, pairs, **{field: value})[0] != unchanged
        else:
            with pytest.raises(ValueError, match=f"{field}=.*: not defined for '{name}'"):
                call(name, pairs, **{field: value})
    if entry.pair_weights:
        check_pair_weights(name, pairs)
    else:
        with pytest.raises(ValueError, match=f"pairs.weights=a tensor: not defined for '{name}'"):
            call(name, pairs | {"weights": torch.rand(4)})


def check_pair_weights(name: str, pairs: dict[str, torch.Tensor]) -> None:
    """A weight of 0 removes a pair's gradient, weights of 2 double the loss, and weights get no gradient."""
    inputs = [pairs[f"{side}_logprobs"].requires_grad_() for side in ("chosen", "rejected")]
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    options = {"beta_alpha": 0.0} if name == "beta_dpo" else {}
    loss, _ = call(name, pairs | {"weights": weights}, **options)
    gradients = torch.autograd.grad(loss, [*inputs, weights], allow_unused=True)
    assert gradients[-1] is None
    assert all(gradient is None or (gradient[0] == 0).all() for gradient in gradients[:-1])
    assert any(gradient is not None and (gradient[1:] != 0).any() for gradient in gradients[:-1])
    doubled, _ = call(name, pairs | {"weights": torch.full((4,), 2.0)}, **options)
    torch.testing.assert_close(doubled, 2 * call(name, pairs, **options)[0])


def test_sft_in_a_mix_need_not_support_an_option():
    kept = plain(draw(12))
    for field, value in (("f_divergence", "js"), ("ld_alpha", 0.5), ("label_smoothing", 0.1)):
        mixed, stats = preference_loss(["sigmoid", "sft"], pairs_of(**kept), **{field: value})
        torch.testing.assert_close(mixed, call("sigmoid", kept, **{field: value})[0] + call("sft", kept)[0])
    with pytest.raises(ValueError, match="f_divergence=js: not defined for 'bco_pair'"):
        preference_loss(["sigmoid", "bco_pair"], pairs_of(**kept), f_divergence="js")
    with pytest.raises(ValueError, match="pairs.weights=a tensor: not defined for 'aot'"):
        preference_loss(["sigmoid", "aot"], pairs_of(**kept, weights=torch.ones(4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0: expected more than 0"),
        ({"beta": -1.0}, "beta=-1.0: expected more than 0"),
        ({"beta": math.nan}, "beta=nan: expected more than 0"),
        ({"beta": math.inf}, "beta=inf: expected more than 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: expected 0 <= label_smoothing < 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1: expected 0 <= label_smoothing < 0.5"),
        ({"label_smoothing": math.nan}, "label_smoothing=nan: expected 0 <= label_smoothing < 0.5"),
        ({"no_such_option": 1}, "no_such_option=1: .* has no such option"),
    ],
)
def test_out_of_range(options, message):
    """Checked before any loss is called, so one name stands for all."""
    with pytest.raises(ValueError, match=message):
        call("sigmoid", draw(13), **options)


def test_no_whole_pair():
    pairs = draw(15, pairs=2)
    pairs |= {
        "chosen_mask": torch.tensor([[True] * 5, [False] * 5]),
        "rejected_mask": torch.tensor([[False] * 5, [True] * 5]),
    }
    with pytest.raises(ValueError, match="expected at least one pair with a token on both sides"):
        call("sigmoid", pairs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing=0.0: expected more than 0 for 'exo_pair'"),
        ("discopop", {"tau": 0.0}, "tau=0.0: expected more than 0"),
        ("dpop", {"dpop_lambda": -1.0}, "dpop_lambda=-1.0: expected 0 or more"),
        ("cal_dpo", {"cal_coef": -1.0}, "cal_coef=-1.0: expected 0 or more"),
        ("cpo", {"nll_coef": -1.0}, "nll_coef=-1.0: expected 0 or more"),
        ("orpo", {"nll_coef": -1.0}, "nll_coef=-1.0: expected 0 or more"),
        ("sigmoid", {"ld_alpha": 1.5}, "ld_alpha=1.5: expected between 0 and 1"),
        ("sigmoid", {"f_divergence": "kl"}, "f_divergence='kl': expected one of reverse_kl, forward_kl, js, alpha"),
        ("sigmoid", {"f_divergence": "alpha", "f_alpha": math.inf}, "f_alpha=inf: expected a finite number"),
        ("sigmoid", {"loss_weights": [1.0, 2.0]}, r"loss_weights=\[1.0, 2.0\]: expected one for each of 1 losses"),
    ],
)
def test_single_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, draw(16), **options)


@pytest.mark.parametrize("name", ["odpo", "tdpo1", "tdpo2"])
def test_a_tensor_that_is_needed_is_named(name):
    with pytest.raises(ValueError, match=f"loss '{name}' needs {PREFERENCE_LOSSES[name].needs[0]} and ref_logprobs"):
        preference_loss(name, pairs_of(**plain(draw(17))))


def test_names_of_a_mix():
    pairs = pairs_of(**plain(draw(18)))
    for names in ([], ["sigmoid", "sigmoid"]):
        with pytest.raises(ValueError, match="expected one or more different names"):
            preference_loss(names, pairs)
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        preference_loss(["sigmoid", "hing"], pairs)


# ----------------------------------------------------------------------------------------------- single losses in depth


def test_aot_sorts():
    """Two pairs. Margins of the policy 1, 5 and of the reference 3, 0: sorted differences 1 - 0 and 5 - 3.

    Log-ratios of the chosen 4, 1, of the rejected 0, 2 (unpaired): sorted 1 - 0 and 4 - 2. Both (p(1) + p(2)) / 2.
    """
    column, mask = (lambda *values: torch.tensor(values)[:, None].double()), torch.ones(2, 1, dtype=torch.bool)
    expected = (0.3132617 + 0.1269280) / 2
    masks, zeros = dict(chosen_mask=mask, rejected_mask=mask), column(0, 0)
    pairs = pairs_of(
        chosen_logprobs=column(1, 5), rejected_logprobs=zeros, ref_chosen_logprobs=column(3, 0),
        ref_rejected_logprobs=zeros, **masks,
    )  # fmt: skip
    loss, _ = preference_loss("aot", pairs, beta=1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    pairs = pairs_of(
        chosen_logprobs=column(4, 1), rejected_logprobs=column(0, 2), ref_chosen_logprobs=zeros,
        ref_rejected_logprobs=zeros, **masks,
    )  # fmt: skip
    loss, _ = preference_loss("aot_unpaired", pairs, beta=1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-7)


def test_dpop_penalises_only_a_negative_chosen_log_ratio():
    pair = by_hand_pair()  # a = 1/2
    torch.testing.assert_close(call("dpop", pair)[0], call("sigmoid", pair)[0])
    pair = by_hand_pair(swap=True)
    assert call("dpop", pair)[0] > call("sigmoid", pair)[0]


def test_alphapo_tends_to_simpo():
    """r = (1 - p^-alpha) / alpha -> ln p as alpha -> 0."""
    pairs = draw(19)
    torch.testing.assert_close(call("alphapo", pairs, reward_alpha=1e-7)[0], call("simpo", pairs)[0], rtol=1e-5, atol=0)
    assert torch.equal(call("alphapo", pairs, reward_alpha=0.0)[0], call("simpo", pairs)[0])


def test_beta_dpo_has_a_minimum():
    """A gap far below its mean would make beta negative: it is clamped at min_beta."""
    pairs = draw(20)
    loss, _ = call("beta_dpo", pairs, gap_mean=1e3, min_beta=0.01)
    torch.testing.assert_close(loss, call("sigmoid", pairs, beta=0.01)[0])


def test_odpo_needs_a_larger_difference_for_a_larger_margin():
    pairs = draw(21)
    narrow, wide = (call("odpo", pairs | {"margin": torch.full((4,), m).double()})[0] for m in (0.0, 1.0))
    torch.testing.assert_close(narrow, call("sigmoid", pairs)[0])
    assert wide > narrow


@pytest.mark.parametrize("name", ["sigmoid", "odpo", "tdpo1", "orpo", "beta_dpo", "sft"])
def test_half_precision_goes_in_and_float32_comes_out(name):
    """bfloat16 log-probs are converted to float32 first; the gradient has their own dtype."""
    pairs = {key: t.bfloat16() if t.is_floating_point() else t for key, t in draw(22).items()}
    exact = {key: t.float() if t.is_floating_point() else t for key, t in pairs.items()}
    pairs["chosen_logprobs"].requires_grad_()
    loss, stats = call(name, pairs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, call(name, exact)[0], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, pairs["chosen_logprobs"])
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_mask": torch.ones(4, 5)}, "mask.dtype=torch.float32: expected torch.bool, True = counted"),
        ({"chosen_logprobs": torch.zeros(4, 1)}, r"chosen.logprobs of shape \(4, 1\): expected that of its mask"),
        ({"ref_rejected_logprobs": torch.zeros(1, 5)}, r"rejected.ref_logprobs of shape \(1, 5\): expected"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call("sigmoid", draw(23) | changes)


def test_as_many_rejected_as_chosen():
    pairs = draw(24)
    pairs |= {key: pairs[key][:3] for key in ("rejected_logprobs", "ref_rejected_logprobs", "rejected_mask")}
    with pytest.raises(ValueError, match=r"len\(pairs.rejected\)=3: expected as many as chosen, 4"):
        call("sigmoid", pairs)
