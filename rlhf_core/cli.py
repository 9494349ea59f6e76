"""`rlhf JOB --config FILE --field value`: every job's settings, from a YAML file and then from the command line.

The options are the fields of the job's config, and the help is the sentence under each field. Nothing heavy is imported
before a job is known. With RLHF_TRACEBACK=1 in the environment an error is raised, not only said.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import re
import sys
import textwrap
import typing
from dataclasses import MISSING
from typing import Any, Literal

from rlhf_core.config import ConfigError, alternatives, did_you_mean, from_dict

JOBS = {  # name: (module, config class, function, one line)
    "sft": ("rlhf_core.trainers.sft", "SFTConfig", "train", "fine-tune on prompts with completions, or on text"),
    "reward": ("rlhf_core.trainers.reward", "RewardConfig", "train", "train a reward model on pairs, lists or steps"),
    "dpo": ("rlhf_core.trainers.dpo", "DPOConfig", "train", "train a policy directly on preference pairs"),
    "kto": ("rlhf_core.trainers.kto", "KTOConfig", "train", "the same on single completions, labelled good or bad"),
    "orpo": ("rlhf_core.trainers.dpo", "ORPOConfig", "train", "preferences and fine-tuning at once, no reference"),
    "simpo": ("rlhf_core.trainers.dpo", "SimPOConfig", "train", "DPO on mean log-probs, no reference"),
    "cpo": ("rlhf_core.trainers.dpo", "CPOConfig", "train", "DPO against a uniform reference, and likelihood"),
    "ipo": ("rlhf_core.trainers.dpo", "IPOConfig", "train", "DPO with a margin that is aimed at"),
    "ppo": ("rlhf_core.trainers.ppo", "PPOConfig", "train", "improve a policy against a reward"),
    "grpo": ("rlhf_core.trainers.grpo", "GRPOConfig", "train", "the same by groups of samples: GRPO, DAPO, GSPO, ..."),
    "rloo": ("rlhf_core.trainers.rloo", "RLOOConfig", "train", "the same, each completion against its prompt's others"),
    "reinforce": ("rlhf_core.trainers.reinforce", "ReinforceConfig", "train", "REINFORCE, ReMax or REINFORCE++"),
    "online-dpo": ("rlhf_core.trainers.online_dpo", "OnlineDPOConfig", "train", "DPO on pairs sampled anew, XPO"),
    "raft": ("rlhf_core.trainers.raft", "RAFTConfig", "train", "fine-tune on the best of the policy's own completions"),
    "rrhf": ("rlhf_core.trainers.rrhf", "RRHFConfig", "train", "rank the policy's own completions by their scores"),
    "generate": ("rlhf_core.rollout.generate", "GenerateConfig", "generate", "write a model's completions of prompts"),
    "evaluate": ("rlhf_core.evaluation.compare", "EvaluateConfig", "evaluate", "score, KL and win rate of two models"),
    "merge": ("rlhf_core.models.merge", "MergeConfig", "merge", "fold an adapter into the weights of its model"),
    "score": ("rlhf_core.evaluation.score", "ScoreConfig", "score", "score completions with a reward model"),
    "demo": ("rlhf_core.demo.run", "DemoConfig", "demo", "the whole road on a small invented language, in minutes"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one job; returns the exit status: 0, 1 for a failed job, 2 for a wrong command, 130 for an interruption."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        import rlhf_core

        print(f"rlhf-core {rlhf_core.__version__}")
        return 0
    name = arguments[0]
    if name not in JOBS:
        print(f"rlhf: no job named {name!r}{did_you_mean(name, JOBS)}\n\n{overview()}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rlhf_core.data").setLevel(logging.INFO)  # what was read, and how fast
    module_name, config_name, function_name, summary = JOBS[name]
    try:
        module = importlib.import_module(module_name)
        config = parse(name, getattr(module, config_name), arguments[1:], summary)
        getattr(module, function_name)(config)
    except ConfigError as error:
        print(f"rlhf {name}: {error}\n(rlhf {name} --help lists every setting)", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, FloatingPointError) as error:  # bad data, missing files: said, not traced
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        print(f"rlhf {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or f"rlhf {name}: stopped; the step in progress was not kept", file=sys.stderr)
        return 130
    return 0


def overview() -> str:
    lines = [f"  {name:<10} {summary}" for name, (_, _, _, summary) in JOBS.items()]
    return "\n".join(
        [
            "usage: rlhf JOB [--config FILE.yaml] [--setting value ...]",
            "",
            *lines,
            "",
            "rlhf JOB --help explains every setting of a job. The first run: rlhf demo",
        ]
    )


def parse(job: str, kind: type, arguments: list[str], summary: str) -> Any:
    """The job's config from its defaults, then the --config files, then the options."""
    parser = build_parser(job, kind, summary)
    options, unknown = parser.parse_known_args(_joined([_with_hyphens(word) for word in arguments]))
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: expected an option that starts with --")
        known = [option for action in parser._actions for option in action.option_strings]
        inside = [option for option in known if option.endswith(f".{word.lstrip('-')}")]  # --lr for --optim.lr
        hint = f"; did you mean {inside[0]}?" if inside else did_you_mean(word, known)
        raise ConfigError(f"{word}: no setting of that name{hint}")
    values: dict[str, Any] = {}
    for file in options.__dict__.pop("config") or []:
        merge(values, read_yaml(file))
    for path, value in vars(options).items():
        *groups, name = path.split(".")
        merge(values, functools.reduce(lambda inner, group: {group: inner}, reversed(groups), {name: value}))
    return from_dict(kind, values)


