"""Log-probs of the weights that sampled: from a forward, or as the decoder wrote them down, where these agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_core.batch import PackedBatch
from rlhf_core.config import PolicyGradientConfig
from rlhf_core.losses.policy import importance_weights
from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.rollout.sampling import Rollout
from rlhf_core.rollout.steps import recall
from rlhf_core.training.run import Run

RECORDED_TOLERANCE = 1e-3
"""How far, in nats, a log-prob of the decoder may be from that of the update's own forward: 0.1 % of the ratio."""


class Recorded:
    """Whether what the decoder recorded may stand for a forward: asked once a run, and kept in its checkpoints."""

    def __init__(self, choice: str):
        self.choice, self.good = choice, False if choice == "off" else None

    @property
    def wanted(self) -> bool:
        return self.good is not False

    def state_dict(self) -> dict[str, bool | None]:
        return {"good": self.good}

    def load_state_dict(self, state: dict[str, bool | None]) -> None:
        self.good = state["good"]


def behaviour(
    rollout: Rollout,
    config: PolicyGradientConfig,
    function: Callable[[PackedBatch], PolicyOutputs],
    batches: list[Tensor] | None,
    recorded: Recorded,
    run: Run,
    *,
    whole: bool = False,
) -> PolicyOutputs:
    """Log-probs (B, T) under the weights that sampled, and values if there are any: what `recall` says, asked with the
    same arguments, or what was recorded while decoding (on the CPU), where that was found good.

    In rows that are in none of the `batches`, what was recorded stays. `whole`: the ratio is that of whole completions,
    so their summed log-probs are what is compared.

    Raises ValueError where recorded="on" and the two differ.
    """
    if recorded.good:
        return PolicyOutputs(logprobs=rollout.logprobs, values=rollout.values)
    outputs = recall(rollout, config, function, batches)
    if recorded.good is None:
        rows = slice(None) if batches is None else torch.cat(batches)
        apart = (rollout.logprobs - outputs.logprobs.cpu())[rows]
        gaps = [(apart.sum(-1) if whole else apart).abs().max()]
        if rollout.values is not None:
            values = outputs.values.cpu()
            gaps.append(((rollout.values - values) / values.abs().clamp(min=1))[rows].abs().max())
        gap = torch.stack(gaps).max().item()
        recorded.good = gap <= RECORDED_TOLERANCE  # no NaN is
        if not recorded.good:
            text = f"what was recorded while decoding is {gap:.2g} from a forward, not within {RECORDED_TOLERANCE}"
            if recorded.choice == "on":
                raise ValueError(f"recorded='on': {text}; expected 'off' or 'auto' for this model")
            run.say(f"{run.job}: {text}; log-probs come from forwards")
    return outputs


def engine_weights(
    logprobs: Tensor, rollout: Rollout, rows: Tensor, mask: Tensor, config: PolicyGradientConfig
) -> Tensor | None:
    """(R, T) `importance_weights` of some rows of a rollout, for an engine whose log-probs are not quite a forward's.

    None where the settings ask for none. `logprobs` and `mask`, (R, T), are of those rows, the former from a forward
    of the weights that sampled.
    """
    if config.importance == "none":
        return None
    engine = rollout.logprobs[rows].to(logprobs.device)
    return importance_weights(logprobs, engine, mask, level=config.importance, weight_max=config.importance_max)
