from rlhf_kernels.linear_logprobs.chunked import linear_logprobs

__all__ = ["linear_logprobs"]
