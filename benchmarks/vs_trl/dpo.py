"""One DPO step, forward and backward: rlhf_core against TRL on the CPU, same weights, same pairs, in one run.

    python benchmarks/vs_trl/dpo.py [--steps 5] [--shape mixed|short|long] [--model deep|shallow] [--quick]
    python benchmarks/vs_trl/dpo.py --rows hh [--steps 5] [--quick]

Run it from the project's environment; TRL has its own (environment.py). Every entry is a process that makes one step on
request, so steps are interleaved: a change in the load of the machine affects all entries. Before anything is timed,
every loss and gradient is compared with the exact one, computed in float64 by exact_dpo.py; if one is wrong, nothing is
timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from material import (
    MODELS,
    REAL_MODEL,
    SHAPES,
    VOCABULARY,
    hh_pairs,
    make_material,
    make_pairs,
    make_real_model,
    real_tokens,
)
from processes import HERE, Child, log, machine
from safetensors.torch import load_file
from torch import Tensor

BETA = 0.1
TOLERANCE = 2e-6  # relative error of the loss and of the whole gradient


@dataclass(frozen=True)
class Entry:
    """One row of the table. `peer` is the entry of ours with the same treatment of the reference."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    peer: str = "ours"


ENTRIES = (
    Entry("ours", "ours_dpo.py"),
    Entry("TRL, defaults (checkpointing)", "trl_dpo.py", ("--checkpointing",)),
    Entry("TRL, no checkpointing", "trl_dpo.py"),
    Entry("ours, cached reference", "ours_dpo.py", ("--cached-reference",), peer="ours, cached reference"),
    Entry("TRL's best: that, cached reference", "trl_dpo.py", ("--cached-reference",), peer="ours, cached reference"),
)


