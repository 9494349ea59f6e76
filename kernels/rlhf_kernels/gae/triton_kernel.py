"""GAE in one Triton launch: each program computes its rows from the last block of columns to the first.

The recursion is that of torch_path.py, an affine map per column. Inside a block of columns the maps are composed by an
associative scan; one number per row is carried from block to block. Columns are loaded back to front and scanned
forward, because reverse scans have been reported to be wrong for maps that do not commute.

Whitening needs every row. Each program writes count, mean and sum of squared distances of its advantages; when all have
done so, each combines them in the same order and whitens its own rows. On a GPU the programs synchronize inside the
launch, which is then cooperative: it fails if they cannot all be resident, so there is no deadlock.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.gae.reference import common_dtype

_BLOCK, _WARPS = 1024, 8
# Programs per multiprocessor that synchronize: four of eight warps with this many registers per thread always fit.
_RESIDENT, _REGISTERS = 4, 64
_PARTS = 1024  # partial statistics that are combined at once

_ALL, _STATISTICS, _WHITEN = 0, 1, 2  # phases of a launch: everything, or one half of it

_arrivals: dict[tuple[int, int], Tensor] = {}


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    launches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.gae` on CUDA, or on the CPU under Triton's interpreter.

    `launches`, 1 or 2, applies to whitening and is for tests and benchmarks. The default is 1 on CUDA and 2 on the CPU,
    where the interpreter runs one program after another, so that several cannot synchronize.
    """
    rows, columns = rewards.shape
    dtype = common_dtype(rewards, values, bootstrap)
    advantages = torch.empty(rows, columns, dtype=dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    if not advantages.numel():
        return advantages, returns
    on_cuda = rewards.device.type == "cuda"
    if launches is None:
        launches = 1 if on_cuda or not whiten else 2
    programs = min(rows, _resident_programs(rewards.device)) if whiten else rows
    partials = torch.empty(3, programs if whiten else 0, dtype=dtype, device=rewards.device)
    arrived = _arrival_counter(rewards.device) if whiten and launches == 1 else None
    block = min(_BLOCK, triton.next_power_of_2(columns))

    with torch.cuda.device_of(rewards):
        for phase in [_ALL] if launches == 1 else [_STATISTICS, _WHITEN]:
            _gae_kernel[(programs,)](
                rewards,
                values,
                mask,
                bootstrap,
                advantages,
                returns,
                partials,
                arrived,
                rows,
                columns,
                *rewards.stride(),
                *values.stride(),
                *mask.stride(),
                bootstrap.stride(0) if bootstrap is not None else 0,
                gamma,
                gamma * lam,
                gamma * (1 - lam),
                HAS_BOOTSTRAP=bootstrap is not None,
                WHITEN=whiten,
                PHASE=phase,
                BLOCK=block,
                PARTS=min(_PARTS, triton.next_power_of_2(programs)) if whiten else 1,
                num_warps=max(1, min(_WARPS, block // 128)),
                **(dict(launch_cooperative_grid=True, maxnreg=_REGISTERS) if on_cuda and arrived is not None else {}),
            )
    return advantages, returns


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def _arrival_counter(device: torch.device) -> Tensor:
    """Return an int64 counter with which the programs of a launch synchronize; its initial value does not matter.

    Cached per stream, whose launches never overlap. A captured graph may be replayed on another stream, so it gets its
    own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    place = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if place not in _arrivals:
        _arrivals[place] = torch.zeros(1, dtype=torch.int64, device=device)
    return _arrivals[place]


@triton.jit
def _composed(slope, offset, next_slope, next_offset):
    """Return the composition x -> next_slope * (slope * x + offset) + next_offset."""
    return slope * next_slope, next_slope * offset + next_offset


@triton.jit
def _wait_for_all(arrived):
    """Return when every program of the launch has called this.

    Together they add 2^32 to `arrived`: its upper half changes once, by the last of them, and its lower half ends where
    it started.
    """
    tl.debug_barrier()  # all threads of this program have written
    programs = tl.num_programs(0).to(tl.int64)
    first = (tl.program_id(0) == 0).to(tl.int64)
    seen = tl.atomic_add(arrived, 1 + first * (4294967296 - programs), sem="acq_rel")
    now = seen
    while (now >> 32) == (seen >> 32):
        now = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _gae_kernel(
    rewards,
    values,
    mask,
    bootstrap,
    advantages,
    returns,
    partials,  # (3, programs): count, mean, sum of squared distances from it
    arrived,
    rows,
    columns,
    rewards_row_stride,
    rewards_stride,
    values_row_stride,
    values_stride,
    mask_row_stride,
    mask_stride,
    bootstrap_stride,
    gamma: tl.float64,
    decay: tl.float64,  # gamma * lam
    value_share: tl.float64,  # gamma * (1 - lam)
    HAS_BOOTSTRAP: tl.constexpr,
    WHITEN: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    number = advantages.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    gamma, decay, value_share = tl.full((), gamma, number), tl.full((), decay, number), tl.full((), value_share, number)

    if PHASE != 2:
        count = tl.zeros((), number)
        mean = tl.zeros((), number)
        squares = tl.zeros((), number)
        for index in range(program, rows, programs):
            row = tl.cast(index, tl.int64)
            carried = tl.zeros((), number)  # u of the block to the right
            if HAS_BOOTSTRAP:
                carried += gamma * tl.load(bootstrap + row * bootstrap_stride).to(number)
            for block in range(0, tl.cdiv(columns, BLOCK)):
                t = columns - 1 - block * BLOCK - lanes  # back to front
                t = t.to(tl.int64)
                inside = t >= 0
                here = tl.load(mask + row * mask_row_stride + t * mask_stride, mask=inside, other=0) != 0
                reward = tl.load(rewards + row * rewards_row_stride + t * rewards_stride, mask=here, other=0.0)
                value = tl.load(values + row * values_row_stride + t * values_stride, mask=here, other=0.0)
                # The scan is shifted by one column to the right, because a return needs u of the next column. The first
                # lane is beyond the block, whose u is `carried`: its map is the identity.
                s = t + 1
                shifted = inside & (lanes > 0)
                there = tl.load(mask + row * mask_row_stride + s * mask_stride, mask=shifted, other=0) != 0
                next_reward = tl.load(rewards + row * rewards_row_stride + s * rewards_stride, mask=there, other=0.0)
                next_value = tl.load(values + row * values_row_stride + s * values_stride, mask=there, other=0.0)
                offset = tl.where(there, value_share * next_value.to(number) + decay * next_reward.to(number), 0.0)
                slope = tl.where(there, decay, tl.full((), 1.0, number))
                slope, offset = tl.associative_scan((slope, offset), 0, _composed)
                later = slope * carried + offset
                gained = reward.to(number) + later
                advantage = tl.where(here, gained - value.to(number), 0.0)
                place = row * columns + t
                tl.store(returns + place, tl.where(here, gained, 0.0), mask=inside)
                tl.store(advantages + place, advantage, mask=inside)
                # u of the first column of this block, which is the last lane.
                u = tl.where(here, value_share * value.to(number) + decay * gained, later)
                carried = tl.sum(tl.where(lanes == BLOCK - 1, u, 0.0), 0)
                if WHITEN:
                    here_count = tl.sum(here.to(number), 0)
                    here_mean = tl.sum(advantage, 0) / tl.maximum(here_count, 1.0)
                    distance = tl.where(here, advantage - here_mean, 0.0)
                    total = count + here_count
                    gap = here_mean - mean
                    share = here_count / tl.maximum(total, 1.0)
                    squares += tl.sum(distance * distance, 0) + gap * gap * count * share
                    mean += gap * share
                    count = total
        if WHITEN:
            tl.store(partials + program, count)
            tl.store(partials + programs + program, mean)
            tl.store(partials + 2 * programs + program, squares)

    if WHITEN and PHASE == 0:
        _wait_for_all(arrived)

    if WHITEN and PHASE != 1:
        total = tl.zeros((), number)
        weighted = tl.zeros((), number)
        for start in range(0, programs, PARTS):
            part = start + tl.arange(0, PARTS)
            counts = tl.load(partials + part, mask=part < programs, other=0.0)
            means = tl.load(partials + programs + part, mask=part < programs, other=0.0)
            total += tl.sum(counts, 0)
            weighted += tl.sum(counts * means, 0)
        total = tl.maximum(total, 1.0)
        centre = weighted / total
        spread = tl.zeros((), number)
        for start in range(0, programs, PARTS):
            part = start + tl.arange(0, PARTS)
            counts = tl.load(partials + part, mask=part < programs, other=0.0)
            means = tl.load(partials + programs + part, mask=part < programs, other=0.0)
            squares_of = tl.load(partials + 2 * programs + part, mask=part < programs, other=0.0)
            spread += tl.sum(squares_of + counts * (means - centre) * (means - centre), 0)
        scale = 1.0 / tl.sqrt(spread / total + 1e-8)
        for index in range(program, rows, programs):
            row = tl.cast(index, tl.int64)
            for block in range(0, tl.cdiv(columns, BLOCK)):
                t = columns - 1 - block * BLOCK - lanes
                t = t.to(tl.int64)
                inside = t >= 0
                here = tl.load(mask + row * mask_row_stride + t * mask_stride, mask=inside, other=0) != 0
                place = advantages + row * columns + t
                advantage = tl.load(place, mask=here, other=0.0)
                tl.store(place, (advantage - centre) * scale, mask=here)
