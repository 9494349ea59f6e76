"""Speed of reading, tokenising and packing the 52,002 rows of Alpaca, with an account of every row and token.

    python benchmarks/tokenise.py [--limit ROWS] [--micro-batch-tokens 8192]

With GPT-2's tokenizer, in three passes: into memory, into an empty cache, and out of that cache. The shared data is
found through RLHF_SHARED (default: `shared` beside the checkout).
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from rlhf_core.config import DataConfig, RunConfig
from rlhf_core.data.examples import Examples
from rlhf_core.data.loader import Steps, load_examples, pack_rows, split_places

SHARED = Path(os.environ.get("RLHF_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "real"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="rows to read; all by default")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="tokens per packed batch")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the account is printed below
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "gpt2_tokenizer")
    data = DataConfig(
        path=str(SHARED / "data" / "alpaca_data.json.gz"),
        skip_bad_rows=28,  # rows with an empty output
        max_length=1024,
        limit=options.limit,
    )

    def load(cache: str | None = None) -> Examples:
        return load_examples(replace(data, cache=cache), tokenizer, need="supervised")

    with tempfile.TemporaryDirectory() as cache:
        examples = timed("read and tokenise", load)
        timed("the same, into a cache", lambda: load(cache=cache))
        timed("the same, out of the cache", lambda: load(cache=cache))
    account = examples.account
    print(account.kept_line())
    print("\n".join(account.warnings()))
    if options.limit is None:
        assert account.rows_read == 52_002, account.rows_read
    timed("pack an epoch", lambda: pack_an_epoch(examples, options.micro_batch_tokens))


def timed(what: str, run: Callable[[], Examples]) -> Examples:
    """Run one part, print its time and its tokens per second, and return its examples."""
    wall, processor = time.perf_counter(), time.process_time()
    examples = run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    tokens = examples.account.tokens
    print(
        f"{what:<28}{wall:>8.2f} s{processor:>8.2f} s of processor time{tokens / wall:>14,.0f} tokens per second",
        flush=True,
    )
    return examples


def pack_an_epoch(examples: Examples, micro_batch_tokens: int) -> Examples:
    """Pack every step of one epoch. Check that each row is in one batch, and that no token is missing."""
    settings = RunConfig(model="-", data="-", output="-", batch_size=512, micro_batch_tokens=micro_batch_tokens)
    steps = Steps(examples, settings)
    rows = tokens = supervised = batches = 0
    for step in tqdm(range(1, steps.total + 1), desc="packing", unit=" steps", disable=None):
        rows = steps.rows(step)
        for part in ([rows[i] for i in places] for places in split_places(rows, settings)):
            batch = pack_rows(part)
            rows, tokens = rows + batch.num_completions, tokens + batch.num_tokens
            supervised, batches = supervised + batch.num_supervised_tokens, batches + 1
    account = examples.account
    assert (rows, tokens, supervised) == (account.rows, account.tokens, account.supervised_tokens)
    full = tokens / (batches * micro_batch_tokens)
    print(
        f"{batches:,} batches of at most {micro_batch_tokens:,} tokens, {full:.1%} full; no row dropped, none truncated"
    )
    return examples


if __name__ == "__main__":
    main()
