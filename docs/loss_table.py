"""Write docs/losses.md: every loss by name, from the code. `make docs` runs it; a test compares the page with the code.

A row comes from the docstring of the loss: the first line names the loss and its paper, the second paragraph is its
formula. What it needs comes from its entry in the table, the column of TRL from `TRL` below, the proofs from the tests.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.losses import policy, preference, ranking, reward, sft, unpaired, value
from rlhf_core.losses.pairs import PreferenceLoss
from rlhf_core.losses.registry import options_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "losses.md"

TRL = {  # TRL 1.16.0; it does not have the losses that are not listed
    **dict.fromkeys(
        (
            *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
            *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
        ),
        "DPO",
    ),
    **dict.fromkeys(("cpo", "simpo", "alphapo"), "experimental CPO"),
    "orpo": "experimental ORPO",
    **dict.fromkeys(("kto", "apo_zero_unpaired"), "KTO"),
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"), "GRPO"),
    "gspo": "GRPO, as an option",
    "gmpo": "experimental GMPO",
    "sft_loss": "SFT (no z-loss)",
    "bradley_terry_loss": "Reward (no smoothing)",
}

BY_HAND = {  # the test file of each family with values derived by hand, keyed by name
    "paired": "tests/losses/test_preference_table.py",
    "unpaired": "tests/losses/test_unpaired.py",
    "ranked": "tests/losses/test_ranking.py",
    "policy": "tests/losses/test_policy.py",
}

FUNCTIONS = {  # losses that are not in a table, and the test file of each
    sft.sft_loss: "tests/losses/test_sft.py",
    reward.bradley_terry_loss: "tests/losses/test_reward.py",
    reward.plackett_luce_loss: "tests/losses/test_reward.py",
    reward.process_reward_loss: "tests/losses/test_reward.py",
    value.value_loss: "tests/losses/test_value.py",
    policy.kl_loss: "tests/losses/test_policy.py",
    policy.entropy_bonus: "tests/losses/test_policy.py",
    policy.ptx_loss: "tests/losses/test_policy.py",
}

HEADER = """\
# Every loss by name

Written by `make docs` from the code; `tests/test_docs.py` fails if the two differ.

Notation: c and r are the chosen and the rejected completion, l a completion's log-prob and L its
length in tokens, a and b the log-ratios l - l_ref of c and r, d = a - b, e the label smoothing.

Columns:

- "needs": the reference's log-probs (`reference`), other inputs, and whether log-probs are averaged
  over tokens instead of summed (`means`).
- "takes": label smoothing (e), another f-divergence (f), LD-DPO (ld), pair weights such as WPO's
  (w), and the options of the loss with their defaults. `--loss-options NAME:NUMBER` sets an option
  in every job that takes the loss. `rlhf dpo` and `rlhf kto` update an option marked "running mean"
  themselves, unless it is set.
- "proof": a value derived by hand (h), float64 gradients (g), golden values of another library (p),
  a closed-form optimum (c). The test files are named above each table.
