"""GAE in one launch of Triton: a program walks its rows from the last block of columns to the first.

The recursion is that of torch_path.py, an affine map a column; inside a block of columns the maps are composed by an
associative scan, and from block to block one number a row is carried. Columns are loaded back to front and scanned
forward, as scanning in reverse has been reported to go wrong for maps that do not commute.

Whitening needs every row. Each program leaves count, mean and sum of squared distances of its advantages; when all
have, each combines all of these in the same order and whitens its own rows. On a GPU the programs wait for one another
inside the launch, which is then a cooperative one (all of them resident, or the launch fails: no deadlock).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.gae.reference import common_dtype

_BLOCK, _WARPS = 1024, 8
# Programs a multiprocessor that wait for one another: four of eight warps with this many registers a thread always fit.
_RESIDENT, _REGISTERS = 4, 64
_PARTS = 1024  # partial statistics that are combined at a time

_ALL, _STATISTICS, _WHITEN = 0, 1, 2  # what a launch does: everything, or one half of it

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
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.gae` on CUDA, or on the CPU under Triton's interpreter.

    `launches` 1 or 2 and the number of `programs` concern whitening alone, and are for tests and benchmarks: one launch
    by default, two on the CPU, where the interpreter runs one program after another and several cannot wait.
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
    if programs is None:
        programs = rows if not whiten else min(rows, _resident_programs(rewards.device))
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
    """One int64 in which the programs of a launch count one another; any value is a good one to begin with.

    Kept for each stream, whose launches never overlap, to spare every call the filling of a new one. A captured graph
    may be replayed beside the stream it was captured on, so it gets its own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    place = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if place not in _arrivals:
        _arrivals[place] = torch.zeros(1, dtype=torch.int64, device=device)
    return _arrivals[place]


@triton.jit
def _composed(slope, offset, next_slope, next_offset):
    """x -> next_slope * (slope * x + offset) + next_offset."""
    return slope * next_slope, next_slope * offset + next_offset


@triton.jit
def _wait_for_all(arrived):
    """Return when every program of the launch has come here.

    Together they add 2^32 to `arrived`: its upper half moves once, with the last of them, and the lower half ends where
    it began.
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
            handed_on = tl.zeros((), number)  # u of the block to the right
            if HAS_BOOTSTRAP:
                handed_on += gamma * tl.load(bootstrap + row * bootstrap_stride).to(number)
            for block in range(0, tl.cdiv(columns, BLOCK)):
                t = columns - 1 - block * BLOCK - lanes  # back to front
                t = t.to(tl.int64)
                inside = t >= 0
                here = tl.load(mask + row * mask_row_stride + t * mask_stride, mask=inside, other=0) != 0
                reward = tl.load(rewards + row * rewards_row_stride + t * rewards_stride, mask=here, other=0.0)
                value = tl.load(values + row * values_row_stride + t * values_stride, mask=here, other=0.0)
                # The scan runs one column to the right of what it serves, since a return takes u of the next column.
                # The first lane stands beyond the block, whose u is `handed_on`: its map changes nothing.
                s = t + 1
                later = inside & (lanes > 0)
                there = tl.load(mask + row * mask_row_stride + s * mask_stride, mask=later, other=0) != 0
                pay = tl.load(rewards + row * rewards_row_stride + s * rewards_stride, mask=there, other=0.0)
                worth = tl.load(values + row * values_row_stride + s * values_stride, mask=there, other=0.0)
                offset = tl.where(there, value_share * worth.to(number) + decay * pay.to(number), 0.0)
                slope = tl.where(there, decay, tl.full((), 1.0, number))
                slope, offset = tl.associative_scan((slope, offset), 0, _composed)
                handed = slope * handed_on + offset
                gained = reward.to(number) + handed
                advantage = tl.where(here, gained - value.to(number), 0.0)
                place = row * columns + t
                tl.store(returns + place, tl.where(here, gained, 0.0), mask=inside)
                tl.store(advantages + place, advantage, mask=inside)
                # u of this block's own first column, the last lane's.
                mine = tl.where(here, value_share * value.to(number) + decay * gained, handed)
                handed_on = tl.sum(tl.where(lanes == BLOCK - 1, mine, 0.0), 0)
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
