"""KTO, BCO and APO-zero unpaired: values by hand, invariances, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.preference import RunningOption, kto_kl, unpaired_preference_loss
from rlhf_core.losses.unpaired import UNPAIRED_LOSSES, UnpairedTerms, register_unpaired_loss

NAMES = sorted(UNPAIRED_LOSSES)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int = 5, width: int = 4) -> dict[str, torch.Tensor]:
    """Random log-probs, float64, of different lengths, both labels present."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref_logprobs = -3 * torch.rand(2, rows, width, dtype=torch.float64, generator=generator)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    labels = torch.rand(rows, generator=generator) < 0.5
    labels[:2] = torch.tensor([True, False])
    return dict(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask, labels=labels)


def two_rows() -> dict[str, torch.Tensor]:
    """A desirable completion of log-ratio 1/2 in two tokens, an undesirable one of -1 in one, then NaN."""
    nan = math.nan
    return dict(
        logprobs=torch.tensor([[-1.0, -1.0], [-3.0, nan]], dtype=torch.float64),
        ref_logprobs=torch.tensor([[-1.5, -1.0], [-2.0, nan]], dtype=torch.float64),
        mask=torch.tensor([[True, True], [True, False]]),
        labels=torch.tensor([True, False]),
    )


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # beta 2: rewards 1 and -2. s(x) = sigmoid, p(x) = ln(1 + e^-x).
        ("kto", {"kl": 0.25}, 0.2266994),  # 1 - s(2 (1/2 - 1/4)) = .3775407, 1 - s(2 (1/4 + 1)) = .0758582
        ("bco", {"delta": 0.0}, 0.2200948),  # (p(1) + p(2)) / 2
        ("bco", {"delta": 0.5}, 0.2764834),  # (p(1/2) + p(5/2)) / 2 = (.4740770 + .0788897) / 2
        ("apo_zero_unpaired", {}, 0.1940722),  # (1 - s(1) + s(-2)) / 2
    ],
)
def test_by_hand(name, options, expected):
    loss, stats = unpaired_preference_loss(name, **two_rows(), beta=2.0, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    assert not any(value.requires_grad for value in stats.values())
    metrics = dict(desirable_reward=1.0, undesirable_reward=-2.0, margin=3.0)
    metrics |= {"kl": 0.25} if "kl" in options else {}
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(metrics)


def test_class_weights():
    """4/3 on the desirable, 1/2 on the other: (4/3 * .2689414 + 1/2 * .1192029) / 2."""
    loss, _ = unpaired_preference_loss(
        "apo_zero_unpaired", **two_rows(), beta=2.0, desirable_weight=4 / 3, undesirable_weight=0.5
    )
    assert loss.item() == pytest.approx((4 / 3 * 0.2689414 + 0.5 * 0.1192029) / 2, abs=1e-7)


def test_row_weights():
    """Weights 3 and 1, by their sum or by a number: (3 * .2689414 + .1192029) / 4 or / 8. Empty rows do not count."""
    weights = torch.tensor([3.0, 1.0])
    loss, _ = unpaired_preference_loss("apo_zero_unpaired", **two_rows(), beta=2.0, row_weights=weights)
    assert loss.item() == pytest.approx((3 * 0.2689414 + 0.1192029) / 4, abs=1e-7)
    options = dict(beta=2.0, row_weights=weights, normalizer=8)
    loss, _ = unpaired_preference_loss("apo_zero_unpaired", **two_rows(), **options)
    assert loss.item() == pytest.approx((3 * 0.2689414 + 0.1192029) / 8, abs=1e-7)
    rows = two_rows()
    rows["mask"][1] = False
    loss, _ = unpaired_preference_loss("apo_zero_unpaired", **rows, beta=2.0, row_weights=weights)
    assert loss.item() == pytest.approx(0.2689414, abs=1e-7)
    with pytest.raises(ValueError, match=r"row_weights.shape=\(1,\): expected one a row"):
        unpaired_preference_loss("bco", **two_rows(), row_weights=torch.ones(1))


def test_kto_at_its_reference_point_is_one_half():
    """x == kl: sigmoid(0), for either label."""
    rows = two_rows()
    rows["logprobs"] = rows["ref_logprobs"] + torch.tensor([[0.1, 0.1], [0.2, 0.0]])
    loss, _ = unpaired_preference_loss("kto", **rows, kl=torch.tensor(0.2))
    assert loss.item() == pytest.approx(0.5)


def test_the_kl_estimate():
    """Sums of log-ratios 1/2 and -1, mean -1/4: clamped at 0. Models exchanged: 1/4. Empty rows do not count."""
    rows = two_rows()
    logprobs, reference, mask = rows["logprobs"].requires_grad_(), rows["ref_logprobs"], rows["mask"]
    assert kto_kl(logprobs, reference, mask) == 0
    estimate = kto_kl(reference, logprobs, mask)
    assert estimate.item() == pytest.approx(0.25) and not estimate.requires_grad
    assert kto_kl(logprobs, reference, torch.tensor([[True, True], [False, False]])) == pytest.approx(0.5)
    wide = (
        torch.tensor([[1.0, 2.0, 4.0], [-1.0, 3.0, math.nan]]),
        torch.zeros(2, 3),
        torch.tensor([[True] * 3, [True, True, False]]),
    )
    assert kto_kl(*wide) == (7 + 2) / 2
    with pytest.raises(ValueError, match="False everywhere"):
        kto_kl(logprobs, reference, torch.zeros(2, 2, dtype=torch.bool))


def test_running_mean_of_bco():
    """The threshold is the mean of the classes' mean rewards: of all losses, bco alone has one."""
    running = {name: entry.running_mean for name, entry in UNPAIRED_LOSSES.items()}
    assert running.pop("bco") == RunningOption("delta", ("desirable_reward", "undesirable_reward"), momentum=None)
    assert set(running.values()) == {None}
    _, stats = unpaired_preference_loss("bco", **two_rows())
    assert {"desirable_reward", "undesirable_reward"} <= stats.keys()


def test_no_gradient_through_kl_and_delta():
    rows = two_rows()
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rows["logprobs"] = torch.where(rows["mask"], rows["logprobs"], 0.0).requires_grad_()
    for name, option in (("kto", {"kl": kl}), ("bco", {"delta": kl})):
        loss, _ = unpaired_preference_loss(name, **rows, **option)
        assert torch.autograd.grad(loss, kl, allow_unused=True, retain_graph=True) == (None,)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_direction(name):
    """The gradient raises log-probs of desirable completions and lowers those of undesirable ones."""
    rows = draw(1)
    logprobs = rows.pop("logprobs").requires_grad_()

    def loss(values):
        return unpaired_preference_loss(
            name, logprobs=values, **rows, kl=0.3, beta=0.7, desirable_weight=1.2, undesirable_weight=0.8
        )[0]

    assert torch.autograd.gradcheck(loss, (logprobs,))
    (gradient,) = torch.autograd.grad(loss(logprobs), logprobs)
    assert (gradient[rows["labels"]][rows["mask"][rows["labels"]]] < 0).all()
    assert (gradient[~rows["labels"]][rows["mask"][~rows["labels"]]] > 0).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=seeds, cut=st.integers(1, 4))
