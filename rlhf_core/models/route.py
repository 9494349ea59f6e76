"""How a model is run, found once by a probe when the model is loaded and kept on the model.

The probe runs a small batch packed and padded, and through the fused head and the model's own head, and compares. So a
model for which a faster way would silently give other numbers is run the slower way.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.models.attention import PACKED, packed_forward
from rlhf_core.models.heads import lm_head
from rlhf_core.models.trunk import device_of, evaluating, own_logits, trunk_states
from rlhf_core.ops.logprobs import linear_logprobs, logits_logprobs

Layout = Literal["auto", "packed", "padded"]
Model = TypeVar("Model", bound=PreTrainedModel)
logger = logging.getLogger("rlhf_core.models")


@dataclass(frozen=True)
class Route:
    """How a model is run, kept as `model.rlhf_route`."""

    layout: Literal["packed", "padded"]
    """The layout of every forward."""
    fused_head: bool
    """Whether log-probs come from hidden states by the fused head. If not, the model's own logits are used: its head is
    more than a linear map with a scale and a softcap."""
    packed_fault: str | None = None
    """Why the packed layout is wrong for this model; None where it is right, also if `layout` is padded by request.
    Sampling with a cache of keys and values needs a model without a fault, whatever the layout of its forwards."""


def prepare(model: Model, layout: Layout = "auto") -> Model:
    """Find out how to run the model, keep the result on it as `model.rlhf_route`, and return the model.

    Every `load_*` function calls this last. Call it yourself for a model that you built or changed (new layers, an
    adapter, another head), before it is given to a function of `rlhf_core`. Where the packed layout is right for the
    model, its attention is switched to `rlhf_packed`, which equals sdpa in ordinary forwards.

    Args:
        layout: "auto" falls back to padded with a warning that names the fault, "packed" does not, "padded" is padded
            for any model.

    Raises:
        ValueError: for an unknown layout, and for `layout="packed"` where the model does not support it.
    """
    if layout not in ("auto", "packed", "padded"):
        raise ValueError(f"layout={layout!r}: expected auto, packed or padded")
    route = _probe(model)
    if layout == "packed" and route.packed_fault:
        raise ValueError(
            f"layout='packed': expected auto or padded, because {type(model).__name__} does not support the packed "
            f"layout: {route.packed_fault}"
        )
    if layout == "auto" and route.packed_fault:
        logger.warning("%s runs in the padded layout: %s", type(model).__name__, route.packed_fault)
    if layout == "padded":
        route = Route("padded", route.fused_head, route.packed_fault)
    model.rlhf_route = route
    return model


def route_of(model: PreTrainedModel) -> Route:
    """Return how a prepared model is run.

    Raises:
        ValueError: for a model that was not prepared.
    """
    route: Route | None = vars(model).get("rlhf_route")  # not getattr: a wrapper would return the wrapped model's
    if route is None:
        raise ValueError(
            f"{type(model).__name__} is not prepared: call rlhf_core.prepare(model) once after building or changing a "
            "model (the load_* functions of rlhf_core do so)"
        )
    if route.packed_fault is None and model.config._attn_implementation != PACKED:
        # Changed since `prepare`. With any other attention, each token of the stream would see all tokens before it.
        model.set_attn_implementation(PACKED)
    return route


def forget_route(model: PreTrainedModel) -> None:
    """Remove the result of `prepare`, because the model was changed."""
    vars(model).pop("rlhf_route", None)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Route:
    """Run a small batch in both layouts and through both heads, and compare.

    Leaves the model switched to packed attention where that is right, and otherwise as it was.
    """
    with evaluating(model):
        batch = _probe_batch(model).to(device_of(model))
        padded_states = trunk_states(model, batch, "padded", "predict").states
        fused_head = True
        if model.get_output_embeddings() is not None:
            own, _ = logits_logprobs(own_logits(model, batch).logits, batch.targets)
            head = lm_head(model)
            fused, _ = linear_logprobs(
                padded_states, head.weight, batch.targets, bias=head.bias, scale=head.scale, softcap=head.softcap
            )
            fused_head = _difference(fused[:, None], own[:, None]) <= _tolerance(model)
            # A new adapter on the head changes nothing yet; later it changes every logit.
            fused_head = fused_head and not hasattr(model.get_output_embeddings(), "lora_A")
        fault = _packed_fault(model, batch, padded_states)
        return Route("padded" if fault else "packed", fused_head, fault)


def _packed_fault(model: PreTrainedModel, batch: PackedBatch, padded_states: Tensor) -> str | None:
    """Switch the model to packed attention and compare; on a fault restore its attention and return the fault."""
    config = model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked, which the packed layout does not implement"
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED)
        with packed_forward() as windows:
            states = trunk_states(model, batch, "packed", "predict").states
        difference = _difference(states, padded_states)
        if not windows:
            fault = "the layout reaches none of its layers"
        elif (window := _sliding_window(config)) and window not in windows:
            fault = f"its attention calls do not pass on that its window is {window} tokens"
        elif difference > _tolerance(model):
            fault = f"hidden states differ from the padded forward by {difference:.2g} of their size"
        else:
            return None
    except Exception as error:  # whatever a model raises here, it can still run in the padded layout
        fault = f"{type(error).__name__}: {error}"
    if before not in (None, PACKED):  # set_attn_implementation leaves a failed choice in the config
        model.set_attn_implementation(before)
    return fault


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a layer with a sliding window sees; None where no layer has one."""
    layers = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if layers is None or "sliding_attention" in layers else None


def _probe_batch(model: PreTrainedModel) -> PackedBatch:
    """Return two prompts, with two completions and with one, longer than the model's sliding window if that is small.

    Tokens are drawn by a generator of their own: the global random state does not change.
    """
    window = _sliding_window(model.config.get_text_config()) or 0
    prompt_length = 9 + (window if window <= 64 else 0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, second, third, fourth, fifth = (
        torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (prompt_length, 7, 4, 3, 5)
    )
    return PackedBatch.pack([(first, [second, third]), (fourth, [fifth])], share=True)


def _difference(tensor: Tensor, truth: Tensor) -> float:
    """Return the relative difference of two (rows, columns) tensors in the median column; infinite if not finite.

    Relative to the column, not to the largest entry: trained models have a few columns a hundred times larger than the
    rest, beside which a wrong mask would look like rounding.
    """
    tensor, truth = tensor.float(), truth.float()
    columns = (tensor - truth).norm(dim=0) / truth.norm(dim=0).clamp(min=1e-6)
    return columns.median().item() if columns.isfinite().all() else float("inf")


def _tolerance(model: PreTrainedModel) -> float:
    """Return the relative difference allowed for rounding: far less than a wrong mask or a wrong position causes."""
    return 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2
