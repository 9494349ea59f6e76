"""The same work by others, each imported when it is asked for. A function returns the contestant, or raises."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax in float32, of which one entry a row is kept."""
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None]).squeeze(-1)


def eager_kl(policy: Tensor, reference: Tensor) -> Tensor:
    p, q = (torch.log_softmax(x.float(), -1) for x in (policy, reference))
    return (p.exp() * (p - q)).sum(-1)


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return eager_logprobs(hidden @ weight.T, targets)


def eager_linear_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    return eager_kl(hidden @ weight.T, ref_hidden @ ref_weight.T)


def liger_logprobs() -> Callable:
    """Forward only; it scores all but the last row of (1, rows, V) logits."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda logits, targets: fused_selective_log_softmax(logits[None], targets[None], temperature=1.0)


def trl_logprobs() -> Callable:
    """With the entropy, which it always computes."""
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda logits, targets: selective_log_softmax_and_entropy(logits, targets)[0]


def liger_kl() -> Callable:
    """It takes log-probs, so the two log_softmax are part of the work."""
    from liger_kernel.transformers.functional import liger_kl_div

    def run(policy: Tensor, reference: Tensor) -> Tensor:
        p, q = (torch.log_softmax(x, -1) for x in (policy, reference))
        return liger_kl_div(q, p, reduction="batchmean", log_target=True)  # KL of the second argument from the first

    return run


def trl_linear_logprobs() -> Callable:
    """At the setting of TRL's trainers: tiles of 32,768 columns, no output but the log-probs."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        columns = min(32_768, len(weight))
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, columns, None, 1.0, ())[0]

    return run


def liger_linear_logprobs() -> Callable:
    """Its fastest: the mean over rows, whose gradient it makes in the forward. It cannot weight the rows so."""
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
    """A generalised Jensen-Shannon divergence, at the end that is the reverse KL."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda hidden, weight, ref_hidden, ref_weight: liger_fused_linear_jsd(
        hidden, weight, ref_hidden, ref_weight, jsd_beta=1.0
    )
