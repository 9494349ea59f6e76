"""`rlhf generate`: a model's completions of prompts, printed or written as JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_core.config import DataConfig, ModelConfig, SamplingConfig, Settings, require, require_attributes
from rlhf_core.data.formats import Record, with_attributes
from rlhf_core.data.loader import load_examples
from rlhf_core.data.tokenize import encode_records, stop_ids
from rlhf_core.models.load import freeze, load_policy
from rlhf_core.rollout.steps import roll_out
from rlhf_core.seeding import generator


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """Complete one prompt or a file of them. Without a file to write to, completions are printed."""

    model: ModelConfig
    """The model."""
    prompt: str | None = None
    """One prompt, typed here."""
    data: DataConfig | None = None
    """Rows with prompts."""
    attributes: tuple[str, ...] | None = None
    """What the completions are to be like, for a model trained with data.attributes: helpfulness:4,verbosity:2."""
    output: str | None = None
    """A JSONL file to write prompt and completion to."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    seed: int = 0
    """Same seed, same completions."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.prompt is None) != (self.data is None), "prompt, data", (self.prompt, self.data), "one of the two"
        )
        require_attributes("attributes", self.attributes, "NAME:VALUE, each name once", values=True)
        twice = self.attributes is not None and self.data is not None and self.data.attributes is not None
        require(not twice, "attributes", self.attributes, "none beside data.attributes: the prompt names them once")


def generate(config: GenerateConfig) -> list[dict[str, str]]:
    """Completions in the order of the prompts: [{"prompt": ..., "completion": ...}], also printed or written."""
    policy, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    freeze(policy)
    stops = stop_ids(tokenizer, policy.generation_config)
    if config.data is not None:
        data = replace(config.data, attributes=config.attributes or config.data.attributes)
        examples = load_examples(data, tokenizer, need="prompts", model=policy, reserve=config.sampling.max_new_tokens)
    else:
        prompt = config.prompt
        if config.attributes:
            prompt = with_attributes(prompt, config.attributes, {}, "--prompt")
        typed = Record(prompt=prompt, completions=(), row={"prompt": config.prompt}, source="--prompt")
        examples = encode_records([typed], tokenizer, stop_ids=stops)
    rollout = roll_out(
        policy,
        tokenizer,
        [example.prompt for example in examples],
        config.sampling,
        generator(config.seed, "generate"),
    )
    prompts = tokenizer.batch_decode(rollout.prompts, skip_special_tokens=True)
    completions = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    if config.output is None:
        for row in rows:
            print(f"{row['prompt']}\n  -> {row['completion']}\n")
    else:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(config.output).write_text(lines, encoding="utf-8")
        print(f"generate: {len(rows)} completions in {config.output}", file=sys.stderr)
    return rows
