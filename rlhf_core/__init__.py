"""RLHF from scratch in PyTorch, on Hugging Face model weights. Names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "bradley_terry_loss": "rlhf_core.losses.reward",
    "Completions": "rlhf_core.losses.pairs",
    "DataConfig": "rlhf_core.config",
    "entropy_bonus": "rlhf_core.losses.policy",
    "evaluating": "rlhf_core.models.forward",
    "Experience": "rlhf_core.rollout.experience",
    "gae": "rlhf_core.ops.advantages",
    "group_advantages": "rlhf_core.ops.advantages",
    "importance_weights": "rlhf_core.losses.policy",
    "kl_estimate": "rlhf_core.ops.kl",
    "kl_loss": "rlhf_core.losses.policy",
    "kl_penalty": "rlhf_core.ops.kl",
    "load_examples": "rlhf_core.data.loader",
    "load_policy": "rlhf_core.models.load",
    "load_reference": "rlhf_core.models.load",
    "load_reward_model": "rlhf_core.models.load",
    "load_value_model": "rlhf_core.models.load",
    "LoraConfig": "rlhf_core.config",
    "masked_mean": "rlhf_core.ops.masked",
    "masked_whiten": "rlhf_core.ops.masked",
    "PackedBatch": "rlhf_core.batch",
    "pair_logprobs": "rlhf_core.models.forward",
    "Pairs": "rlhf_core.losses.pairs",
    "plackett_luce_loss": "rlhf_core.losses.reward",
    "policy_loss": "rlhf_core.losses.policy",
    "policy_outputs": "rlhf_core.models.forward",
    "preference_batches": "rlhf_core.data.loader",
    "preference_loss": "rlhf_core.losses.preference",
    "prepare": "rlhf_core.models.forward",
    "process_reward_loss": "rlhf_core.losses.reward",
    "ranked_preference_loss": "rlhf_core.losses.preference",
    "register_policy_loss": "rlhf_core.losses.policy",
    "register_preference_loss": "rlhf_core.losses.preference",
    "rloo_advantages": "rlhf_core.ops.advantages",
    "sample": "rlhf_core.rollout.sampling",
    "save_model": "rlhf_core.models.load",
    "sequence_scores": "rlhf_core.models.forward",
    "sft_loss": "rlhf_core.losses.sft",
    "stop_ids": "rlhf_core.data.tokenize",
    "summed_loss": "rlhf_core.models.forward",
    "token_logprobs": "rlhf_core.models.forward",
    "token_scores": "rlhf_core.models.forward",
    "token_values": "rlhf_core.models.forward",
    "unpaired_preference_loss": "rlhf_core.losses.preference",
    "value_loss": "rlhf_core.losses.value",
    "ValueHead": "rlhf_core.models.heads",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # for editors and type checkers
    from rlhf_core.batch import PackedBatch as PackedBatch
    from rlhf_core.config import DataConfig as DataConfig
    from rlhf_core.config import LoraConfig as LoraConfig
    from rlhf_core.data.loader import load_examples as load_examples
    from rlhf_core.data.loader import preference_batches as preference_batches
    from rlhf_core.data.tokenize import stop_ids as stop_ids
    from rlhf_core.losses.pairs import Completions as Completions
    from rlhf_core.losses.pairs import Pairs as Pairs
    from rlhf_core.losses.policy import entropy_bonus as entropy_bonus
    from rlhf_core.losses.policy import importance_weights as importance_weights
    from rlhf_core.losses.policy import kl_loss as kl_loss
    from rlhf_core.losses.policy import policy_loss as policy_loss
    from rlhf_core.losses.policy import register_policy_loss as register_policy_loss
    from rlhf_core.losses.preference import preference_loss as preference_loss
    from rlhf_core.losses.preference import ranked_preference_loss as ranked_preference_loss
    from rlhf_core.losses.preference import register_preference_loss as register_preference_loss
    from rlhf_core.losses.preference import unpaired_preference_loss as unpaired_preference_loss
    from rlhf_core.losses.reward import bradley_terry_loss as bradley_terry_loss
    from rlhf_core.losses.reward import plackett_luce_loss as plackett_luce_loss
    from rlhf_core.losses.reward import process_reward_loss as process_reward_loss
    from rlhf_core.losses.sft import sft_loss as sft_loss
    from rlhf_core.losses.value import value_loss as value_loss
    from rlhf_core.models.forward import evaluating as evaluating
    from rlhf_core.models.forward import pair_logprobs as pair_logprobs
    from rlhf_core.models.forward import policy_outputs as policy_outputs
    from rlhf_core.models.forward import prepare as prepare
    from rlhf_core.models.forward import sequence_scores as sequence_scores
    from rlhf_core.models.forward import summed_loss as summed_loss
    from rlhf_core.models.forward import token_logprobs as token_logprobs
    from rlhf_core.models.forward import token_scores as token_scores
    from rlhf_core.models.forward import token_values as token_values
    from rlhf_core.models.heads import ValueHead as ValueHead
    from rlhf_core.models.load import load_policy as load_policy
    from rlhf_core.models.load import load_reference as load_reference
    from rlhf_core.models.load import load_reward_model as load_reward_model
    from rlhf_core.models.load import load_value_model as load_value_model
    from rlhf_core.models.load import save_model as save_model
    from rlhf_core.ops.advantages import gae as gae
    from rlhf_core.ops.advantages import group_advantages as group_advantages
    from rlhf_core.ops.advantages import rloo_advantages as rloo_advantages
    from rlhf_core.ops.kl import kl_estimate as kl_estimate
    from rlhf_core.ops.kl import kl_penalty as kl_penalty
    from rlhf_core.ops.masked import masked_mean as masked_mean
    from rlhf_core.ops.masked import masked_whiten as masked_whiten
    from rlhf_core.rollout.experience import Experience as Experience
    from rlhf_core.rollout.sampling import sample as sample


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
