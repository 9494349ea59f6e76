"""The load-balancing loss of a mixture of experts, read off the routers of a model's ordinary forward.

    with router_loss(policy, coef) as router:
        loss, logprobs = summed_loss(policy, batch, ...)
    (loss + router.term(share)).backward()

The loss is the family's own (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6): the number of
experts times the sum over experts of the share of tokens sent there and the mean probability of sending one. It counts
the tokens that went through the model: real ones, a shared prompt once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class RouterLoss:
    """What the routers of one model said inside `router_loss`."""

    def __init__(self, model: nn.Module, coef: float):
        self.model, self.coef, self._values = model, coef, []

    @property
    def value(self) -> Tensor:
        """The load-balancing loss, the mean over the forwards seen; 0 where it is not asked for."""
        return torch.stack(self._values).mean() if self._values else torch.zeros(())

    def term(self, share: float | Tensor = 1.0) -> Tensor | float:
        """What to add to the loss of a micro-batch that is this share of its step."""
        return self.coef * share * self.value if self._values else 0.0

    def note(self, output: Any, attention_mask: Tensor | None) -> None:
        """Take in what a forward returned; `attention_mask` (B, L) tells real tokens from padding, if there is any."""
        balance = getattr(sys.modules[type(self.model).__module__], "load_balancing_loss_func", None)
        if balance is None or not getattr(output, "router_logits", None):
            raise ValueError(
                f"router_aux_coef={self.coef}: {type(self.model).__name__} has no load-balancing loss; expected a "
                "mixture of experts, or 0"
            )
        options = self.model.num_experts, self.model.num_experts_per_tok, attention_mask
        self._values.append(balance(output.router_logits, *options))


_watching: ContextVar[RouterLoss | None] = ContextVar("rlhf_core_router_loss", default=None)


@contextlib.contextmanager
def router_loss(model: nn.Module, coef: float) -> Iterator[RouterLoss]:
    """Inside, the model's forwards also give their routers' balance; with a coefficient of 0 nothing is asked.

    Raises ValueError at the forward of a model that has no such loss.
    """
    watch = RouterLoss(model, coef)
    token = _watching.set(watch if coef else None)
    try:
        yield watch
    finally:
        _watching.reset(token)


def watch_of(model: nn.Module) -> RouterLoss | None:
    """Who wants to know about the forwards of this very model, if anybody."""
    watch = _watching.get()
    return watch if watch is not None and watch.model is model else None
