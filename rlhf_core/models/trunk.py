"""Run a model on a `PackedBatch` in a given layout, and select rows of the result.

*Packed* runs the stream as it is. *Padded* runs one right-padded row per sequence, for models that do not support the
stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch, PaddedBatch
from rlhf_core.models.attention import packed_forward
from rlhf_core.models.routers import load_balancing_loss

Rows = Literal["predict", "own", "last"]
"""Which rows to select: those that predict a completion token, the completion tokens themselves, the last of each."""


class States(NamedTuple):
    """Last hidden states of selected rows, and the router loss of the forward."""

    states: Tensor  # (R, H)
    router_loss: Tensor | None  # scalar; None unless requested


class OwnLogits(NamedTuple):
    """Logits of the model's own forward in the rows that predict completion tokens."""

    logits: Tensor  # (M, V)
    states: Tensor | None  # (M, H); None unless requested
    router_loss: Tensor | None  # scalar; None unless requested


def trunk_states(
    model: PreTrainedModel,
    batch: PackedBatch,
    layout: Literal["packed", "padded"],
    rows: Rows,
    *,
    router_loss: bool = False,
) -> States:
    """Run the model's trunk and return its last hidden states in the selected rows."""
    trunk = trunk_of(model)
    routers = {"output_router_logits": True} if router_loss else {}
    if layout == "packed":
        with packed_forward():
            output = trunk(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                layout=batch.layout,
                use_cache=False,
                **routers,
            )
        states, attention_mask = output.last_hidden_state[0], None
        selected = _select(batch, batch, rows)
    else:
        padded = batch.padded()
        attention_mask = padded.attention_mask
        output = trunk(input_ids=padded.input_ids, attention_mask=attention_mask, use_cache=False, **routers)
        states, selected = output.last_hidden_state.flatten(0, 1), _select(batch, padded, rows)
    balance = load_balancing_loss(model, output, attention_mask) if router_loss else None
    return States(states.index_select(0, selected), balance)


def own_logits(
    model: PreTrainedModel, batch: PackedBatch, *, with_states: bool = False, router_loss: bool = False
) -> OwnLogits:
    """Run the model's own padded forward, head included: the definition that every faster way is compared with."""
    padded = batch.padded()
    output = model(
        input_ids=padded.input_ids,
        attention_mask=padded.attention_mask,
        output_hidden_states=with_states,
        use_cache=False,
        **({"output_router_logits": True} if router_loss else {}),
    )
    return OwnLogits(
        logits=output.logits.flatten(0, 1).index_select(0, padded.predict_rows),
        states=output.hidden_states[-1].flatten(0, 1).index_select(0, padded.predict_rows) if with_states else None,
        router_loss=load_balancing_loss(model, output, padded.attention_mask) if router_loss else None,
    )


def _select(batch: PackedBatch, layout: PackedBatch | PaddedBatch, rows: Rows) -> Tensor:
    """Return the indices of the selected rows in the stream or in the flattened padded batch: (M,), or (B,) of last."""
    if rows == "predict":
        return layout.predict_rows
    if rows == "last":
        return layout.last_rows
    # A completion token's own row predicts the token after it; the last token's row predicts none.
    lasts = batch.completion_mask.sum(-1).cumsum(0) - 1
    return layout.predict_rows.roll(-1).index_copy(0, lasts, layout.last_rows)


def trunk_of(model: PreTrainedModel) -> Any:
    """Return the transformer under the head(s)."""
    return model.base_model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set the models to evaluation mode inside, and restore each submodule's own mode afterwards."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
