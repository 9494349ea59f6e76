"""Sampling with log-probs and values, against transformers' `generate`, which returns neither: same rows and tokens.

    python benchmarks/sampling.py [--quick]

64 completions of up to 64 tokens: of 64 prompts, or 8 of each of 8 prompts. With `full` every row has 64 tokens; with
`ends` each token ends its row with a probability of 0.02, after which `generate` pads the row until all have ended. The
ratio is the time of `generate` over ours; the targets are 1 or more for n = 1 and 1.3 for n = 8.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.models.forward import prepare
from rlhf_core.models.heads import ValueHead
from rlhf_core.rollout.sampling import sample

ROWS, NEW_TOKENS = 64, 64
MODELS = {
    "0.3M, V=512": dict(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    ),
    "20M, V=32000": dict(
        vocab_size=32_000, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only check that it works: the small model, timed once")
    quick = parser.parse_args().quick
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {ROWS} rows of {NEW_TOKENS} tokens")
    print(f"{'model':>14}{'n':>4}{'prompt':>12}{'ends':>7}{'generate s':>12}{'ours s':>9}{'ratio':>8}")
    settings = itertools.product(list(MODELS)[: 1 if quick else None], (1, 8), ((8, 32), (64, 256)), ("full", "ends"))
    for name, n, lengths, ends in settings:
        share = 0.02 if ends == "ends" else 0
        seconds = compare(MODELS[name], n, lengths, share, repeats=1 if quick else 5)
        print(
            f"{name:>14}{n:>4}{'{}-{}'.format(*lengths):>12}{ends:>7}{seconds['generate']:>12.3f}"
            f"{seconds['ours']:>9.3f}{seconds['generate'] / seconds['ours']:>8.2f}",
            flush=True,
        )


def compare(shape: dict[str, Any], n: int, lengths: tuple[int, int], share: float, repeats: int) -> dict[str, float]:
    """Return the median seconds of both sides. `share`: the share of the vocabulary that ends a completion."""
    torch.manual_seed(0)
    policy, other = (LlamaForCausalLM(LlamaConfig(**shape)).eval() for _ in range(2))
    other.load_state_dict(policy.state_dict())
    prepare(policy)  # `generate` runs on the other one, with the attention of transformers
    other.generation_config.pad_token_id = 0
    head = ValueHead(shape["hidden_size"])
    vocabulary = shape["vocab_size"]
    # The weights are random, so all tokens are about equally likely. [vocabulary]: no token ends a completion.
    stops = list(range(1, 1 + round(share * vocabulary))) or [vocabulary]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(lengths[0], lengths[1] + 1, (ROWS // n,), generator=generator).tolist()
    prompts = [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in drawn]
    width = max(drawn)
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def ours() -> None:
        sample(
            policy, prompts, n, max_new_tokens=NEW_TOKENS, stop_ids=frozenset(stops),
            generator=torch.Generator().manual_seed(0), batch_size=ROWS, value_head=head,
        )  # fmt: skip

    def generate() -> None:
        other.generate(
            input_ids=input_ids, attention_mask=attention_mask, do_sample=True, top_k=0, num_return_sequences=n,
            max_new_tokens=NEW_TOKENS, eos_token_id=stops, pad_token_id=0,
        )  # fmt: skip

    return interleaved({"generate": generate, "ours": ours}, repeats=repeats)


if __name__ == "__main__":
    main()