def test_order_padding_and_micro_batches(name, seed, cut):
    rows = draw(seed)
    loss, stats = unpaired_preference_loss(name, **rows, kl=0.2)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = {key: tensor[order] for key, tensor in rows.items()}
    for key in ("logprobs", "ref_logprobs"):
        moved[key] = torch.cat([moved[key], torch.full((5, 2), math.nan, dtype=torch.float64)], 1)
        moved[key] = torch.cat([moved[key], torch.full((1, 6), math.inf, dtype=torch.float64)])
    moved["mask"] = torch.nn.functional.pad(moved["mask"], (0, 2, 0, 1))  # and a row without tokens
    moved["labels"] = torch.cat([moved["labels"], torch.tensor([True])])
    moved_loss, moved_stats = unpaired_preference_loss(name, **moved, kl=0.2)
    torch.testing.assert_close(moved_loss, loss)
    torch.testing.assert_close(moved_stats, stats)
    parts = [
        unpaired_preference_loss(name, **{key: tensor[part] for key, tensor in rows.items()}, kl=0.2, normalizer=5)[0]
        for part in (slice(0, cut), slice(cut, 5))
    ]
    torch.testing.assert_close(sum(parts), loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(name, dtype):
    logprobs = torch.tensor([[0.0], [-1000.0], [0.0], [-1000.0]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[-1000.0], [0.0], [-1000.0], [0.0]], dtype=dtype)
    labels, mask = torch.tensor([True, True, False, False]), torch.ones(4, 1, dtype=torch.bool)
    loss, _ = unpaired_preference_loss(
        name, logprobs=logprobs, ref_logprobs=reference, mask=mask, labels=labels, kl=1000.0
    )
    loss.backward()
    assert loss.isfinite() and loss.dtype == dtype and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_tokens_has_no_gradient(name):
    rows = draw(2)
    rows["mask"][0] = False
    logprobs = rows["logprobs"].requires_grad_()
    loss, _ = unpaired_preference_loss(name, **rows, kl=0.1)
    loss.backward()
    assert (logprobs.grad[0] == 0).all() and (logprobs.grad[1:] != 0).any()
    rest = {key: tensor[1:] for key, tensor in rows.items()}
    torch.testing.assert_close(loss, unpaired_preference_loss(name, **rest, kl=0.1)[0])


def test_one_class_alone():
    """All desirable: the other class's metric is 0, and nothing is NaN."""
    rows = draw(3) | {"labels": torch.ones(5, dtype=torch.bool)}
    for name in NAMES:
        loss, stats = unpaired_preference_loss(name, **rows, kl=0.1)
        assert loss.isfinite() and stats["undesirable_reward"] == 0 and stats["desirable_reward"].isfinite()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kto", {}, "loss 'kto' needs kl"),
        ("kot", {}, "no unpaired preference loss named 'kot'.*did you mean 'kto'"),
        ("kto", {"kl": 0.0, "beta": 0.0}, "beta=0.0: expected more than 0"),
        ("kto", {"kl": 0.0, "desirable_weight": 0.0}, "desirable_weight=0.0: expected more than 0"),
        ("kto", {"kl": 0.0, "undesirable_weight": -1.0}, "undesirable_weight=-1.0: expected more than 0"),
        ("kto", {"kl": 0.0, "delta": 1.0}, "delta=1.0: kto has no such option"),
        ("kto", {"kl": 0.0, "ref_logprobs": None}, "loss 'kto' needs ref_logprobs"),
        ("bco", {"labels": torch.ones(2)}, "labels.dtype=torch.float32: expected torch.bool"),
        ("bco", {"mask": torch.zeros(2, 2, dtype=torch.bool)}, "mask of shape .2, 2. is False everywhere"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        unpaired_preference_loss(name, **two_rows() | options)


def test_a_loss_of_ones_own():
    """Registered by a decorator; it declares its own option and no beta."""
    try:

        @register_unpaired_loss("signed", needs_reference=False)
        def signed(terms: UnpairedTerms, *, scale=1.0):
            return torch.where(terms.labels, -scale, scale) * terms.logprob

        rows = two_rows() | {"ref_logprobs": None}
        assert unpaired_preference_loss("signed", **rows, scale=2.0)[0] == (4 - 6) / 2
    finally:
        UNPAIRED_LOSSES.pop("signed", None)