def _with_hyphens(word: str) -> str:
    """--batch_size=4 -> --batch-size=4: underscores work as well."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _joined(words: list[str]) -> list[str]:
    """--reward-weights -1,2 -> --reward-weights=-1,2, which argparse would take for an option without a value."""
    joined: list[str] = []
    for word in words:
        if re.match(r"-[.\d]", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            values = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"config={file!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config={file!r} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config={file!r}: expected settings, one `name: value` to a line")
    return values


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Put `more` over `values`, group by group."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), str):  # a path alone, and now its other settings
            values[name] = {"path": values[name]}
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            merge(values[name], value)
        else:
            values[name] = value


# ---------------------------------------------------------------------------------------------------------- the options


def build_parser(job: str, kind: type, summary: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"rlhf {job}",
        usage=f"rlhf {job} [--config FILE.yaml] [--setting value ...]",
        description=inspect.getdoc(kind) or summary,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=None, metavar="FILE", help="settings in YAML; the options below win"
    )
    _add_fields(parser, parser.add_argument_group("settings"), kind, "")
    return parser


def _add_fields(parser: argparse.ArgumentParser, group: Any, kind: type, prefix: str, default: Any = MISSING) -> None:
    """An option for every leaf: `data.skip_bad_rows` is --data.skip-bad-rows, and `data.path` also plain --data.

    `default` is the group's own: an object, None for a group that may be left out, MISSING for one that may not.
    """
    hints, sentences = typing.get_type_hints(kind), field_sentences(kind)
    nested = []
    for field in dataclasses.fields(kind):
        [inner, *_] = [one for one in alternatives(hints[field.name]) if one is not type(None)]
        if dataclasses.is_dataclass(inner):
            nested.append((field, inner))
            continue
        path = prefix + field.name
        names = [f"--{path.replace('_', '-')}"]
        if field.name == "path" and prefix:
            names.insert(0, f"--{prefix[:-1].replace('_', '-')}")
        options: dict[str, Any] = {"dest": path, "help": _help(field, sentences.get(field.name, ""), default)}
        if inner is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(inner)
        group.add_argument(*names, **options)
    for field, inner in nested:
        title = f"{prefix}{field.name}: {sentences.get(field.name, '').rstrip('.')}"
        _add_fields(parser, parser.add_argument_group(title), inner, f"{prefix}{field.name}.", field.default)


def _help(field: dataclasses.Field, sentence: str, group_default: Any) -> str:
    default = field.default if group_default in (None, MISSING) else getattr(group_default, field.name)
    if default is MISSING:
        note = "default: none" if group_default is None else "required"
    elif isinstance(default, tuple):
        note = f"default: {','.join(map(str, default))}"
    else:
        shown = repr(default) if isinstance(default, str) and not default.strip() else default
        note = f"default: {'none' if default is None else shown}"
    return f"{sentence} ({note})".replace("%", "%%")


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return {int: "N", float: "X", str: "TEXT", tuple[str, ...]: "TEXT,TEXT"}.get(kind, "X,X")


def field_sentences(kind: type) -> dict[str, str]:
    """The sentence under each field of a dataclass and of those it inherits from."""
    sentences: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for statement, after in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                sentences[statement.target.id] = " ".join(ast.literal_eval(after.value).split())
    return sentences


if __name__ == "__main__":
    sys.exit(main())
