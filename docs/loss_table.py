"""Writes docs/losses.md: every loss by name, from the code. `make docs` runs it; a test holds the page to it.

A loss's row is what its own docstring says: the first line names it and its paper, the second paragraph is its formula.
What it needs comes from its entry in the table, where TRL has it from `TRL` below, and what proves it from the tests.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.losses import policy, preference, ranking, reward, sft, unpaired, value
from rlhf_core.losses.pairs import PreferenceLoss
from rlhf_core.losses.registry import options_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "losses.md"

TRL = {  # of TRL 1.16.0; what is not here it does not have
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

BY_HAND = {  # where each family's numbers are derived by hand, keyed by name
    "paired": "tests/losses/test_preference_table.py",
    "unpaired": "tests/losses/test_unpaired.py",
    "ranked": "tests/losses/test_ranking.py",
    "policy": "tests/losses/test_policy.py",
}

FUNCTIONS = {  # losses with a signature of their own, and the test file of each
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

Written by `make docs` from the code; `tests/test_docs.py` fails where the two differ. c and r are the chosen and the
rejected completion, l a completion's log-prob and L its length in tokens, a and b the log-ratios l - l_ref of c and r,
d = a - b, e the label smoothing. "Needs": the reference's log-probs, and whether log-probs are averaged over tokens
instead of summed. "Takes": label smoothing (e), another f-divergence (f), LD-DPO (ld), pair weights such as WPO's (w),
and the loss's own options with their defaults. "Proof": a number derived by hand (h), float64 gradients (g), golden
numbers of another library (p), a closed-form optimum (c); the files are named below each table.
"""


def documented(function: Callable) -> tuple[str, str]:
    """The first line of a docstring, and its second paragraph, the formula."""
    title, formula, *_ = [*inspect.getdoc(function).split("\n\n"), ""]
    if not formula or re.match(r"(Args|Returns|Raises)\b", formula):
        raise SystemExit(f"{function.__name__}: the second paragraph of its docstring must be its formula")
    return " ".join(title.split()).rstrip("."), "\n".join(line.strip() for line in formula.splitlines())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def code(lines: str) -> str:
    """A formula as code, a line to each of its lines."""
    return "<br>".join(f"`{cell(line)}`" for line in lines.splitlines() if line)


def options(function: Callable) -> list[str]:
    own = {k: v for k, v in options_of(function).items() if k not in ("beta", "label_smoothing")}
    return [f"`{name}={default}`" for name, default in own.items()]


def strings_in(file: Path) -> set[str]:
    """Every string that stands alone in a test file: the names it is about."""
    return {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)} - {None}


def proofs(name: str, family: str) -> str:
    """Letters of what the tests hold this name to. A name without a number by hand has no place in the table."""
    tests = ROOT / "tests"
    if name not in strings_in(ROOT / BY_HAND[family]):
        raise SystemExit(f"{name}: no number by hand in {BY_HAND[family]}")
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
        takes = [smoothed, *(letter for letter, has in letters if has), *options(entry.function)]
        yield row(name, title, formula, needs, takes, proofs(name, family))


def policy_rows() -> Iterator[str]:
    for name, entry in policy.POLICY_LOSSES.items():
        title, formula = documented(entry.surrogate)
        takes = [f"aggregation `{entry.aggregation}`", f"ratio of the {entry.ratio_level}", *options(entry.surrogate)]
        yield row(name, entry.source or title, formula, [], takes, proofs(name, "policy"))


def function_rows() -> Iterator[str]:
    for function, file in FUNCTIONS.items():
        title, formula = documented(function)
        if not (ROOT / file).exists():
            raise SystemExit(f"{function.__name__}: {file} is not there")
        yield row(function.__name__, title, formula, [], [], f"`{file}`")


def row(name: str, title: str, formula: str, needs: list[str], takes: list[str], proof: str) -> str:
    lists = [", ".join(filter(None, each)) for each in (needs, takes)]
    cells = [f"`{name}`", cell(title), code(formula), *lists, TRL.get(name, ""), proof]
    return "| " + " | ".join(cells) + " |"


def section(title: str, text: str, rows: Iterator[str]) -> str:
    head = "| name | loss | formula | needs | takes | in TRL 1.16 | proof |\n|---|---|---|---|---|---|---|"
    return f"## {title}\n\n{text}\n\n{head}\n" + "\n".join(rows) + "\n"


def page() -> str:
    return "\n".join(
        [
            HEADER,
            section(
                "Pairs",
                "`preference_loss(NAME, ...)`, or a list of names with weights; `rlhf dpo --loss NAME[,NAME]` runs "
                "them all. Numbers: `tests/losses/test_preference_table.py`.",
                preference_rows(preference.PREFERENCE_LOSSES, "paired"),
            ),
            section(
                "Single completions with a label",
                "`unpaired_preference_loss(NAME, ...)`; `rlhf kto --loss NAME`. x is a completion's log-ratio. "
                "Numbers: `tests/losses/test_unpaired.py`.",
                preference_rows(unpaired.UNPAIRED_LOSSES, "unpaired"),
            ),
            section(
                "Ranked lists",
                "`ranked_preference_loss(NAME, ...)` over K completions, best first or with scores. Numbers: "
                "`tests/losses/test_ranking.py`.",
                preference_rows(ranking.RANKED_LOSSES, "ranked"),
            ),
            section(
                "Sampled tokens",
                "`policy_loss(NAME, ...)`: a surrogate, the ratio it looks at and how tokens are averaged; each can be "
                "overridden. `rlhf grpo --loss NAME` runs any of them. ratio = new / behaviour probability, A the "
                "advantage. Numbers: `tests/losses/test_policy.py`.",
                policy_rows(),
            ),
            section("The rest", "Functions of their own signature.", function_rows()),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(re.findall('^[|] `', page(), re.MULTILINE))} losses", file=sys.stderr)
