"""One PPO iteration: rlhf_core against TRL 1.12.0, the last that had PPO, on the CPU, in one run.

    python benchmarks/vs_trl/ppo.py [--model stories|wide] [--iterations 3] [--quick]

An iteration is all of it: rollout, scores, log-probs of policy and reference, values, and the updates of every epoch.
Both sides run their own trainer on the same weights, prompts, completion length, epochs and minibatches, float32, in
processes of their own that take turns; the first iteration of each is a warm-up. Ours is shown with the value head on
the policy's trunk and with a trunk of its own, which is what TRL's critic has. The samples are each side's own, so the
completions are not the same tokens; how many updates were made is checked, scores and KL are shown.

Run it from the project's own environment; TRL gets one of its own (environment.py). `stories` needs the real weights
(RLHF_SHARED, or `shared` beside the checkout); `wide` is a random Llama of 20M parameters, vocabulary 32,000.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dpo import HERE, REPOSITORY, machine, say
from environment import trl_python
from material import SPECIAL_TOKENS, VOCABULARY, make_material

SHARED = Path(os.environ.get("RLHF_SHARED", REPOSITORY.parent / "shared")) / "real"
ENTRIES = {
    "ours, shared trunk": ("ours_ppo.py", "--value=head"),
    "ours, own trunk": ("ours_ppo.py", "--value=policy"),
    "TRL": ("trl_ppo.py",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["stories", "wide"], default="stories")
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations of each, after one of warm-up")
    parser.add_argument("--prompts", type=int, default=32, help="to a rollout")
    parser.add_argument("--tokens", type=int, default=64, help="to a completion, at most")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", default="1.12.0", metavar="VERSION")
    parser.add_argument("--quick", action="store_true", help="only show that it works: one small iteration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if args.quick:
        args.iterations, args.prompts, args.tokens, args.epochs, args.minibatches = 1, 8, 16, 2, 2
    if args.iterations < 1 or args.prompts % args.minibatches:
        parser.error("--iterations must be 1 or more, and --prompts a multiple of --minibatches")

    pythons = {"ours_ppo.py": sys.executable, "trl_ppo.py": trl_python(args.trl)}
    load = [round(average, 2) for average in os.getloadavg()]
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_folder(folder, args)
        children = {}
        for number, (title, (script, *options)) in enumerate(ENTRIES.items()):
            say(f"loading: {title}")
            children[title] = Player(title, pythons[script], script, options, folder, number, args)
            stack.callback(children[title].close)
        turns: dict[str, list[dict]] = {title: [] for title in children}
        for iteration in range(args.iterations + 1):
            for title, child in children.items():
                turn = child.turn()
                say(f"iteration {iteration or 'warm-up'}: {title}: {turn['seconds']:.2f} s")
                if turn["updates"] != args.epochs * args.minibatches:
                    raise SystemExit(f"{title}: {turn['updates']} updates, not {args.epochs * args.minibatches}")
                if iteration:
                    turns[title].append(turn)
        versions = {title: child.about["versions"] for title, child in children.items()}

    rows = {
        title: {
            "seconds": statistics.median(turn["seconds"] for turn in taken),
            "cpu_seconds": min(turn["cpu_seconds"] for turn in taken),
            "added_mib": max(turn["added_mib"] for turn in taken),
            "score": statistics.mean(turn["score"] for turn in taken),
            "kl": statistics.mean(turn["kl"] for turn in taken),
        }
        for title, taken in turns.items()
    }
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    report = {"settings": settings, "machine": machine(load), "versions": versions, "results": rows}
    print(f"\nPPO iteration, {settings}\n{report['machine']}\n{versions['TRL']}")
    print(f"{'':<22}{'s/iteration':>12}{'cpu s':>9}{'added MiB':>11}{'TRL time':>10}{'memory':>9}{'score':>9}{'KL':>9}")
    for title, row in rows.items():
        print(
            f"{title:<22}{row['seconds']:>12.2f}{row['cpu_seconds']:>9.2f}{row['added_mib']:>11.0f}"
            f"{rows['TRL']['seconds'] / row['seconds']:>9.2f}x{rows['TRL']['added_mib'] / row['added_mib']:>8.2f}x"
            f"{row['score']:>9.3f}{row['kl']:>9.3f}"
        )
    print(
        "\nadded MiB: peak resident memory of an iteration above what was resident after loading, Adam's state included"
    )
    print("TRL time, memory: TRL's over this row's")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


class Player:
    """A contestant's process; see turns.py for the conversation."""

    def __init__(
        self, title: str, python: str | Path, script: str, options: list[str], folder: Path, number: int, args
    ) -> None:
        self.title, self.log = title, folder / f"{number}.log"
        shared = ("prompts", "tokens", "epochs", "minibatches", "threads")
        flags = [f"--{name}={getattr(args, name)}" for name in shared] + [f"--iterations={args.iterations + 1}"]
        ours = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}" if script.startswith("ours") else ""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": ours,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, HERE / script, folder, folder / f"output-{number}", *flags, *options],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.about = self._answer()

    def turn(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"{self.title!r} ended. The end of its log:\n{self.log.read_text()[-3000:]}")


def make_folder(folder: Path, args: argparse.Namespace) -> None:
    """`folder`/policy, /reward_model, and the prompts as text (ours) and as token ids (TRL), the same ones."""
    from rlhf_core.config import DataConfig
    from rlhf_core.data.loader import load_examples
    from rlhf_core.models.load import load_policy, load_reward_model, save_model

    rng = random.Random(0)
    if args.model == "stories":
        shutil.copytree(SHARED / "models" / "stories260K", folder / "policy")
        with gzip.open(SHARED / "data" / "prompts_tinystories_train.jsonl.gz", "rt") as lines:
            texts = [json.loads(line)["prompt"][:120] for line in lines][: args.prompts]
    else:
        make_material(folder, "deep", [], 0)
        shutil.rmtree(folder / "policy")
        (folder / "reference").rename(folder / "policy")
        words = [f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY)]
        texts = [" ".join(rng.choices(words, k=rng.randint(16, 48))) for _ in range(args.prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    save_model(folder / "reward_model", *load_reward_model(folder / "policy", device="cpu"))
    policy, tokenizer = load_policy(folder / "policy", device="cpu")
    examples = load_examples(DataConfig(path=folder / "prompts.jsonl"), tokenizer, need="prompts", model=policy)
    (folder / "prompts.json").write_text(json.dumps([example.prompt for example in examples]))


if __name__ == "__main__":
    main()
