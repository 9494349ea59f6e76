"""Settings: an invalid one is refused by name and value, and all of them survive YAML."""

import dataclasses
import importlib
import math
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml

from rlhf_core.cli import JOBS
from rlhf_core.config import (
    Bounds,
    CachedReferenceConfig,
    ConfigError,
    DataConfig,
    Fraction,
    KLConfig,
    LoraConfig,
    LossOptions,
    ModelConfig,
    NonNegativeInt,
    OptimConfig,
    PolicyGradientConfig,
    PositiveFloat,
    PositiveInt,
    ReferenceConfig,
    RunConfig,
    Settings,
    ValueConfig,
    from_dict,
    kinds_of,
    to_dict,
)

RUN = {"model": "m", "data": "d.jsonl", "output": "o"}
SCORED = RUN | {"reward_function": "module:function"}
LEAST = {  # the least that each job needs, where it is not RUN
    **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "online-dpo", "raft", "rrhf"), SCORED),
    "generate": {"model": "m", "prompt": "Once"},
    "evaluate": {"model": "m", "baseline": "b", "data": "d.jsonl", "reward_function": "module:function"},
    "merge": {"model": "m", "output": "o"},
    "score": {"model": "m", "data": "d.jsonl"},
    "demo": {},
}
every_job = pytest.mark.parametrize("job", JOBS)


@dataclass(frozen=True, kw_only=True)
class Job(LossOptions, PolicyGradientConfig):
    """A job with all groups, whose own defaults differ from those of the groups."""

    job: ClassVar[str] = "job"

    optim: OptimConfig = OptimConfig(schedule="linear", eps=1e-5)
    kl: KLConfig = KLConfig(control="adaptive")
    value: ValueConfig = ValueConfig(coef=0.5)
    eval_data: DataConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Offline(RunConfig):
    """A job on fixed data."""

    reference: CachedReferenceConfig = CachedReferenceConfig(cache="off")
    eval_data: DataConfig | None = None


def config_of(job: str) -> type:
    module, name, _, _ = JOBS[job]
    return getattr(importlib.import_module(module), name)


def make(**more: object) -> Job:
    return from_dict(Job, SCORED | more)


def refusal(cls: type, **values: object) -> str:
    """Return the message of the ConfigError that the settings cause."""
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, values)
        pytest.fail(f"{values} was accepted")
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------- bounds


@dataclass(frozen=True, kw_only=True)
class Small(Settings):
    """A setting of every kind."""

    count: PositiveInt = 1
    limit: PositiveInt | None = None
    start: NonNegativeInt = 0
    rate: PositiveFloat = 1.0
    share: Fraction = 0.5
    smoothing: Annotated[float, Bounds(least=0, below=0.5)] = 0.0
    ratio: Annotated[float, Bounds(above=1, most=3)] = 2.0
    seed: Annotated[int, Bounds(least=0, below=9, words="a digit")] = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weights: tuple[PositiveFloat, ...] | None = None
    names: tuple[str, ...] = ("a",)
    mode: Literal["a", "b"] = "a"
    text: str | None = None
    switch: bool = False
    optim: OptimConfig | None = None


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", 0, "more than 0"),
        ("limit", 0, "more than 0, or none"),
        ("start", -1, "0 or more"),
        ("rate", 0.0, "more than 0"),
        ("rate", math.nan, "a finite number"),
        ("share", -0.1, "between 0 and 1"),
        ("share", 1.1, "between 0 and 1"),
        ("smoothing", -0.1, "0 <= smoothing < 0.5"),
        ("smoothing", 0.5, "0 <= smoothing < 0.5"),
        ("ratio", 1.0, "1 < ratio <= 3"),
        ("ratio", 3.1, "1 < ratio <= 3"),
        ("seed", 9, "a digit"),
        ("betas", (0.9, 1.5), "between 0 and 1"),
        ("weights", (1.0, 0.0), "more than 0, or none"),
    ],
)
def test_a_number_out_of_bounds(field, value, expected):
    assert refusal(Small, **{field: value}) == f"{field}={value!r}: expected {expected}"
    with pytest.raises(ConfigError):
        Small(**{field: value})


