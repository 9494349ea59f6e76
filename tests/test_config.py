"""Settings: a wrong one is refused by name and value, and all of them come back from YAML as they went in."""

import dataclasses
import math
import typing
from pathlib import Path

import pytest
import yaml

from rlhf_core.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OnPolicyConfig,
    OptimConfig,
    alternatives,
    from_dict,
    to_dict,
)
from rlhf_core.demo.run import DemoConfig
from rlhf_core.evaluation.compare import EvaluateConfig
from rlhf_core.evaluation.score import ScoreConfig
from rlhf_core.models.merge import MergeConfig
from rlhf_core.rollout.generate import GenerateConfig
from rlhf_core.trainers.dpo import CPOConfig, DPOConfig, IPOConfig, ORPOConfig, SimPOConfig
from rlhf_core.trainers.grpo import GRPOConfig
from rlhf_core.trainers.kto import KTOConfig
from rlhf_core.trainers.ppo import PPOConfig
from rlhf_core.trainers.reinforce import ReinforceConfig
from rlhf_core.trainers.reward import RewardConfig
from rlhf_core.trainers.rloo import RLOOConfig
from rlhf_core.trainers.sft import SFTConfig

RUN = {"model": "m", "data": "d.jsonl", "output": "o"}
LEAST = {  # the least that each config takes
    SFTConfig: RUN,
    RewardConfig: RUN,
    DPOConfig: RUN,
    IPOConfig: RUN,
    ORPOConfig: RUN,
    SimPOConfig: RUN,
    CPOConfig: RUN,
    KTOConfig: RUN,
    PPOConfig: RUN | {"reward_function": "module:function"},
    GRPOConfig: RUN | {"reward_function": "module:function"},
    RLOOConfig: RUN | {"reward_function": "module:function"},
    ReinforceConfig: RUN | {"reward_function": "module:function"},
    GenerateConfig: {"model": "m", "prompt": "Once"},
    ScoreConfig: {"model": "m", "data": "d.jsonl"},
    MergeConfig: {"model": "m", "output": "o"},
    EvaluateConfig: {"model": "m", "baseline": "b", "data": "d.jsonl", "reward_function": "module:function"},
    DemoConfig: {},
}
TRAINERS = [
    SFTConfig,
    RewardConfig,
    DPOConfig,
    SimPOConfig,
    KTOConfig,
    PPOConfig,
    GRPOConfig,
    RLOOConfig,
    ReinforceConfig,
]
every_config = pytest.mark.parametrize("cls", LEAST, ids=lambda cls: cls.__name__)