"""


def documented(function: Callable) -> tuple[str, str]:
    """Return the first line of a docstring, and its second paragraph, the formula."""
    title, formula, *_ = [*inspect.getdoc(function).split("\n\n"), ""]
    if not formula or re.match(r"(Args|Returns|Raises)\b", formula):
        raise SystemExit(f"{function.__name__}: the second paragraph of its docstring must be its formula")
    return " ".join(title.split()).rstrip("."), "\n".join(line.strip() for line in formula.splitlines())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def code(lines: str) -> str:
    """Return a formula as Markdown code, line by line."""
    return "<br>".join(f"`{cell(line)}`" for line in lines.splitlines() if line)


def options(function: Callable, running: str | None = None) -> list[str]:
    own = {k: v for k, v in options_of(function).items() if k not in ("beta", "label_smoothing")}
    return [f"`{name}={default}`" + " (running mean)" * (name == running) for name, default in own.items()]


@functools.cache
def strings_in(file: Path) -> set[str]:
    """Return the string constants of a test file, which include the names of the losses it tests."""
    return {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)} - {None}


def proofs(name: str, family: str) -> str:
    """Return the letters of the proofs of a loss; SystemExit for a loss without a value by hand."""
    tests = ROOT / "tests"
    if name not in strings_in(ROOT / BY_HAND[family]):
        raise SystemExit(f"{name}: no value by hand in {BY_HAND[family]}")
    letters = ["h", "g"]
    if any(name in strings_in(file) for file in (tests / "parity").glob("*.py")):
        letters.append("p")
    if any(name in strings_in(file) for file in (tests / "closed_form").glob("*.py")):
        letters.append("c")
    return " ".join(letters)


def preference_rows(table: dict[str, PreferenceLoss], family: str) -> Iterator[str]:
    for name, entry in table.items():
        title, formula = documented(entry.function)
        needs = [
            "reference" if entry.needs_reference else "",
            *(f"`{tensor}`" for tensor in entry.needs),
            "means" if entry.length_normalized else "",
        ]
        smoothed = "e" if "label_smoothing" in options_of(entry.function) else ""
        letters = (("f", entry.f_divergence), ("ld", entry.ld_alpha), ("w", entry.pair_weights))
        running = entry.running_mean.option if entry.running_mean else None
        takes = [smoothed, *(letter for letter, has in letters if has), *options(entry.function, running)]
        yield row(name, title, formula, needs, takes, proofs(name, family))


def policy_rows() -> Iterator[str]:
    for name, entry in policy.POLICY_LOSSES.items():
        title, formula = documented(entry.surrogate)
        takes = [f"aggregation `{entry.aggregation}`", f"ratio of the {entry.ratio_level}", *options(entry.surrogate)]
        yield row(name, entry.source or title, formula, recipe(entry.recipe), takes, proofs(name, "policy"))


def recipe(entry: policy.Recipe) -> list[str]:
    """Return the settings of a recipe that differ from those of GRPO."""
    plain, own = policy.Recipe(), [f"`{name}={value:g}`" for name, value in entry.options.items()]
    own += [f"`kl_coef={entry.kl_coef:g}`"] * (entry.kl_coef != plain.kl_coef)
    own += [f"scale `{entry.scale}`"] * (entry.scale != plain.scale)
    return own + ["normalized per micro-batch"] * entry.local_normalizer


def function_rows() -> Iterator[str]:
    for function, file in FUNCTIONS.items():
        title, formula = documented(function)
        if not (ROOT / file).exists():
            raise SystemExit(f"{function.__name__}: no file {file}")
        yield row(function.__name__, title, formula, [], [], f"`{file}`")


def row(name: str, title: str, formula: str, needs: list[str], takes: list[str], proof: str) -> str:
    lists = [", ".join(filter(None, each)) for each in (needs, takes)]
    cells = [f"`{name}`", cell(title), code(formula), *lists, TRL.get(name, ""), proof]
    return "| " + " | ".join(cells) + " |"


def section(title: str, text: str, rows: Iterator[str], needs: str = "needs") -> str:
    head = f"| name | loss | formula | {needs} | takes | in TRL 1.16 | proof |\n|---|---|---|---|---|---|---|"
    return f"## {title}\n\n{textwrap.fill(text, 100)}\n\n{head}\n" + "\n".join(rows) + "\n"


def page() -> str:
    return "\n".join(
        [
            HEADER,
            section(
                "Pairs",
                "`preference_loss(NAME, pairs, ...)`, or a list of names with `loss_weights`; `rlhf dpo --loss "
                "NAME[,NAME]` and `rlhf online-dpo --loss NAME`. Values by hand: "
                "`tests/losses/test_preference_table.py`.",
                preference_rows(preference.PREFERENCE_LOSSES, "paired"),
            ),
            section(
                "Single completions with a label",
                "`unpaired_preference_loss(NAME, ...)`; `rlhf kto --loss NAME`. x is a completion's log-ratio. "
                "Values by hand: `tests/losses/test_unpaired.py`.",
                preference_rows(unpaired.UNPAIRED_LOSSES, "unpaired"),
            ),
            section(
                "Ranked lists",
                "`ranked_preference_loss(NAME, ...)` over K completions, best first or with scores; `rlhf rrhf --loss "
                "NAME`. Values by hand: `tests/losses/test_ranking.py`.",
                preference_rows(ranking.RANKED_LOSSES, "ranked"),
            ),
            section(
                "Sampled tokens",
                "`policy_loss(NAME, ...)`: a surrogate, the level of its ratio and the aggregation over tokens; each "
                "can be overridden. `rlhf grpo --loss NAME`. ratio = probability under the new policy / under the "
                "policy that sampled, A the advantage. The recipe is what the paper prescribes besides, where it "
                "differs from GRPO (`kl_coef=0.04`, advantages scaled by the std of their group): `rlhf grpo` uses it "
                "unless its settings say otherwise, `policy_loss` does not. Values by hand: "
                "`tests/losses/test_policy.py`.",
                policy_rows(),
                needs="recipe",
            ),
            section("Other losses", "Functions that are not in a table.", function_rows()),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(re.findall('^[|] `', page(), re.MULTILINE))} losses", file=sys.stderr)