@dataclass(frozen=True, kw_only=True)
class Smaller(Small):
    """Other defaults, and other bounds."""

    count: int = 5
    start: Annotated[int, Bounds(least=2)] = 2


def test_a_new_default_keeps_the_bounds():
    assert Smaller().count == 5
    assert refusal(Smaller, count=0) == "count=0: expected more than 0"
    assert refusal(Smaller, start=1) == "start=1: expected 2 or more"


def test_bounds_that_belong_to_the_range():
    config = Small(count=1, limit=1, start=0, share=1, smoothing=0, ratio=3, seed=8, betas=(0, 1), weights=1e-9)
    assert (config.share, config.ratio, config.betas, config.weights) == (1.0, 3.0, (0.0, 1.0), (1e-9,))


# ---------------------------------------------------------------------------------------------- the ranges of every job

INFINITE = [math.inf, math.nan]
BAD = {
    "output": [""],
    "batch_size": [0, -1],
    "micro_batch_size": [0],
    "lora.r": [0, -1],
    "lora.alpha": [0, -1],
    "lora.dropout": [-0.1, 1.0, math.nan],
    "lora.target_modules": [["a", "a"], [""]],
    "lora.modules_to_save": [["a", "a"], [""]],
    "quantize": ["2bit"],
    "tolerance": [0, -1, *INFINITE],
    "micro_batch_tokens": [0],
    "max_tokens_per_batch": [0],
    "epochs": [0, -0.5, *INFINITE],
    "max_steps": [0],
    "seed": [-1, 2**63],
    "kernels": ["cuda"],
    "save_every": [-1],
    "keep_checkpoints": [0],
    "eval_every": [-1],
    "optim.lr": [0, -1e-5, *INFINITE],
    "optim.schedule": ["cosin"],
    "optim.warmup_ratio": [-0.1, 1],
    "optim.weight_decay": [-0.1, *INFINITE],
    "optim.betas": [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9]],
    "optim.eps": [0, math.inf],
    "optim.max_grad_norm": [0, -1, *INFINITE],
    "sampling.max_new_tokens": [0],
    "sampling.temperature": [-1, *INFINITE],
    "sampling.batch_size": [0],
    "sampling.engine": ["vllm"],
    "sampling.kv_cache": ["paged"],
    "sampling.server_timeout": [0, -1, *INFINITE],
    "sampling.server_retries": [-1],
    "center_coef": [-0.1, math.nan],
    "learn_from": ["pair"],
    "attributes": [["a"], ["a:1", "a:2"]],
    "ensemble": [0, -1],
    "neftune_alpha": [-1, *INFINITE],
    "router_aux_coef": [-0.1, *INFINITE],
    "reward_lcb": [-0.1, *INFINITE],
    "name": [" "],
    "combine": ["mean"],
    "loss": ["sigmoide"],
    "loss_weights": [[0.0], [1.0, 2.0]],
    "loss_options": ["nothing:1", "tau"],
    "desirable_weight": [0, *INFINITE],
    "undesirable_weight": [0, *INFINITE],
    "f_divergence": ["kl"],
    "f_alpha": INFINITE,
    "ld_alpha": [-0.1, 1.1],
    "keep_best": ["loss", "eval_loss"],
    "beta": [0, -1, *INFINITE],
    "label_smoothing": [-0.1, 0.5],
    "minibatch_size": [0],
    "rollout_epochs": [0],
    "num_generations": [0],
    "clip": [0, -0.2, *INFINITE],
    "gamma": [-0.1, 1.1],
    "lam": [-0.1, 1.1],
    "ratio_limit": [1, *INFINITE],
    "entropy_coef": [-0.1, math.nan],
    "ptx_coef": [-0.1, math.nan],
    "xpo_alpha": [-0.1, *INFINITE],
    "min_score": INFINITE,
    "kl.coef": [-0.1, math.inf],
    "kl.estimator": ["k4"],
    "kl.apply_to": ["score"],
    "kl.control": ["steered"],
    "kl.target": [0, *INFINITE],
    "kl.horizon": [0],
    "kl.coef_end": [-0.1, *INFINITE],
    "kl.stop": [0, *INFINITE],
    "kl_coef": [-0.1, *INFINITE],
    "value.model": ["heads"],
    "value.coef": [-0.1, math.nan],
    "value.clip": [0, math.inf],
    "value.warmup": [-1],
    "score.center": [-1],
    "score.scale": ["std"],
    "score.clip": [0, *INFINITE],
    "score.missing_eos": ["never"],
    "score.missing_eos_penalty": [-0.1, math.nan],
    "score.overlong_buffer": [-1, 65],
    "reference.update": ["copy"],
    "reference.every": [0],
    "reference.rate": [-0.1, 1.1],
    "reference.cache": ["sometimes"],
    "recorded": ["always"],
    "importance": ["words"],
    "importance_max": [1, 0, *INFINITE],
    "off_policy_threshold": [0, *INFINITE],
    "scale": ["groups"],
    "keep": ["worst"],
    "baseline": ["median"],
    "dynamic_sampling": [-1],
    "reward_function": [["module"], ["module:"], [":function"]],
    "checker": [[""]],
    "reward_weights": [[0.0], [1.0, 2.0]],
    "reward_timeout": [0, -1, *INFINITE],
} | {
    f"{group}.{name}": values
    for group in ("model", "baseline", "reference", "reward_model", "data", "eval_data", "ptx_data")
    for name, values in {
        **({"path": [""], "dtype": ["half"], "layout": ["sparse"]} if "data" not in group else {}),
        **({"path": [""], "skip_bad_rows": [-1], "limit": [0], "max_length": [1]} if "data" in group else {}),
        **({"truncation": ["right"], "preview": [-1], "weights": [[0.0], [1.0, 2.0]]} if "data" in group else {}),
        **({"formatting": ["module", "module:"], "turns": ["first"], "system": [" "]} if "data" in group else {}),
        **({"attributes": [["a", "a:1"], ["a:"]], "step_separator": [""]} if "data" in group else {}),
    }.items()
}  # fmt: skip
UNBOUNDED = {(job, name) for job in ("generate", "evaluate", "score", "demo") for name in ("seed", "output")}


