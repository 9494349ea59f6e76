"""The same operations in other libraries, imported on use. Each function returns a contestant, or raises an error."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log_softmax in float32 and gather one entry per row."""
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None]).squeeze(-1)


def eager_kl(policy: Tensor, reference: Tensor) -> Tensor:
    p, q = (torch.log_softmax(x.float(), -1) for x in (policy, reference))
    return (p.exp() * (p - q)).sum(-1)


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return eager_logprobs(hidden @ weight.T, targets)


def eager_linear_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    return eager_kl(hidden @ weight.T, ref_hidden @ ref_weight.T)


def liger_logprobs() -> Callable:
    """Forward only; it ignores the last row of (1, rows, V) logits."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda logits, targets: fused_selective_log_softmax(logits[None], targets[None], temperature=1.0)


def trl_logprobs() -> Callable:
    """With the entropy, which it always computes."""
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda logits, targets: selective_log_softmax_and_entropy(logits, targets)[0]


def liger_kl() -> Callable:
    """It takes log-probs, so two log_softmax are part of the time."""
    from liger_kernel.transformers.functional import liger_kl_div

    def run(policy: Tensor, reference: Tensor) -> Tensor:
        p, q = (torch.log_softmax(x, -1) for x in (policy, reference))
        return liger_kl_div(q, p, reduction="batchmean", log_target=True)  # KL of the second argument from the first

    return run


def trl_linear_logprobs() -> Callable:
    """With the setting of TRL's trainers: tiles of 32,768 columns, only log-probs."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        columns = min(32_768, len(weight))
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, columns, None, 1.0, ())[0]

    return run


def liger_linear_logprobs() -> Callable:
    """Its fastest: the mean over rows, with the gradient computed in the forward. It does not support row weights."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = liger_fused_linear_cross_entropy(hidden, weight, targets)
        return result if isinstance(result, Tensor) else result[0]

    return run


def torch_linear_logprobs() -> Callable:
    options = torch.nn.modules.linear_cross_entropy_options.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, options=options)


def trl_linear_kl() -> Callable:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]

    return run


def liger_linear_kl() -> Callable:
    """The generalised Jensen-Shannon divergence with beta = 1, which is the reverse KL."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda hidden, weight, ref_hidden, ref_weight: liger_fused_linear_jsd(
        hidden, weight, ref_hidden, ref_weight, jsd_beta=1.0
    )
