"""The command `rlhf JOB --config FILE --field value`: run one job with settings from YAML files and the command line.

Every field of a job's config is an option, and the sentence under the field is its help. Nothing heavy is imported
before the job is known. With RLHF_TRACEBACK=1 in the environment an error raises instead of printing its message.
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
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple

from rlhf_core.config import ConfigError, Kind, did_you_mean, from_dict, kinds_of, new_name

JOBS = {  # name: (module, config class, function, one line)
    "sft": ("rlhf_core.trainers.sft", "SFTConfig", "train", "fine-tune on prompts with completions, or on text"),
    "reward": ("rlhf_core.trainers.reward", "RewardConfig", "train", "train a reward model on pairs, lists or steps"),
    "dpo": ("rlhf_core.trainers.dpo", "DPOConfig", "train", "train a policy directly on preference pairs"),
    "kto": ("rlhf_core.trainers.kto", "KTOConfig", "train", "learn from single completions, labelled good or bad"),
    "orpo": ("rlhf_core.trainers.dpo", "ORPOConfig", "train", "fine-tune and learn from pairs at once, no reference"),
    "simpo": ("rlhf_core.trainers.dpo", "SimPOConfig", "train", "DPO on mean log-probs, no reference"),
    "cpo": ("rlhf_core.trainers.dpo", "CPOConfig", "train", "DPO against a uniform reference, and likelihood"),
    "ipo": ("rlhf_core.trainers.dpo", "IPOConfig", "train", "DPO with a squared loss and a target margin"),
    "ppo": ("rlhf_core.trainers.ppo", "PPOConfig", "train", "improve a policy against a reward, with a critic"),
    "grpo": ("rlhf_core.trainers.grpo", "GRPOConfig", "train", "without a critic, by groups: GRPO, DAPO, GSPO, ..."),
    "rloo": ("rlhf_core.trainers.rloo", "RLOOConfig", "train", "without a critic, other samples as baseline"),
    "reinforce": ("rlhf_core.trainers.reinforce", "ReinforceConfig", "train", "REINFORCE, ReMax or REINFORCE++"),
    "online-dpo": ("rlhf_core.trainers.online_dpo", "OnlineDPOConfig", "train", "DPO or XPO on newly sampled pairs"),
    "raft": ("rlhf_core.trainers.raft", "RAFTConfig", "train", "fine-tune on the best of the policy's own completions"),
    "rrhf": ("rlhf_core.trainers.rrhf", "RRHFConfig", "train", "rank the policy's own completions by their scores"),
    "generate": ("rlhf_core.rollout.generate", "GenerateConfig", "generate", "write a model's completions of prompts"),
    "evaluate": ("rlhf_core.evaluation.compare", "EvaluateConfig", "evaluate", "score, KL and win rate of two models"),
    "merge": ("rlhf_core.models.merge", "MergeConfig", "merge", "merge an adapter into the weights of its model"),
    "score": ("rlhf_core.evaluation.score", "ScoreConfig", "score", "score completions with a reward model"),
    "demo": ("rlhf_core.demo.run", "DemoConfig", "demo", "the whole pipeline on a small invented language"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one job. Return the exit status: 0, 1 for a failed job, 2 for a wrong command, 130 for an interruption."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        import rlhf_core

        print(f"rlhf-core {rlhf_core.__version__}")
        return 0
    name, *words = arguments
    if name not in JOBS:
        print(f"rlhf: no job named {name!r}{did_you_mean(name, JOBS)}\n\n{overview()}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rlhf_core.data").setLevel(logging.INFO)  # what was read, and how fast
    module_name, config_name, function_name, summary = JOBS[name]
    try:
        module = importlib.import_module(module_name)
        kind = getattr(module, config_name)
        if {"-h", "--help", "--help-all"} & {*words}:
            print(job_help(name, kind, summary, everything="--help-all" in words))
            return 0
        getattr(module, function_name)(parse(name, kind, words, summary))
    except ConfigError as error:
        print(f"rlhf {name}: {error}\n(rlhf {name} --help-all lists every setting)", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, FloatingPointError) as error:  # bad data, missing files: no traceback
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        print(f"rlhf {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or f"rlhf {name}: stopped; the step in progress was not kept", file=sys.stderr)
        return 130
    return 0


def overview() -> str:
    """Return the help of the command itself: its jobs."""
    lines = [f"  {name:<10} {summary}" for name, (_, _, _, summary) in JOBS.items()]
    return "\n".join(
        [
            "usage: rlhf JOB [--config FILE.yaml] [--setting value ...]",
            "",
            *lines,
            "",
            "rlhf JOB --help explains the common settings of a job, --help-all all of them. The first run: rlhf demo",
        ]
    )


# ----------------------------------------------------------------------------------------------------- reading settings


def parse(job: str, kind: type, arguments: list[str], summary: str) -> Any:
    """Return the job's config: its defaults, replaced by the --config files in order, then by the options."""
    parser = build_parser(job, kind, summary)
    options, unknown = parser.parse_known_args(_joined([_with_hyphens(word) for word in arguments]))
    if unknown:
        raise _unknown_option(unknown[0].split("=")[0], kind, parser)
    values: dict[str, Any] = {}
    for file in options.__dict__.pop("config") or []:
        merge(values, read_yaml(file))
    for path, value in vars(options).items():
        *groups, name = path.split(".")
        merge(values, functools.reduce(lambda inner, group: {group: inner}, reversed(groups), {name: value}))
    return from_dict(kind, values)