def leaves(cls: type, prefix: str = ""):
    """Yield (dotted name, type without None) of every setting, groups opened."""
    for name, kind in kinds_of(cls).items():
        if kind.is_group:
            yield from leaves(kind.type, f"{prefix}{name}.")
        else:
            yield prefix + name, kind.type


def nested(name: str, value: object) -> dict:
    """`optim.lr`, 1 -> {"optim": {"lr": 1}}; groups that need a path get one."""
    group, _, rest = name.partition(".")
    if not rest:
        return {name: value}
    path = {"path": "p"} if group in ("model", "baseline", "reward_model") or "data" in group else {}
    return {group: path | {rest: value}}


@every_job
def test_every_value_out_of_range_is_refused_by_name_and_value(job):
    cls = config_of(job)
    for name, kind in leaves(cls):
        for value in BAD.get(name, []) if (job, name) not in UNBOUNDED else []:
            seen = float(value) if kind is float else tuple(value) if isinstance(value, list) else value
            assert refusal(cls, **LEAST.get(job, RUN) | nested(name, value)).startswith(f"{name}={seen!r}: expected ")


@every_job
def test_no_number_goes_without_a_range(job):
    numbers = [name for name, kind in leaves(config_of(job)) if kind in (int, float) or typing.get_origin(kind)]
    assert [name for name in numbers if name not in BAD and (job, name) not in UNBOUNDED] == []


