"""Heads on the last hidden states of a trunk: the value head, a classifier's score head, the LM head."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """A value head on the policy's own trunk: V(s) = w . h(s) + b, with w and b initialised to 0.

    With values of 0 the first advantages depend on the rewards only. Weights are float32 whatever the dtype of the
    trunk: returns need more digits than bfloat16 has.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return the values (M,) float32 of hidden states (M, H)."""
        values: Tensor = self.linear(states.to(self.linear.weight.dtype))
        return values.squeeze(-1)

    def detached(self, states: Tensor) -> Tensor:
        """Return the values of (M, H) states, (M,), without a gradient to the states."""
        values: Tensor = self(states.detach())
        return values

    def save(self, folder: str | Path) -> None:
        """Write `value_head.safetensors` into the folder."""
        save_file(self.state_dict(), Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> ValueHead:
        """Read the head that `save` wrote into the folder."""
        state = load_file(Path(folder) / FILE, device=str(device))
        head = cls(state["linear.weight"].shape[1]).to(device)
        head.load_state_dict(state)
        return head


def score_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the linear head that a classifier applies to each state; None where there is none.

    Some token classifiers name it `classifier`. In sequence classifiers a module of that name has further layers.
    """
    other = getattr(model, "classifier", None) if "TokenClassification" in type(model).__name__ else None
    return getattr(model, "score", other)


def score(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the scores (R,) float32 of hidden states (R, H); (R, N) for an ensemble of N heads.

    Raises:
        ValueError: for a model without a score head.
    """
    head = score_head(model)
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no `score` head; load it with load_reward_model or load_value_model"
        )
    scores: Tensor = head(states)
    return scores.squeeze(-1).float()


class LMHead(NamedTuple):
    """An LM head with the scale and the softcap that some families apply to its logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (M, V) of hidden states (M, H), which the fused operations never store as a whole."""
        logits = self.scale * nn.functional.linear(states, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def lm_head(model: PreTrainedModel) -> LMHead:
    """Return the LM head of a causal language model, as its config describes it. `prepare` verifies the description."""
    head, config = model.get_output_embeddings(), model.config
    # Cohere multiplies its logits, Granite and MiniCPM divide them, Gemma caps them.
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(head.weight, getattr(head, "bias", None), scale, softcap)
