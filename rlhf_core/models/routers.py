"""The load-balancing loss of a mixture of experts, computed from the router logits of an ordinary forward."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def has_router_loss(model: PreTrainedModel) -> bool:
    """Return whether the model's family defines a load-balancing loss, as mixtures of experts do."""
    return _family_loss(model) is not None


def load_balancing_loss(model: PreTrainedModel, output: Any, attention_mask: Tensor | None) -> Tensor:
    """Return the load-balancing loss of one forward, a scalar with gradient, as the model's family defines it.

    Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6): the number of experts times the sum over
    experts of the share of tokens routed to the expert times the mean probability of routing a token to it. Real tokens
    count, and a prompt shared by several completions counts once.

    Args:
        output: of the model or its trunk, called with `output_router_logits=True`.
        attention_mask: (B, L), 1 = real token; None where there is no padding.

    Raises:
        ValueError: for a model without such a loss.
    """
    loss = _family_loss(model)
    if loss is None or not getattr(output, "router_logits", None):
        raise ValueError(
            f"router_loss=True: {type(model).__name__} has no load-balancing loss; expected a mixture of experts"
        )
    balance: Tensor = loss(output.router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return balance


def _family_loss(model: PreTrainedModel) -> Any:
    """transformers' `load_balancing_loss_func` of the module that defines the model's class; None if it has none."""
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