@every_job
def test_the_least_settings_survive_yaml(job):
    cls, least = config_of(job), LEAST.get(job, RUN)
    config = from_dict(cls, least)
    assert from_dict(cls, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert cls(**least) == config


def test_every_kind_of_setting_survives_yaml():
    changed = dict(
        count=7, limit=8, start=9, rate=0.5, share=0.25, smoothing=0.1, ratio=1.5, seed=3, betas=(0.5, 0.6),
        weights=(3.0, 1.0), names=("a,b", "c"), mode="b", text="x", switch=True, optim=OptimConfig(lr=1e-3),
    )  # fmt: skip
    config, default = Small(**changed), Small()
    assert all(getattr(config, name) == value != getattr(default, name) for name, value in changed.items())
    assert {*changed} == {field.name for field in dataclasses.fields(Small)}
    assert from_dict(Small, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


# -------------------------------------------------------------------------------------------- settings that go together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_function": None}, "reward_model, reward_function, checker: expected at least one of them"),
        (
            {"reward_model": "r", "reward_weights": "1"},
            "reward_weights=(1.0,): expected a number for each of reward_model",
        ),
        ({"reward_function": "a:f,b"}, "reward_function=('a:f', 'b'): expected module:function"),
        ({"reward_function": "a:f,b:g,a:f"}, "reward_function=('a:f', 'b:g', 'a:f'): expected each of them once"),
        ({"checker": ["regex:a,b", "regex:a,b"]}, "checker=('regex:a,b', 'regex:a,b'): expected each of them once"),
        ({"reward_lcb": 1}, "reward_lcb=1.0: expected a reward_model beside it"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature=0.0: expected more than 0, to learn"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout=0.1: expected 0"),
        ({"micro_batch_tokens": 100}, "micro_batch_tokens=100: expected none"),
        ({"resume": True, "overwrite": True}, "overwrite=True: expected False with resume"),
        ({"score": {"overlong_buffer": 65}}, "score.overlong_buffer=65: expected 0 to sampling.max_new_tokens=64"),
        ({"score": {"missing_eos_penalty": 2}}, "score.missing_eos_penalty=2.0: expected missing_eos=subtract or rep"),
        ({"kl": {"coef": 0}}, "kl.coef=0.0: expected more than 0 with control='adaptive'"),
        ({"kl": {"coef": None}}, "kl.coef=None: expected a number, 0 or more"),
        ({"kl": {"apply_to": "both"}}, "kl.apply_to='both': expected estimator='full'"),
        ({"recorded": "on", "kl": {"estimator": "full"}}, "recorded='on': expected off or auto"),
        ({"recorded": "on", "importance": "token"}, "importance='token': expected none with recorded"),
        ({"value": {"model": "policy", "detach": True}}, "value.detach=True: expected model='head'"),
        ({"reference": {"dtype": "bfloat16"}}, "reference.dtype='bfloat16': expected a path beside it"),
    ],
)
def test_settings_that_exclude_each_other(changes, message):
    assert refusal(Job, **SCORED | changes).startswith(message)


def test_settings_that_go_together():
    assert make(kl={"coef": 0, "target": None}).kl.coef == 0
    assert make(kl={"coef": 0, "control": "linear"}).kl.coef == 0
    assert make(kl={"apply_to": "both", "estimator": "full"}).kl.apply_to == "both"
    assert make(score={"missing_eos": "replace", "missing_eos_penalty": 2}).score.missing_eos_penalty == 2
    assert make(score={"overlong_buffer": 64}).score.overlong_buffer == 64
    assert make(reference={"path": "r", "dtype": "bfloat16"}).reference.options()["dtype"] == "bfloat16"
    assert refusal(Offline, **RUN, reference={"cache": "on", "update": "ema"}) == (
        "reference.cache='on': expected auto or off, because the reference moves"
    )


def test_generate_and_evaluate_want_one_of_two_sources():
    for values in ({"model": "m"}, {"model": "m", "prompt": "Once", "data": "d.jsonl"}):
        assert "prompt, data" in refusal(config_of("generate"), **values)
    message = refusal(config_of("evaluate"), model="m", baseline="b", data="d.jsonl")
    assert message == "reward_model, reward_function, checker: expected at least one of them"