def _unknown_option(word: str, kind: type, parser: argparse.ArgumentParser) -> ConfigError:
    if not word.startswith("--"):
        return ConfigError(f"{word!r}: expected an option that starts with --")
    name = word.removeprefix("--")
    if target := new_name(kind, name.removeprefix("no-").replace("-", "_")):
        dotted = re.sub(r"^[\w.]+|\w+\.\w+", lambda found: f"--{found[0].replace('_', '-')}", target)
        return ConfigError(f"{word}: renamed to {dotted}")
    known = [option for action in parser._actions for option in action.option_strings]
    inside = [option for option in known if option.endswith(f".{name}")]  # --lr for --optim.lr
    hint = f"; did you mean {inside[0]}?" if inside else did_you_mean(word, known)
    return ConfigError(f"{word}: no setting of that name{hint}")


def _with_hyphens(word: str) -> str:
    """Return --batch-size=4 for --batch_size=4: options may be written with underscores."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _joined(words: list[str]) -> list[str]:
    """Join --reward-weights -1,2 to --reward-weights=-1,2, which argparse would take for an option without a value."""
    joined: list[str] = []
    for word in words:
        if re.match(r"-[.\d]", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def read_yaml(file: str) -> dict[str, Any]:
    """Return the settings in a YAML file. ConfigError if it cannot be read or is no mapping."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            values = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"config={file!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config={file!r} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config={file!r}: expected settings, one `name: value` per line")
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


# ----------------------------------------------------------------------------------------------------- options and help


class Option(NamedTuple):
    """One setting of a job as an option: `data.limit` is --data.limit, and `data.path` also plain --data."""

    path: str
    kind: Kind
    sentence: str
    note: str  # bounds and default
    title: str  # of its group
    about: str  # its group in a sentence, "" for the job's own settings

    @property
    def names(self) -> list[str]:
        long = f"--{self.path.replace('_', '-')}"
        return [long.removesuffix(".path"), long] if long.endswith(".path") else [long]


def job_help(job: str, kind: type, summary: str, *, everything: bool = False) -> str:
    """Return the help of a job: its common settings, or everything.

    A config without a tuple `common` of dotted names has its own settings, and the paths of its groups, as common ones.
    """
    options = list(options_of(kind))
    by_name = {option.path.removesuffix(".path"): option for option in options}
    common = getattr(kind, "common", [name for name in kinds_of(kind) if name in by_name])
    if everything or len(common) == len(options):
        return build_parser(job, kind, summary).format_help().rstrip()
    parser = _empty_parser(job, kind, summary)
    group = parser.add_argument_group("common settings")
    for name in common:
        option = by_name[name]
        sentence = option.about if option.path.endswith(".path") else option.sentence
        _add(group, option._replace(sentence=sentence), option.names[:1])
    return f"{parser.format_help().rstrip()}\n\nrlhf {job} --help-all explains all {len(options)} settings."


def build_parser(job: str, kind: type, summary: str) -> argparse.ArgumentParser:
    """Return a parser with an option for every setting of a job."""
    parser = _empty_parser(job, kind, summary)
    groups: dict[str, Any] = {}
    for option in options_of(kind):
        if option.title not in groups:
            groups[option.title] = parser.add_argument_group(option.title)
        _add(groups[option.title], option, option.names)
    return parser


def _empty_parser(job: str, kind: type, summary: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"rlhf {job}",
        usage=f"rlhf {job} [--config FILE.yaml] [--setting value ...]",
        description=inspect.getdoc(kind) or summary,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "--config", action="append", default=None, metavar="FILE", help="Settings in YAML; options replace them."
    )
    return parser


def _add(group: Any, option: Option, names: list[str]) -> None:
    settings: dict[str, Any] = {"dest": option.path, "help": f"{option.sentence} ({option.note})".replace("%", "%%")}
    if option.kind.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["metavar"] = _metavar(option)
    group.add_argument(*names, **settings)


def _metavar(option: Option) -> str:
    kind = option.kind.type
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if option.path.endswith(".path"):
        return "PATH"
    return {int: "N", float: "X", str: "TEXT", tuple[str, ...]: "TEXT,TEXT"}.get(kind, "X,X")


def options_of(
    kind: type, prefix: str = "", default: Any = MISSING, title: str = "settings", about: str = ""
) -> Iterator[Option]:
    """Yield an option for every setting of a class, first its own and then those of its groups.

    `default` is that of the group itself: an object, None for a group that may be left out, MISSING for one that is
    required.
    """
    kinds, sentences = kinds_of(kind), field_sentences(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name != "path")
    for field in fields:
        if not kinds[field.name].is_group:
            note = _note(kinds[field.name], field, default)
            yield Option(prefix + field.name, kinds[field.name], sentences.get(field.name, ""), note, title, about)
    for field in fields:
        if kinds[field.name].is_group:
            sentence = sentences.get(field.name, "")
            name = prefix + field.name
            inner_title = f"{name}: {sentence.rstrip('.')}"
            yield from options_of(kinds[field.name].type, f"{name}.", field.default, inner_title, sentence)


def _note(kind: Kind, field: dataclasses.Field[Any], group_default: Any) -> str:
    """Return the bounds and the default of a setting, which end its help."""
    default = field.default if group_default in (None, MISSING) else getattr(group_default, field.name)
    if default is MISSING and group_default is MISSING:
        shown = "required"
    elif default is MISSING or default is None:
        shown = "default: none"
    elif isinstance(default, bool):
        shown = f"default: {'on' if default else 'off'}"
    elif isinstance(default, tuple):
        shown = f"default: {','.join(map(str, default))}"
    else:
        shown = f"default: {default if str(default).strip() else repr(default)}"
    return shown if kind.bounds is None else f"{kind.bounds.text(field.name)}; {shown}"


@functools.cache
def field_sentences(kind: type) -> dict[str, str]:
    """Return the sentence under each field of a dataclass and of its base classes, by the field's name."""
    sentences: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body = typing.cast(ast.ClassDef, definition).body
        for statement, after in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                target = typing.cast(ast.Name, statement.target)
                sentences[target.id] = " ".join(ast.literal_eval(after.value).split())
    return sentences


if __name__ == "__main__":
    sys.exit(main())
