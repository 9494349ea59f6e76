"""rlhf_core's DPO step, in the public calls that the README shows."""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from child import TimedStep, serve
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core import load_policy, load_reference, pair_logprobs, preference_loss, token_logprobs
from rlhf_core.batch import PackedBatch
from rlhf_core.losses.pairs import Pairs


def build(args: argparse.Namespace) -> TimedStep:
    policy, _ = load_policy(args.folder / "policy", device="cpu", gradient_checkpointing=args.checkpointing)
    reference = load_reference(args.folder / "reference", device="cpu")
    pairs = json.loads((args.folder / "pairs.json").read_text())
    batch = PackedBatch.pack([(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs])
    loss = partial(dpo_loss, policy, reference, batch, beta=args.beta)
    if args.cached_reference:
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, batch)
        loss = partial(cached_dpo_loss, policy, ref_logprobs, batch, beta=args.beta)
    return TimedStep(policy, loss, positions=batch.num_tokens, models=[policy, reference])


def dpo_loss(policy: PreTrainedModel, reference: PreTrainedModel, batch: PackedBatch, *, beta: float) -> Tensor:
    return preference_loss("sigmoid", pair_logprobs(policy, reference, batch), beta=beta)[0]


def cached_dpo_loss(policy: PreTrainedModel, ref_logprobs: Tensor, batch: PackedBatch, *, beta: float) -> Tensor:
    pairs = Pairs.interleaved(token_logprobs(policy, batch), batch.loss_mask, ref_logprobs=ref_logprobs)
    return preference_loss("sigmoid", pairs, beta=beta)[0]


if __name__ == "__main__":
    serve(build)
