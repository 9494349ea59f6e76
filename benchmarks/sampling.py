"""Our sampler, with log-probs and values, against transformers' `generate` alone: the same rows and tokens.

64 completions of up to 64 tokens: of 64 prompts, or 8 of each of 8 prompts. `full` runs every row to the last token;
in `ends` a row ends with a chance of 2 in 100 at every token, after which `generate` pads it until all have ended.
The ratio is generate's time over ours; the aims are 1 or more for n = 1 and 1.3 for n = 8.
"""

from __future__ import annotations

import torch
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM

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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {ROWS} rows of {NEW_TOKENS} tokens")
    print(f"{'model':>14}{'n':>4}{'prompt':>12}{'ends':>7}{'generate s':>12}{'ours s':>9}{'ratio':>8}")
    for name, shape in MODELS.items():
        for n in (1, 8):
            for lengths in ((8, 32), (64, 256)):
                for ends in ("full", "ends"):
                    seconds = compare(shape, n, lengths, share=0.02 if ends == "ends" else 0)
                    print(
                        f"{name:>14}{n:>4}{'{}-{}'.format(*lengths):>12}{ends:>7}{seconds['generate']:>12.3f}"
                        f"{seconds['ours']:>9.3f}{seconds['generate'] / seconds['ours']:>8.2f}",
                        flush=True,
                    )


def compare(shape: dict, n: int, lengths: tuple[int, int], share: float) -> dict[str, float]:
    torch.manual_seed(0)
    # The library's own attention for `generate`; ours switches its model to the packed one.
    policy, other = (LlamaForCausalLM(LlamaConfig(**shape)).eval() for _ in range(2))
    other.load_state_dict(policy.state_dict())
    other.generation_config.pad_token_id = 0
    head = ValueHead(shape["hidden_size"])
    vocabulary = shape["vocab_size"]
    stops = list(range(1, 1 + round(share * vocabulary))) or [vocabulary]  # weights are random: any token is as likely
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

    return interleaved({"generate": generate, "ours": ours}, repeats=5)


if __name__ == "__main__":
    main()
