"""`make bench`: the benchmarks that need nothing but this project, one after another, each in a process of its own.

python benchmarks/run.py [NAME ...]     all of them, or those named
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = {
    "prefix_sharing": "one prompt for two completions against a prompt each, in a whole DPO step",
    "packing": "packed against padded, and the cost of packing itself, as batches grow",
    "tokenise": "Alpaca's 52,002 rows read, tokenised and packed, every token accounted for (needs RLHF_SHARED)",
    "packed_attention": "attention over a stream, walked group by group, against a dense mask and against padding",
    "token_logprobs": "log-probs from logits against log_softmax and gather",
    "kl_divergence": "exact KL from logits against two log_softmax",
    "linear_logprobs": "the fused head against the plain one",
    "linear_kl": "exact KL from hidden states against the plain way",
    "sampling": "completions with log-probs and values against transformers' generate alone",
    "gae": "advantages as one cumulative sum against the loop over tokens",
    "frontier": "reward against KL of five algorithms at several strengths, as a figure (needs RLHF_SHARED)",
    "real_road": "the long versions of the proofs on real weights and data (needs RLHF_SHARED)",
}


def main() -> int:
    lines = "\n".join(f"  {name:<16} {summary}" for name, summary in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"benchmarks:\n{lines}\n\nagainst TRL: the scripts of benchmarks/vs_trl, which "
        "make an environment\non a GPU: benchmarks/gpu/run.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="those to run; all that need no RLHF_SHARED by default"
    )
    names = parser.parse_args().names or [
        name for name in BENCHMARKS if name not in ("real_road", "tokenise", "frontier")
    ]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark named {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"\n== {name}: {BENCHMARKS[name]}", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
