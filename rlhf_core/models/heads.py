"""A value head on the policy's own trunk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """V(s) = w . h(s) + b on a trunk's last hidden states. Starts at 0, so the first advantages are the rewards' own.

    Kept in float32 whatever the trunk's dtype: returns are regressed to more digits than bfloat16 has.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(M, H) -> (M,)"""
        return self.linear(states.to(self.linear.weight.dtype)).squeeze(-1)

    def save(self, folder: str | Path) -> None:
        save_file(self.state_dict(), Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> ValueHead:
        state = load_file(Path(folder) / FILE, device=str(device))
        head = cls(state["linear.weight"].shape[1]).to(device)
        head.load_state_dict(state)
        return head