def leaves(cls: type, prefix: str = ""):
    """(dotted name, type without None, default) of every setting, groups opened."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        [kind] = [one for one in alternatives(kinds[field.name]) if one is not type(None)]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind, field.default


def nested(name: str, value: object) -> dict:
    """`optim.lr`, 1 -> {"optim": {"lr": 1}}; groups that need a path get one."""
    group, _, rest = name.partition(".")
    if not rest:
        return {name: value}
    path = {} if group in ("optim", "sampling", "lora") else {"path": "p"}
    return {group: path | {rest: value}}


# ---------------------------------------------------------------------------------------------------------- the ranges

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
    "cache_reference": ["sometimes"],
    "beta": [0, -1, *INFINITE],
    "label_smoothing": [-0.1, 0.5],
    "minibatch_size": [0],
    "ppo_epochs": [0],
    "value": ["heads"],
    "clip": [0, -0.2, *INFINITE],
    "value_clip": [0, math.inf],
    "value_coef": [-0.1, math.nan],
    "gamma": [-0.1, 1.1],
    "lam": [-0.1, 1.1],
    "kl_coef": [-0.1, math.inf],
    "kl_target": [0, *INFINITE],
    "kl_horizon": [0],
    "kl_coef_end": [-0.1, *INFINITE],
    "kl_control": ["steered"],
    "kl_in": ["score"],
    "kl_stop": [0, *INFINITE],
    "value_warmup": [-1],
    "score_center": [-1],
    "score_scale": ["std"],
    "score_clip": [0, *INFINITE],
    "missing_eos": ["never"],
    "ratio_limit": [1, *INFINITE],
    "entropy_coef": [-0.1, math.nan],
    "ptx_coef": [-0.1, math.nan],
    "reference_update": ["copy"],
    "reference_every": [0],
    "reference_rate": [-0.1, 1.1],
    "recorded": ["always"],
    "importance": ["words"],
    "importance_max": [1, 0, *INFINITE],
    "num_generations": [0],
    "rollout_epochs": [0],
    "missing_eos_penalty": [-0.1, math.nan],
    "scale": ["groups"],
    "baseline": ["median"],
    "kl_estimator": ["k4"],
    "clip_high": [0, *INFINITE],
    "dual_clip": [1, *INFINITE],
    "ratio_max": [0, *INFINITE],
    "temperature_pos": [0, *INFINITE],
    "temperature_neg": [0, *INFINITE],
    "dynamic_sampling": [-1],
    "overlong_buffer": [-1],
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
ANY_VALUE = {(GenerateConfig, "seed"), (EvaluateConfig, "seed"), (DemoConfig, "seed")}  # nothing is wrong for these
ANY_VALUE |= {(GenerateConfig, "output"), (EvaluateConfig, "output"), (DemoConfig, "output"), (ScoreConfig, "output")}


@every_config
def test_every_value_out_of_range_is_refused_by_name_and_value(cls):
    for name, kind, _ in leaves(cls):
        for value in BAD.get(name, []) if (cls, name) not in ANY_VALUE else []:
            with pytest.raises(ConfigError) as caught:
                from_dict(cls, LEAST[cls] | nested(name, value))
                pytest.fail(f"{name}={value!r} was accepted")
            seen = float(value) if kind is float else tuple(value) if isinstance(value, list) else value
            assert str(caught.value).startswith(f"{name}={seen!r}: expected ")


@every_config
def test_no_number_goes_without_a_range(cls):
    numbers = [name for name, kind, _ in leaves(cls) if kind in (int, float) or typing.get_origin(kind)]
    assert [name for name in numbers if name not in BAD and (cls, name) not in ANY_VALUE] == []


@pytest.mark.parametrize("cls", TRAINERS)
def test_values_made_in_python_are_checked_as_those_of_yaml(cls):
    with pytest.raises(ConfigError, match=r"^batch_size=0: expected more than 0"):
        cls(**LEAST[cls], batch_size=0)
    with pytest.raises(ConfigError, match=r"^schedule='cosin': expected one of cosine, linear, constant"):
        cls(**LEAST[cls], optim=OptimConfig(schedule="cosin"))
    with pytest.raises(ConfigError, match=r"^batch_size=2.5: expected a whole number"):
        cls(**LEAST[cls], batch_size=2.5)


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
        ({"value": "reward"}, "value='reward': expected a reward_model"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature=0.0: expected more than 0, to learn"),
        ({"kl_coef": 0}, "kl_coef=0.0: expected more than 0, to be adapted"),
        ({"resume": True, "overwrite": True}, "overwrite=True: expected False with resume"),
    ],
)
def test_ppo_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(PPOConfig, LEAST[PPOConfig] | changes)
    assert str(caught.value).startswith(message)


def test_a_fixed_price_of_nothing_is_allowed():
    assert from_dict(PPOConfig, LEAST[PPOConfig] | {"kl_coef": 0, "kl_target": None}).kl_coef == 0


def test_generate_and_evaluate_want_one_of_two_sources():
    for values in ({"model": "m"}, {"model": "m", "prompt": "Once", "data": "d.jsonl"}):
        with pytest.raises(ConfigError, match="prompt, data"):
            from_dict(GenerateConfig, values)
    with pytest.raises(ConfigError, match="reward_model, reward_function, checker: expected at least one"):
        from_dict(EvaluateConfig, {"model": "m", "baseline": "b", "data": "d.jsonl"})


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
    ],
)
def test_wrong_names_and_groups(more, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(SFTConfig, RUN | more)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", RUN)
def test_a_missing_setting_is_named(name):
    with pytest.raises(ConfigError, match=f"^{name} is missing$"):
        from_dict(SFTConfig, {key: value for key, value in RUN.items() if key != name})


@pytest.mark.parametrize("written", ["pairs.jsonl", Path("pairs.jsonl"), {"path": "pairs.jsonl"}])
def test_a_group_with_a_path_may_be_the_path_alone(written):
    values = RUN | {"data": written, "eval_data": written, "reference": written}
    for config in (from_dict(DPOConfig, values), DPOConfig(**values)):
        assert config.data == config.eval_data == DataConfig(path="pairs.jsonl")
        assert config.reference == ModelConfig(path="pairs.jsonl")
        assert type(config.data.path) is str


def test_paths_of_python_become_texts_that_yaml_can_write():
    config = SFTConfig(model=ModelConfig(path=Path("m")), data=DataConfig(path=Path("d")), output=Path("o"))
    assert yaml.safe_load(yaml.safe_dump(to_dict(config)))["model"]["path"] == "m"
    assert config.output == "o"


def test_a_group_keeps_the_defaults_of_its_job():
    for config in (
        from_dict(PPOConfig, LEAST[PPOConfig] | {"optim": {"lr": 1e-3}}),
        PPOConfig(**LEAST[PPOConfig], optim={"lr": 1e-3}),
    ):
        assert config.optim == OptimConfig(lr=1e-3, schedule="linear", eps=1e-5)
    assert from_dict(SFTConfig, RUN | {"optim": {"lr": 1e-3}}).optim == OptimConfig(lr=1e-3)
    assert from_dict(PPOConfig, LEAST[PPOConfig]).batch_size == 64


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("written", ["5e-6", "5.0e-6", "0.000005"])
def test_numbers_that_yaml_reads_as_texts(written):
    values = yaml.safe_load(f"optim: {{lr: {written}}}")
    assert from_dict(SFTConfig, RUN | values).optim.lr == 5e-6


@pytest.mark.parametrize(
    ("value", "expected"), [("16", 16), (16.0, 16), ("1e3", 1000), ("2.0", 2), (2**53 + 1, 2**53 + 1), ("007", 7)]
)
def test_whole_numbers(value, expected):
    config = from_dict(SFTConfig, RUN | {"seed": value})
    assert config.seed == expected
    assert type(config.seed) is int


def test_a_large_seed_typed_as_text_is_not_rounded():
    assert from_dict(SFTConfig, RUN | {"seed": str(2**53 + 1)}).seed == 2**53 + 1


@pytest.mark.parametrize("value", [2.5, "2.5", "many", True, None, [1], {}, "", "nan", 10**400])
def test_what_is_not_a_whole_number(value):
    with pytest.raises(ConfigError) as caught:
        from_dict(SFTConfig, RUN | {"batch_size": value})
    assert str(caught.value) == f"batch_size={value!r}: expected a whole number"


@pytest.mark.parametrize("value", ["fast", True, None, [1.0], "inf"])
def test_what_is_not_a_number(value):
    with pytest.raises(ConfigError) as caught:
        from_dict(SFTConfig, RUN | {"optim": {"lr": value}})
    assert str(caught.value) == f"optim.lr={value!r}: expected a finite number"


@pytest.mark.parametrize("value", ["0.9,0.95", "0.9, 0.95", [0.9, 0.95], (0.9, "0.95"), ["9e-1", "95e-2"]])
def test_tuples(value):
    assert from_dict(SFTConfig, RUN | {"optim": {"betas": value}}).optim.betas == (0.9, 0.95)


@pytest.mark.parametrize("value", ["0.9", [0.9], [0.9, 0.95, 0.99], 0.9, None])
def test_tuples_of_another_length(value):
    with pytest.raises(ConfigError) as caught:
        from_dict(SFTConfig, RUN | {"optim": {"betas": value}})
    assert str(caught.value) == f"optim.betas={value!r}: expected 2 numbers"


@pytest.mark.parametrize("value", ["true", "yes", 1, 0, None])
def test_what_is_not_true_or_false(value):
    with pytest.raises(ConfigError) as caught:
        from_dict(SFTConfig, RUN | {"resume": value})
    assert str(caught.value) == f"resume={value!r}: expected true or false"


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}, None])
def test_what_is_not_a_text(value):
    with pytest.raises(ConfigError) as caught:
        from_dict(SFTConfig, RUN | {"output": value})
    assert str(caught.value) == f"output={value!r}: expected a text"


@pytest.mark.parametrize("value", [None, "none", "None", "null"])
def test_none(value):
    config = from_dict(PPOConfig, LEAST[PPOConfig] | {"kl_target": value, "optim": {"max_grad_norm": value}})
    assert config.kl_target is None
    assert config.optim.max_grad_norm is None


def test_a_group_that_may_be_left_out_can_be_switched_off_again():
    for none in ("none", {"path": "none"}, {"path": "none", "limit": 3}, None):
        assert from_dict(DPOConfig, RUN | {"eval_data": none, "reference": none}).eval_data is None
    with pytest.raises(ConfigError, match="eval_data.path=None: expected a text"):
        from_dict(DPOConfig, RUN | {"eval_data": {"path": None}})


# ------------------------------------------------------------------------------------------------------- there and back

TOGETHER = {  # settings that exclude one another, and names that must exist
    SFTConfig: {"overwrite": False, "label_smoothing": 0},
    RewardConfig: {"overwrite": False, "learn_from": "pairs"},
    DPOConfig: {"overwrite": False, "loss": "r_dpo", "loss_options": {"length_coef": 0.5}, "loss_module": "math",
                "reference_free": False},
    IPOConfig: {"overwrite": False, "loss": "ipo,r_dpo", "loss_options": {"length_coef": 0.5}, "loss_module": "math",
                "reference_free": False, "loss_weights": [1, 2], "label_smoothing": 0},
    **{kind: {"overwrite": False, "loss": "simpo,alphapo", "loss_options": ["gamma:0.5"], "loss_module": "math",
              "loss_weights": [1, 2], "f_divergence": "reverse_kl", "ld_alpha": None, "reference": None,
              "reference_update": "none", "reference_cache": None} for kind in (ORPOConfig, SimPOConfig, CPOConfig)},
    KTOConfig: {"overwrite": False, "loss": "bco", "loss_options": {"delta": 0.5}, "loss_module": "math"},
    PPOConfig: {"overwrite": False, "reward_function": None, "reward_weights": [0.5, -1], "ratio_limit": 2.5,
                "value_detach": False, "recorded": "off", "importance": "none"},
    GRPOConfig: {"overwrite": False, "reward_function": None, "reward_weights": [0.5, -1], "loss": "dapo",
                 "loss_module": "math", "minibatch_size": 63, "dual_clip": 2, "ratio_max": None,
                 "temperature_pos": None, "temperature_neg": None, "importance": "none"},
    RLOOConfig: {"overwrite": False, "reward_function": None, "reward_weights": [0.5, -1], "recorded": "off",
                 "importance": "none"},
    ReinforceConfig: {"overwrite": False, "reward_function": None, "reward_weights": [0.5, -1], "minibatch_size": 66,
                      "recorded": "off", "importance": "none"},
    GenerateConfig: {"prompt": None, "attributes": None},
    ScoreConfig: {},
    MergeConfig: {},
    EvaluateConfig: {"reward_function": "a:f,b:g", "reward_weights": [0.5, 0, -1, 2]},
    DemoConfig: {},
}  # fmt: skip


WRITTEN = {
    "server_url": "http://a-server",
    "keep_best": "eval_loss",
    "kv_cache": "dynamic",  # beside a server
    "formatting": "module:function",
}  # not any text will do
ROLLOUTS = {"micro_batch_tokens": None, "max_tokens_per_batch": None}  # have no such settings
ROLLOUTS |= {"lora": {"r": 4}, "quantize": "none"}  # nor dropout, nor four bits beside a server


def another_value(kind: type, default: object) -> object:
    """A value of the type that is not the default."""
    if kind is bool:
        return not default
    if kind is int:
        return default + 1 if isinstance(default, int) else 7
    if kind is float:
        return (default or 0.5) / 2 if isinstance(default, float) else 0.5
    if typing.get_origin(kind) is tuple:
        if str in typing.get_args(kind):
            return ("some:text",)
        return tuple(item / 2 for item in default) if default else (2,)
    return typing.get_args(kind)[-1] if typing.get_origin(kind) is typing.Literal else "a text"


@every_config
def test_every_setting_survives_yaml(cls):
    values: dict = {}
    for name, kind, default in leaves(cls):
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = WRITTEN.get(last) or another_value(kind, default)
    together = TOGETHER[cls] | (ROLLOUTS if issubclass(cls, OnPolicyConfig) else {})
    config = from_dict(cls, values | together)
    plain = to_dict(config)
    least = to_dict(from_dict(cls, LEAST[cls]))
    same = [name for name in plain if plain[name] == least[name] and name not in together]
    assert same == []  # else the test would not see a setting that is lost
    assert from_dict(cls, yaml.safe_load(yaml.safe_dump(plain))) == config


@every_config
def test_the_least_settings_survive_yaml(cls):
    config = from_dict(cls, LEAST[cls])
    assert from_dict(cls, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert cls(**LEAST[cls]) == config
