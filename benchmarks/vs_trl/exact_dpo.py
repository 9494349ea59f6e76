"""The DPO loss and its gradient by the definition, in float64, one sequence at a time.

It uses the model of transformers and no code of either side. The gradient is written to a file, the loss to stdout as
JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class ExactNorm(nn.Module):
    """`LlamaRMSNorm` in the dtype of its input; the original always computes in float32."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)


def load(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, ExactNorm(module))
    return model


def completion_logprob(model: LlamaForCausalLM, prompt: list[int], completion: list[int]) -> Tensor:
    tokens = torch.tensor([prompt + completion])
    hidden = model.model(tokens, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    logprobs = model.lm_head(hidden).log_softmax(-1)
    return logprobs.gather(-1, tokens[0, len(prompt) :, None]).sum()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("gradient", type=Path)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    policy, reference = load(args.folder / "policy"), load(args.folder / "reference")
    pairs = json.loads((args.folder / "pairs.json").read_text())
    loss, largest_sum = 0.0, 0.0
    for pair in pairs:  # the gradients of the pairs are added
        chosen, rejected = (completion_logprob(policy, pair["prompt"], pair[kind]) for kind in ("chosen", "rejected"))
        with torch.no_grad():
            ref_chosen, ref_rejected = (
                completion_logprob(reference, pair["prompt"], pair[kind]) for kind in ("chosen", "rejected")
            )
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        pair_loss = -nn.functional.logsigmoid(args.beta * margin) / len(pairs)
        pair_loss.backward()
        loss += pair_loss.item()
        largest_sum = max(largest_sum, *(abs(s.item()) for s in (chosen, rejected, ref_chosen, ref_rejected)))

    save_file({name: parameter.grad for name, parameter in policy.named_parameters()}, args.gradient)
    print(json.dumps({"loss": loss, "largest_logprob_sum": largest_sum}))


if __name__ == "__main__":
    main()
