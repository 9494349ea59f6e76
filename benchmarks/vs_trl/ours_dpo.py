"""rlhf_core's DPO step, in the public calls that the README shows."""

from __future__ import annotations

import argparse
import json

import torch
from child import Contestant, serve

from rlhf_core import load_policy, load_reference, pair_logprobs, preference_loss
from rlhf_core.batch import PackedBatch


def build(args: argparse.Namespace) -> Contestant:
    policy, _ = load_policy(args.folder / "policy", device="cpu", gradient_checkpointing=args.checkpointing)
    reference = load_reference(args.folder / "reference", device="cpu")
    pairs = json.loads((args.folder / "pairs.json").read_text())
    batch = PackedBatch.pack([(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs])

    live_reference, cached = reference, {}
    if args.cached_reference:
        with torch.no_grad():
            by_reference = pair_logprobs(reference, None, batch)
        cached = {f"ref_{name}": by_reference[name] for name in ("chosen_logprobs", "rejected_logprobs")}
        live_reference = None

    def loss() -> torch.Tensor:
        by_policy = pair_logprobs(policy, live_reference, batch)
        return preference_loss("sigmoid", **by_policy, **cached, beta=args.beta)[0]

    return Contestant(policy, loss, positions=batch.num_tokens, models=[policy, reference])


if __name__ == "__main__":
    serve(build)
