"""What sharing a prompt between two completions buys in a DPO step (forward and backward, reference included).

One row a shape; `shared` computes the prompt once, `apart` repeats it for each completion, `auto` decides by
itself. The ratio is time apart over time auto; the aim is 0.97 or more where prompts are
short. Rows where auto does not share compute the same twice: how far they are from 1 is the noise of the machine.
"""

from __future__ import annotations

import torch
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.batch import PackedBatch
from rlhf_core.losses.preference import preference_loss
from rlhf_core.models.forward import pair_logprobs
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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, 8 pairs, vocabulary 8,000")
    print(f"{'hidden':>7}{'prompt':>8}{'completion':>12}{'apart s':>10}{'shared s':>10}{'auto s':>9}{'apart/auto':>12}")
    for hidden in (64, 256):
        policy, reference = model(hidden), freeze(model(hidden))
        for prompt, completion in SHAPES:
            generator = torch.Generator().manual_seed(0)

            def draw(length, generator=generator):
                return torch.randint(3, 8000, (length,), generator=generator).tolist()

            pairs = [(draw(prompt), [draw(completion), draw(completion - completion // 4)]) for _ in range(8)]

            def step(share, pairs=pairs, policy=policy, reference=reference):
                batch = PackedBatch.pack(pairs, share=share)
                preference_loss("sigmoid", **pair_logprobs(policy, reference, batch))[0].backward()
                policy.zero_grad()

            seconds = interleaved(
                {"apart": lambda: step(False), "shared": lambda: step(True), "auto": lambda: step("auto")}, repeats=9
            )
            print(
                f"{hidden:>7}{prompt:>8}{completion:>12}{seconds['apart']:>10.3f}{seconds['shared']:>10.3f}"
                f"{seconds['auto']:>9.3f}{seconds['apart'] / seconds['auto']:>12.2f}",
                flush=True,
            )


def model(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
