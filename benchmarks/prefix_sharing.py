"""Time saved in a DPO step by computing a prompt once for two completions (forward and backward, with a reference).

    python benchmarks/prefix_sharing.py [--quick]

One row per shape: `shared` computes the prompt once, `apart` repeats it for each completion, `auto` chooses. The ratio
is the time of `apart` over that of `auto`; the target is 0.97 or more where prompts are short. In rows where `auto`
does not share, both do the same work: their distance from 1 is the noise of the machine.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Literal

import torch
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.losses.preference import preference_loss
from rlhf_core.models.forward import pair_logprobs, prepare
from rlhf_core.models.load import freeze

SHAPES = [
    (4, 128),
    (8, 64),
    (16, 64),
    (16, 256),
    (32, 128),
    (32, 256),
    (64, 256),
    (64, 64),
    (128, 64),
    (300, 100),
    (500, 50),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only check that it works: one shape, timed once")
    quick = parser.parse_args().quick
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, 8 pairs, vocabulary 8,000")
    print(f"{'hidden':>7}{'prompt':>8}{'completion':>12}{'apart s':>10}{'shared s':>10}{'auto s':>9}{'apart/auto':>12}")
    for hidden in (64,) if quick else (64, 256):
        policy, reference = model(hidden), freeze(model(hidden))
        for prompt, completion in SHAPES[: 1 if quick else None]:
            pairs = random_pairs(prompt, completion)
            sides = {
                name: partial(step, policy, reference, pairs, share)
                for name, share in (("apart", False), ("shared", True), ("auto", "auto"))
            }
            seconds = interleaved(sides, repeats=1 if quick else 9)
            print(
                f"{hidden:>7}{prompt:>8}{completion:>12}{seconds['apart']:>10.3f}{seconds['shared']:>10.3f}"
                f"{seconds['auto']:>9.3f}{seconds['apart'] / seconds['auto']:>12.2f}",
                flush=True,
            )


def random_pairs(prompt: int, completion: int) -> list[tuple[list[int], list[list[int]]]]:
    """Return 8 prompts of random tokens, each with a completion of `completion` tokens and one of three quarters."""
    generator = torch.Generator().manual_seed(0)
    lengths = (prompt, completion, completion - completion // 4)
    rows = ([torch.randint(3, 8000, (length,), generator=generator).tolist() for length in lengths] for _ in range(8))
    return [(first, [second, third]) for first, second, third in rows]


def step(policy: PreTrainedModel, reference: PreTrainedModel, pairs: list, share: bool | Literal["auto"]) -> None:
    """Compute the DPO loss of all pairs and its gradient."""
    batch = PackedBatch.pack(pairs, share=share)
    preference_loss("sigmoid", pair_logprobs(policy, reference, batch))[0].backward()
    policy.zero_grad()


def model(hidden: int) -> PreTrainedModel:
    """Return a random Llama of four layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return prepare(LlamaForCausalLM(config))


if __name__ == "__main__":
    main()