class DPOChild(Child):
    """The process of an entry, and the steps that it has made."""

    def __init__(self, entry: Entry, folder: Path, *, threads: int, trl: str) -> None:
        arguments = [folder, f"--beta={BETA}", f"--threads={threads}", *entry.options]
        super().__init__(entry.name, entry.script, arguments, folder, threads=threads, trl=trl)
        self.entry = entry
        self.steps: list[dict] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each entry")
    parser.add_argument("--rows", choices=["random", "hh"], default="random", help="hh: real pairs, and 30M parameters")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mixed", help="of random pairs")
    parser.add_argument("--model", choices=sorted(MODELS), default="deep", help="for random pairs")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl", default="1.16.0", metavar="VERSION")
    parser.add_argument("--quick", action="store_true", help="only check that it works: 1 step on 2 pairs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.pairs = 1, 2
    if args.steps < 1 or args.pairs < 1:
        parser.error(f"--steps {args.steps} and --pairs {args.pairs} must be at least 1")

    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        pairs, parameters = make_folder(folder, args)
        children = []
        for entry in ENTRIES:
            log(f"loading: {entry.name}")
            child = DPOChild(entry, folder, threads=args.threads, trl=args.trl)
            stack.callback(child.close)
            children.append(child)
        errors = check_parity(children, folder, args.threads)
        for number in range(args.steps):
            for child in children:
                child.steps.append(child.ask(do="step"))
                log(f"step {number + 1}/{args.steps}: {child.entry.name}: {child.steps[-1]['seconds']:.2f} s")

    model = REAL_MODEL if args.rows == "hh" else {"vocab_size": VOCABULARY, **MODELS[args.model]}
    lengths = [len(ids) for pair in pairs for ids in (pair["chosen"], pair["rejected"])]
    report = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "shape": {
            "name": "hh" if args.rows == "hh" else args.shape,
            "prompt_tokens": (min(len(pair["prompt"]) for pair in pairs), max(len(pair["prompt"]) for pair in pairs)),
            "completion_tokens": (min(lengths), max(lengths)),
            "pairs": args.pairs,
            "real_tokens": real_tokens(pairs),
        },
        "model": {"name": "real" if args.rows == "hh" else args.model, "parameters": parameters, **model},
        "beta": BETA,
        "seed": args.seed,
        "threads": args.threads,
        "steps": args.steps,
        "machine": machine(),
        "versions": {"ours": children[0].about["versions"], "trl": children[1].about["versions"]},
        "results": results(children, errors, real_tokens(pairs)),
    }
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def make_folder(folder: Path, args: argparse.Namespace) -> tuple[list[dict[str, list[int]]], int]:
    """Write models and pairs; return the pairs and the number of parameters of the model."""
    if args.rows == "random":
        pairs = make_pairs(SHAPES[args.shape], args.pairs, args.seed)
        return pairs, make_material(folder, args.model, pairs, args.seed)
    from transformers import AutoTokenizer

    from rlhf_core.config import DataConfig
    from rlhf_core.data.loader import load_examples

    parameters = make_real_model(folder, args.seed)
    rows = hh_pairs(args.pairs, args.seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    examples = load_examples(DataConfig(path=folder / "rows.jsonl"), tokenizer, need="preference")
    names = ("prompt", "chosen", "rejected")
    pairs = [dict(zip(names, (example.prompt, *example.completions), strict=True)) for example in examples]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return pairs, parameters


def exact(folder: Path, threads: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the loss and the largest log-prob sum in it, and the gradient of the step, in float64."""
    log("exact loss and gradient in float64")
    path = folder / "exact.safetensors"
    command = [sys.executable, HERE / "exact_dpo.py", folder, path, f"--beta={BETA}", f"--threads={threads}"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"exact_dpo.py ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout), load_file(path)


def check_parity(children: list[DPOChild], folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """Make one step of each entry, which is also the warm-up, and end the program if a loss or gradient is wrong.

    Ours must be within TOLERANCE. TRL sums the log-probs of a sequence in float32 before it subtracts those of the
    reference, so the margin in its sigmoid has the rounding error of four sums of some hundreds or thousands. An error
    e of the margin changes -log sigmoid(beta * margin), and the weight of a pair in the gradient, by at most beta * e,
    relatively; the tolerance of TRL is larger by this.
    """
    truth, truth_gradient = exact(folder, threads)
    if abs(truth["loss"] - math.log(2)) < 1e-3:
        raise SystemExit(f"the loss is {truth['loss']}, ln 2: policy and reference are equal, which tests nothing")
    half_unit = 2.0 ** (math.floor(math.log2(truth["largest_logprob_sum"])) - 24)  # float32 has 24 significant bits
    allowed = {"ours_dpo.py": TOLERANCE, "trl_dpo.py": TOLERANCE + BETA * 4 * half_unit}

    errors, gradients, wrong = {}, {}, []
    for child in children:
        name = child.entry.name
        log(f"warm-up and gradients: {name}")
        loss = child.ask(do="step")["loss"]
        path = folder / f"{name}.safetensors"  # one file per entry: the result of load_file may still read from it
        child.ask(do="save", path=str(path))
        gradient = load_file(path)
        if gradient.keys() != truth_gradient.keys():
            raise SystemExit(f"{name!r} has different parameters: {sorted(gradient.keys() ^ truth_gradient.keys())}")
        gradients.setdefault(child.entry.script, gradient)
        errors[name] = {
            "loss": loss,
            "loss_error": abs(loss / truth["loss"] - 1),
            "gradient_error": relative_distance(gradient, truth_gradient),
            "gradient_from_ours": relative_distance(gradient, gradients["ours_dpo.py"]),
            "allowed_error": allowed[child.entry.script],
        }
        # `not <=` rather than `>`, so that NaN counts as wrong
        if not max(errors[name]["loss_error"], errors[name]["gradient_error"]) <= allowed[child.entry.script]:
            wrong.append(f"  {name}: {errors[name]}")
    if wrong:
        raise SystemExit(
            "NOT THE SAME STEP, so nothing was timed. Relative to the exact loss and gradient "
            f"(loss {truth['loss']!r}) these errors are larger than rounding explains:\n" + "\n".join(wrong)
        )
    return errors


def relative_distance(gradient: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return ||gradient - truth|| / ||truth|| with all parameters as one vector."""
    distance = sum((gradient[name].double() - truth[name].double()).square().sum() for name in truth)
    return (distance / sum(tensor.double().square().sum() for tensor in truth.values())).sqrt().item()


def results(children: list[DPOChild], errors: dict[str, dict[str, float]], tokens: int) -> list[dict]:
    rows = {}
    for child in children:
        seconds = [step["seconds"] for step in child.steps]
        rows[child.entry.name] = {
            "name": child.entry.name,
            "peer": child.entry.peer,
            "seconds": statistics.median(seconds),
            "seconds_of_each_step": seconds,
            "cpu_seconds": min(step["cpu_seconds"] for step in child.steps),
            "real_tokens_per_second": tokens / statistics.median(seconds),
            "added_peak_mib": max(step["added_mib"] for step in child.steps),
            "positions": child.about["positions"],
            **errors[child.entry.name],
        }
    for row in rows.values():
        row["times_ours"] = row["seconds"] / rows[row["peer"]]["seconds"]
        row["memory_times_ours"] = row["added_peak_mib"] / rows[row["peer"]]["added_peak_mib"]
    return list(rows.values())


def print_report(report: dict) -> None:
    shape = report["shape"]
    prompt, completion = shape["prompt_tokens"], shape["completion_tokens"]
    print(f"\nDPO step (forward + backward, no optimizer), sigmoid loss, beta {report['beta']}, float32")
    print(
        f"  batch     {shape['pairs']} pairs, shape {shape['name']}: prompts of {prompt[0]}-{prompt[1]} tokens, "
        f"completions of {completion[0]}-{completion[1]}; {shape['real_tokens']} real tokens; seed {report['seed']}"
    )
    model = report["model"]
    print(
        f"  model     Llama, {model['name']}: {model['parameters'] / 1e6:.1f}M parameters, "
        f"vocabulary {model['vocab_size']:,}, {model['num_hidden_layers']} layers of {model['hidden_size']}, "
        f"{'tied' if model['tie_word_embeddings'] else 'untied'} head"
    )
    for side, found in report["versions"].items():
        print(f"  {side:<9} {', '.join(f'{package} {number}' for package, number in found.items())}")
    print(
        f"  machine   {report['machine']['processor']}, {report['machine']['cores']} cores, "
        f"{report['machine']['system']}, Python {report['machine']['python']}; {report['threads']} threads; "
        f"load average when it began {report['machine']['load']}"
    )
    print(f"  command   {report['command']}")
    print(
        f"\n{'':<36}{'s/step':>8}{'min':>8}{'cpu s':>8}{'real tok/s':>12}{'positions':>11}{'added MiB':>11}"
        f"{'time':>8}{'memory':>8}{'loss err':>10}{'grad err':>10}{'from ours':>11}"
    )
    for row in report["results"]:
        print(
            f"{row['name']:<36}{row['seconds']:>8.3f}{min(row['seconds_of_each_step']):>8.3f}"
            f"{row['cpu_seconds']:>8.3f}{row['real_tokens_per_second']:>12.0f}{row['positions']:>11}"
            f"{row['added_peak_mib']:>11.0f}{row['times_ours']:>7.2f}x{row['memory_times_ours']:>7.2f}x"
            f"{row['loss_error']:>10.1e}{row['gradient_error']:>10.1e}"
            f"{row['gradient_from_ours']:>11.1e}"
        )
    print(
        f"""
s/step, min     median and minimum of {report["steps"]} steps; cpu s: minimum of the processor time of all threads
real tok/s      tokens of all sequences without padding, the prompt of a pair counted twice, per second
positions       token positions that go through the policy, padding included
added MiB       peak resident memory of a step minus that after loading
time, memory    s/step and added MiB divided by those of ours with the same treatment of the reference
loss, grad err  relative error of the loss and of the whole gradient against float64; from ours: the gradient"""
    )


if __name__ == "__main__":
    main()
