"""Run the peers' own code on small seeded inputs and write what comes out to golden/. `make parity` calls this.

Equal versions give equal bytes, so that `git diff` shows what a new version of a peer changed. TRL 1.12, the last that
had PPO, and 1.16 each need an environment of their own: in each, this runs what is made with its version.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import warnings
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before anything reads them
warnings.simplefilter("ignore")  # the peers' own, about their future

import datasets  # noqa: E402
import golden  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

PEERS = {  # by the version of TRL
    "1.16.0": [
        "trl_dpo",
        "trl_kto",
        "trl_grpo",
        "trl_advantages",
        "trl_reference_free",
        "trl_reward",
        "trl_paths",
        "trl_faults",
        "liger",
        "sb3",
    ],
    "1.12.0": ["trl_ppo"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = PEERS[version("trl")]
    parser.add_argument("names", nargs="*", default=peers, metavar="NAME", help=f"of {', '.join(peers)}; all if none")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)  # else a constant like 0.1 is rounded where a peer makes a tensor of it
    for name in parser.parse_args().names:
        made = importlib.import_module(name).make()
        path = golden.write(name, made)
        print(f"{path.name}: {len(made.cases)} cases, {len(made.absent)} absent, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