# ----------------------------------------------------------------------------------------------------- names and groups


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batchsize": 8}, "batchsize: no setting of that name; did you mean batch_size?"),
        ({"batch-size": 8}, "batch-size: no setting of that name; did you mean batch_size?"),
        ({"optim": {"weight_decai": 0}}, "optim.weight_decai: no setting of that name; did you mean weight_decay?"),
        ({"xyz": 1}, "xyz: no setting of that name"),
        ({1: 2}, "1: no setting of that name"),
        ({"optim": "fast"}, "optim='fast': expected a group of settings"),
        ({"optim": None}, "optim=None: expected a group of settings"),
        ({"data": ["a", "b"]}, "data=['a', 'b']: expected a group of settings"),
        ({"model": {"dtype": "float32"}}, "model.path is missing"),
        ({"eval_data": {"limit": 3}}, "eval_data.path is missing"),
        ({"kl_coef": 1}, "kl_coef: no setting of that name"),  # this job has no group `kl`
    ],
)
def test_wrong_names_and_groups(more, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Offline, RUN | more)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("ppo_epochs", 2, "rollout_epochs"),
        ("kl_coef", 0.1, "kl.coef"),
        ("kl_in", "loss", "kl.apply_to"),
        ("value_clip", None, "value.clip"),
        ("score_scale", "scale", "score.scale"),
        ("missing_eos_penalty", 1, "score.missing_eos_penalty, with score.missing_eos=subtract or replace"),
        ("mask_truncated", True, "score.missing_eos=mask"),
        ("reference_rate", 0.1, "reference.rate"),
        ("clip_high", 0.3, "loss_options=clip_high:NUMBER"),
    ],
)
def test_an_old_name_is_an_error_that_gives_the_new_one(old, value, new):
    assert refusal(Job, **SCORED, **{old: value}) == f"{old}: renamed to {new}"


def test_an_old_value_of_what_is_now_a_group():
    assert refusal(Job, **SCORED, value="head") == "value='head': renamed to value.model"


@pytest.mark.parametrize("name", RUN)
def test_a_missing_setting_is_named(name):
    with pytest.raises(ConfigError, match=f"^{name} is missing$"):
        from_dict(Offline, {key: value for key, value in RUN.items() if key != name})


@pytest.mark.parametrize("written", ["pairs.jsonl", Path("pairs.jsonl"), {"path": "pairs.jsonl"}])
def test_a_group_with_a_path_may_be_the_path_alone(written):
    values = RUN | {"data": written, "eval_data": written, "reference": written}
    for config in (from_dict(Offline, values), Offline(**values)):
        assert config.data == config.eval_data == DataConfig(path="pairs.jsonl")
        assert config.reference == CachedReferenceConfig(path="pairs.jsonl", cache="off")
        assert type(config.data.path) is str


def test_paths_of_python_become_texts_that_yaml_can_write():
    config = RunConfig(model=ModelConfig(path=Path("m")), data=DataConfig(path=Path("d")), output=Path("o"))
    assert yaml.safe_load(yaml.safe_dump(to_dict(config)))["model"]["path"] == "m"
    assert config.output == "o"


def test_a_group_keeps_the_defaults_of_its_job():
    for config in (make(optim={"lr": 1e-3}, kl={"coef": 0.2}), Job(**SCORED, optim={"lr": 1e-3}, kl={"coef": 0.2})):
        assert config.optim == OptimConfig(lr=1e-3, schedule="linear", eps=1e-5)
        assert config.kl == KLConfig(coef=0.2, control="adaptive")
    assert make().value == ValueConfig(coef=0.5)
    assert make(lora={"r": 4}).lora == LoraConfig(r=4)


def test_a_group_made_in_python_is_taken_as_it_is():
    assert make(optim=OptimConfig(lr=1e-3)).optim.schedule == "cosine"
    with pytest.raises(ConfigError, match=r"^schedule='cosin': expected one of cosine, linear, constant"):
        Job(**SCORED, optim=OptimConfig(schedule="cosin"))


def test_how_a_model_and_a_reference_are_loaded():
    load = dict(dtype="float16", layout="padded", revision="main", trust_remote_code=True)
    assert ModelConfig(path="m", **load).options() == load | {"gradient_checkpointing": False}
    assert ReferenceConfig(path="m", **load).options() == load


