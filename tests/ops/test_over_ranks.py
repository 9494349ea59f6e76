"""Means, whitening and moments over two gloo processes, compared with the whole batch in one process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from rlhf_core.control import RunningMoments
from rlhf_core.ops.advantages import reinforce_pp_advantages
from rlhf_core.ops.masked import masked_mean, masked_var, masked_whiten, over_ranks

RANKS, EDGE = 2, 3  # the first rank has 3 of 5 rows


def batch() -> tuple[Tensor, Tensor]:
    """(5, 4) far from 0, of unlike means in the two parts; some places masked, the last row whole."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(5, 4, dtype=torch.float64, generator=generator)
    values[EDGE:] += 30
    return values, torch.rand(5, 4, generator=generator) < 0.6


def reduced(values: Tensor, mask: Tensor, *, all_ranks: bool) -> dict[str, Any]:
    moments = RunningMoments()
    moments.update([5.0], all_ranks=False)
    for part in (values, values[:1] - 3):
        moments.update(part, mask[: len(part)], all_ranks=all_ranks)
    everything = dict(all_ranks=all_ranks)
    return {
        "mean": masked_mean(values, mask, **everything),
        "var": masked_var(values, mask, **everything),
        "unbiased": masked_var(values, mask, unbiased=True, **everything),
        "whitened": masked_whiten(values, mask, **everything),
        "scaled": masked_whiten(values, mask, shift_mean=False, **everything),
        "reinforce++": reinforce_pp_advantages(values, mask, gamma=0.9, **everything),
        "moments": moments.state_dict(),
    }


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    values, mask = batch()
    rows = slice(EDGE) if rank == 0 else slice(EDGE, None)
    values, mask = values[rows], mask[rows]
    found = reduced(values, mask, all_ranks=True)
    found["alone"] = reduced(values, mask, all_ranks=False)
    found["empty mask"] = masked_whiten(values, torch.zeros_like(mask), all_ranks=True)
    with pytest.raises(ValueError, match="all_ranks=True: expected tensors without a gradient"):
        masked_whiten(values.clone().requires_grad_(), mask, all_ranks=True)
    moments = RunningMoments()
    with pytest.raises(ValueError, match="values hold nan"):  # on both ranks, though only one has it
        moments.update([float("nan") if rank else 1.0], all_ranks=True)
    found["after a fault"] = moments.count
    torch.save(found, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_both_ranks_together_are_the_whole_batch(ranks):
    values, mask = batch()
    whole = reduced(values, mask, all_ranks=True)  # one process: all ranks are this one
    for name in ("mean", "var", "unbiased"):
        for rank in ranks:
            torch.testing.assert_close(rank[name], whole[name], rtol=1e-12, atol=0)
    for name in ("whitened", "scaled", "reinforce++"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), whole[name], rtol=1e-9, atol=1e-12)


def test_moments_over_ranks_are_those_of_all_values(ranks):
    (values, mask), moments = batch(), RunningMoments()
    moments.update([5.0])
    moments.update(values, mask)
    for rows in (slice(0, 1), slice(EDGE, EDGE + 1)):
        moments.update(values[rows] - 3, mask[rows])
    assert ranks[0]["moments"] == ranks[1]["moments"]
    for name, value in moments.state_dict().items():
        assert ranks[0]["moments"][name] == pytest.approx(value, rel=1e-12)
    assert [rank["after a fault"] for rank in ranks] == [0, 0]


def test_without_all_ranks_a_rank_is_alone(ranks):
    values, mask = batch()
    for rank, rows in zip(ranks, (slice(EDGE), slice(EDGE, None)), strict=True):
        own = reduced(values[rows], mask[rows], all_ranks=False)
        for name, value in own.items():
            torch.testing.assert_close(rank["alone"][name], value)
        assert (rank["alone"]["whitened"] - rank["whitened"]).abs().max() > 0.5
        assert not rank["empty mask"].any()


def test_one_process_sums_over_itself():
    values, mask = batch()
    assert over_ranks(values, mask.sum())[0] is values
    assert torch.equal(masked_whiten(values, mask, all_ranks=True), masked_whiten(values, mask))
