"""RLHF from scratch in PyTorch, on Hugging Face model weights. Names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "PackedBatch": "rlhf_core.batch",
    "bradley_terry_loss": "rlhf_core.losses.reward",
    "gae": "rlhf_core.ops.advantages",
    "kl_loss": "rlhf_core.losses.policy",
    "load_policy": "rlhf_core.models.load",
    "load_reference": "rlhf_core.models.load",
    "load_reward_model": "rlhf_core.models.load",
    "load_value_model": "rlhf_core.models.load",
    "pair_logprobs": "rlhf_core.models.forward",
    "policy_loss": "rlhf_core.losses.policy",
    "plackett_luce_loss": "rlhf_core.losses.reward",
    "policy_outputs": "rlhf_core.models.forward",
    "preference_batches": "rlhf_core.data.loader",
    "preference_loss": "rlhf_core.losses.preference",
    "process_reward_loss": "rlhf_core.losses.reward",
    "ranked_preference_loss": "rlhf_core.losses.preference",
    "sample": "rlhf_core.rollout.sampling",
    "save_model": "rlhf_core.models.load",
    "sequence_scores": "rlhf_core.models.forward",
    "sft_loss": "rlhf_core.losses.sft",
    "token_logprobs": "rlhf_core.models.forward",
    "token_values": "rlhf_core.models.forward",
    "unpaired_preference_loss": "rlhf_core.losses.preference",
    "value_loss": "rlhf_core.losses.value",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # for editors and type checkers
    from rlhf_core.batch import PackedBatch as PackedBatch
    from rlhf_core.data.loader import preference_batches as preference_batches
    from rlhf_core.losses.policy import kl_loss as kl_loss
    from rlhf_core.losses.policy import policy_loss as policy_loss
    from rlhf_core.losses.preference import preference_loss as preference_loss
    from rlhf_core.losses.preference import ranked_preference_loss as ranked_preference_loss
    from rlhf_core.losses.preference import unpaired_preference_loss as unpaired_preference_loss
    from rlhf_core.losses.reward import bradley_terry_loss as bradley_terry_loss
    from rlhf_core.losses.reward import plackett_luce_loss as plackett_luce_loss
    from rlhf_core.losses.reward import process_reward_loss as process_reward_loss
    from rlhf_core.losses.sft import sft_loss as sft_loss
    from rlhf_core.losses.value import value_loss as value_loss
    from rlhf_core.models.forward import pair_logprobs as pair_logprobs
    from rlhf_core.models.forward import policy_outputs as policy_outputs
    from rlhf_core.models.forward import sequence_scores as sequence_scores
    from rlhf_core.models.forward import token_logprobs as token_logprobs
    from rlhf_core.models.forward import token_values as token_values
    from rlhf_core.models.load import load_policy as load_policy
    from rlhf_core.models.load import load_reference as load_reference
    from rlhf_core.models.load import load_reward_model as load_reward_model
    from rlhf_core.models.load import load_value_model as load_value_model
    from rlhf_core.models.load import save_model as save_model
    from rlhf_core.ops.advantages import gae as gae
    from rlhf_core.rollout.sampling import sample as sample


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES])