# --------------------------------------------------------------------------------------------------- a loss by its name


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("a:1,b:2", ("a:1", "b:2")),
        (["a:1"], ("a:1",)),
        ({"a": 1, "b": "2"}, ("a:1", "b:2")),
        ({}, None),
        (None, None),
        ("none", None),
    ],
)
def test_options_of_a_loss_as_texts_or_as_a_dictionary(written, options):
    assert make(loss_options=written).loss_options == Job(**SCORED, loss_options=written).loss_options == options


def test_the_module_of_a_loss_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_loss_of_ones_own.py").touch()
    make(loss_module="a_loss_of_ones_own")
    assert sys.modules.pop("a_loss_of_ones_own")
    with pytest.raises(ValueError, match="'no_such_losses': No module named 'no_such_losses'"):
        make(loss_module="no_such_losses")


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("written", ["5e-6", "5.0e-6", "0.000005"])
def test_numbers_that_yaml_reads_as_texts(written):
    assert from_dict(OptimConfig, yaml.safe_load(f"lr: {written}")).lr == 5e-6


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("16", 16),
        (16.0, 16),
        ("1e3", 1000),
        ("2.0", 2),
        (2**53 + 1, 2**53 + 1),
        (str(2**53 + 1), 2**53 + 1),
        ("007", 7),
    ],
)
def test_whole_numbers(value, expected):
    config = from_dict(Small, {"count": value})
    assert config.count == expected
    assert type(config.count) is int


@pytest.mark.parametrize("value", [2.5, "2.5", "many", True, None, [1], {}, "", "nan", 10**400])
def test_what_is_not_a_whole_number(value):
    assert refusal(Small, count=value) == f"count={value!r}: expected a whole number"


@pytest.mark.parametrize("value", ["fast", True, None, [1.0], "inf"])
def test_what_is_not_a_number(value):
    assert refusal(Small, optim={"lr": value}) == f"optim.lr={value!r}: expected a finite number"


@pytest.mark.parametrize("value", ["0.9,0.95", "0.9, 0.95", [0.9, 0.95], (0.9, "0.95"), ["9e-1", "95e-2"]])
def test_tuples(value):
    assert from_dict(Small, {"betas": value}).betas == (0.9, 0.95)


@pytest.mark.parametrize("value", ["0.9", [0.9], [0.9, 0.95, 0.99], 0.9, None])
def test_tuples_of_another_length(value):
    assert refusal(Small, betas=value) == f"betas={value!r}: expected 2 numbers"


def test_tuples_of_any_length():
    assert from_dict(Small, {"names": r"a\,b,c", "weights": 3}) == Small(names=("a,b", "c"), weights=(3.0,))
    assert refusal(Small, names=[]) == "names=[]: expected one or more, separated by commas"


@pytest.mark.parametrize("value", ["true", "yes", 1, 0, None])
def test_what_is_not_true_or_false(value):
    assert refusal(Small, switch=value) == f"switch={value!r}: expected true or false"


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}])
def test_what_is_not_a_text(value):
    assert refusal(Small, text=value) == f"text={value!r}: expected a text"


@pytest.mark.parametrize("value", [None, "none", "None", "null"])
def test_none(value):
    config = make(kl={"target": value}, optim={"max_grad_norm": value}, max_steps=value, reference=value)
    assert (config.kl.target, config.optim.max_grad_norm, config.max_steps) == (None, None, None)
    assert config.reference == ReferenceConfig()


def test_a_group_that_may_be_left_out_can_be_switched_off_again():
    for none in ("none", {"path": "none"}, {"path": "none", "limit": 3}, None):
        assert from_dict(Offline, RUN | {"eval_data": none}).eval_data is None
    assert refusal(Offline, **RUN, eval_data={"path": None}) == "eval_data.path=None: expected a text"


def test_an_old_name_in_python_is_an_error_that_names_the_new_one():
    from rlhf_core.trainers.ppo import PPOConfig

    required = dict(model="m", data="d", output="o", reward_function="module:function")
    with pytest.raises(ConfigError, match=r"^kl_coef: renamed to kl\.coef$"):
        PPOConfig(**required, kl_coef=0.1)
    with pytest.raises(ConfigError, match="^kl_coeff: no setting of that name"):
        PPOConfig(**required, kl_coeff=0.1)
