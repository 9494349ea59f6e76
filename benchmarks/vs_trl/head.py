"""The LM head alone, forward and backward: ours against TRL's and PyTorch's, the same tokens, in one run.

    python benchmarks/vs_trl/head.py [--steps 7] [--threads 2] [--python TRL_PYTHON] [--json FILE]

A step computes the mean of -log p(target) and its gradient to hidden states and weight, in float32. Every entry is a
process that makes one step on request, so steps are interleaved. TRL runs in its own environment (environment.py makes
it, or --python names an interpreter that has it). Before anything is timed, every gradient is compared with the exact
one, in float64; if one is wrong, nothing is timed and the exit status is 1.

Seconds are the median over the steps; `cpu s` is the minimum of the processor time, which other processes affect less.
The floor is the time of the three matrix products alone, each as one product.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from child import PeakMemory, TimedStep, step, versions
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SHAPES = [(512, 256, 32_000), (512, 896, 32_000), (1024, 512, 32_000)]  # rows, hidden, vocabulary
TOLERANCE = 2e-6  # relative error of the whole gradient
TRL_CHUNK = 32_768  # the value that its trainers use


class Head(nn.Module):
    """Hidden states and weight as parameters."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.hidden, self.weight = nn.Parameter(hidden), nn.Parameter(weight)


def ours(head: Head, targets: Tensor, **options) -> Tensor:
    from rlhf_kernels import linear_logprobs

    return -linear_logprobs(head.hidden, head.weight, targets, **options)[0].mean()


def ours_in_one_pass(head: Head, targets: Tensor) -> Tensor:
    from rlhf_kernels.linear_logprobs import linear_token_loss

    return linear_token_loss(head.hidden, head.weight, targets, lambda logprobs, _: -logprobs)[0] / len(targets)


def trl(head: Head, targets: Tensor, **options) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    arguments = (head.hidden, head.weight, None, targets, 1.0, TRL_CHUNK, None, 1.0)
    return -ChunkedLogProbFunction.apply(*arguments, *options.values())[0].mean()


def torch_default(head: Head, targets: Tensor) -> Tensor:
    options = torch.nn.modules.linear_cross_entropy_options.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(head.hidden, head.weight, targets, options=options)


def products(head: Head, targets: Tensor) -> Tensor:
    """Compute no loss, only the three matrix products that every implementation needs."""
    with torch.no_grad():
        logits = head.hidden @ head.weight.T
        head.hidden.grad = logits @ head.weight
        head.weight.grad = logits.T @ head.hidden
    return torch.zeros((), requires_grad=True)


IMPLEMENTATIONS: dict[str, Callable[[Head, Tensor], Tensor]] = {
    "ours, kept": lambda head, targets: ours(head, targets, keep_bytes=1 << 40),
    "ours, one pass": ours_in_one_pass,
    "ours, recomputed": lambda head, targets: ours(head, targets, keep_bytes=0),
    "TRL, as DPO calls it": trl,
    "TRL, log-probs alone": lambda head, targets: trl(head, targets, outputs=()),
    "torch, defaults": torch_default,
    "naive": lambda head, targets: F.cross_entropy(head.hidden @ head.weight.T, targets),
    "floor": products,
}


