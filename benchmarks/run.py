"""`make bench`: run the benchmarks that need only this project, one after another, each in its own process.

python benchmarks/run.py [NAME ...]     run all that need no shared data, or those that are named
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = {
    "prefix_sharing": "a prompt computed once for two completions, or once for each, in a DPO step",
    "packing": "packed against padded batches, and the time of packing itself",
    "tokenise": "reading, tokenising and packing Alpaca's 52,002 rows (needs RLHF_SHARED)",
    "packed_attention": "attention over a packed stream, against a dense mask and against padding",
    "token_logprobs": "log-probs from logits against log_softmax and gather",
    "kl_divergence": "exact KL from logits against two log_softmax",
    "linear_logprobs": "log-probs from hidden states (fused head) against logits and log_softmax",
    "linear_kl": "exact KL from hidden states against two log_softmax",
    "sampling": "sampling with log-probs and values against transformers' generate",
    "gae": "advantages as one cumulative sum against the loop over tokens",
    "frontier": "score against KL of five algorithms at several strengths, as a figure (needs RLHF_SHARED)",
    "real_road": "the long versions of the tests on real weights and data (needs RLHF_SHARED)",
}


def main() -> int:
    lines = "\n".join(f"  {name:<16} {summary}" for name, summary in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"benchmarks:\n{lines}\n\nagainst TRL: the scripts of benchmarks/vs_trl, each "
        "with its own environment\non a GPU: benchmarks/gpu/run.py\nof two checkouts: benchmarks/equality.py, "
        "benchmarks/loop_overhead.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks to run; by default all that need no RLHF_SHARED"
    )
    names = parser.parse_args().names or [
        name for name in BENCHMARKS if name not in ("real_road", "tokenise", "frontier")
    ]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]!r}; expected one of {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"\n== {name}: {BENCHMARKS[name]}", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