def be(name: str, material: Path, threads: int) -> None:
    """Run one entry: answer each line of JSON with one, as in child.py."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    torch.set_num_threads(threads)
    tensors = load_file(material)
    head, targets = Head(tensors["hidden"], tensors["weight"]), tensors["targets"]
    timed = TimedStep(head, lambda: IMPLEMENTATIONS[name](head, targets), len(targets), [head])
    for tensor in (*tensors.values(), head.hidden, head.weight):
        tensor.sum()  # so that tensors read lazily do not count as memory of a step
    small = Head(torch.randn(4, 8), torch.randn(16, 8))
    IMPLEMENTATIONS[name](small, torch.zeros(4, dtype=torch.int64)).backward()  # imports, and other work of a first use
    memory = PeakMemory()
    answers.write(json.dumps({"versions": versions()}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "step":
            answer = step(timed, memory)
        else:
            save_file({"hidden": head.hidden.grad, "weight": head.weight.grad}, request["path"])
            answer = {"saved": 2}
        answers.write(json.dumps(answer) + "\n")


class Child:
    """The process of an entry."""

    def __init__(self, name: str, python: Path, material: Path, threads: int) -> None:
        self.name, self.steps = name, []
        self.log = material.with_name(f"{name}.log")
        paths = [] if name.startswith("TRL") else [str(REPOSITORY / "kernels")]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
        command = [python, HERE / "head.py", "--be", name, "--material", material, "--threads", str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.versions = self.answer()["versions"]

    def ask(self, **request: str) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        tail = "\n".join(self.log.read_text().splitlines()[-20:])
        raise SystemExit(f"{self.name!r} ended with status {self.process.wait()}:\n{tail}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def exact_gradient(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden, weight = (tensors[name].double() for name in ("hidden", "weight"))
    gradient = torch.softmax(hidden @ weight.T, -1)
    gradient[torch.arange(len(hidden)), tensors["targets"]] -= 1
    gradient /= len(hidden)
    return {"hidden": gradient @ weight, "weight": gradient.T @ hidden}


def compare(shape: tuple[int, int, int], pythons: dict[str, Path], steps: int, threads: int) -> list[dict]:
    """Compare the gradients of one shape, then time the steps in turns."""
    rows, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(rows, width, generator=generator),
        "weight": torch.randn(vocabulary, width, generator=generator) * width**-0.5,
        "targets": torch.randint(vocabulary, (rows,), generator=generator),
    }
    truth = exact_gradient(tensors)
    size = sum(x.square().sum() for x in truth.values()).sqrt()
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as folder, contextlib.ExitStack() as stack:
        material = Path(folder) / "material.safetensors"
        save_file(tensors, material)
        children, errors = [], {}
        for name in IMPLEMENTATIONS:
            child = Child(name, pythons["trl" if name.startswith("TRL") else "ours"], material, threads)
            stack.callback(child.close)
            children.append(child)
            child.ask(do="step")  # the warm-up
            if name != "floor":
                path = Path(folder) / f"{name}.safetensors"
                child.ask(do="save", path=str(path))
                found = load_file(path)
                distance = sum((found[key].double() - x).square().sum() for key, x in truth.items()).sqrt()
                errors[name] = (distance / size).item()
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        if wrong:
            raise SystemExit(f"NOT THE SAME STEP, so nothing was timed. Relative errors of the gradient: {wrong}")
        for _ in range(steps):
            for child in children:
                child.steps.append(child.ask(do="step"))
    return [
        {
            "name": child.name,
            "seconds": statistics.median(one["seconds"] for one in child.steps),
            "cpu_seconds": min(one["cpu_seconds"] for one in child.steps),
            "added_mib": max(one["added_mib"] for one in child.steps),
            "gradient_error": errors.get(child.name),
            "versions": child.versions,
        }
        for child in children
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each entry")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", default="1.16.0", metavar="VERSION")
    parser.add_argument("--python", type=Path, help="an interpreter with TRL, instead of making an environment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--be", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--material", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be:
        be(args.be, args.material, args.threads)
        return
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    if args.python is None:
        from environment import trl_python

        args.python = trl_python(args.trl)
    pythons = {"ours": Path(sys.executable), "trl": args.python}
    report = []
    print(f"LM head, forward and backward, float32, {args.threads} threads, load average {os.getloadavg()[0]:.2f}")
    for shape in SHAPES:
        rows = compare(shape, pythons, args.steps, args.threads)
        report.append({"shape": shape, "results": rows})
        best = {clock: {row["name"]: row[clock] for row in rows} for clock in ("seconds", "cpu_seconds")}
        print("\nrows {}, hidden {}, vocabulary {}; times over those of ours, floor over time".format(*shape))
        print(
            f"{'':<22}{'s':>8}{'kept':>8}{'one pass':>10}{'of floor':>10}{'cpu s':>9}{'kept':>8}{'one pass':>10}"
            f"{'of floor':>10}{'added MiB':>11}{'grad err':>10}"
        )
        for row in rows:
            text = f"{row['name']:<22}"
            for clock, width in (("seconds", 8), ("cpu_seconds", 9)):
                mine, times = row[clock], best[clock]
                text += (
                    f"{mine:>{width}.3f}{mine / times['ours, kept']:>7.2f}x{mine / times['ours, one pass']:>9.2f}x"
                    f"{times['floor'] / mine:>10.0%}"
                )
            error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
            print(f"{text}{row['added_mib']:>11.0f}{error:>10}", flush=True)
    print(
        "\n"
        + "; ".join(sorted({f"{name} {v}" for s in report for r in s["results"] for name, v in r["versions"].items()}))
    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
