"""`rlhf generate`: a model's completions of prompts, printed or written as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from rlhf_core.config import DataConfig, ModelConfig, SamplingConfig, Settings, require, require_attributes
from rlhf_core.data.attributes import with_attributes
from rlhf_core.data.loader import load_examples
from rlhf_core.data.records import Example, Prompt, Record
from rlhf_core.data.tokenize import encode_records, stop_ids
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.models.load import freeze, load_policy
from rlhf_core.rollout.engines import sample_completions
from rlhf_core.seeding import generator


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """Complete one prompt or a file of prompts; print the completions or write them to a file."""

    job: ClassVar[str] = "generate"
    common: ClassVar[tuple[str, ...]] = (
        "model", "prompt", "data", "attributes", "output", "sampling.max_new_tokens", "sampling.temperature",
        "sampling.batch_size", "seed", "device",
    )  # fmt: skip

    model: ModelConfig
    """The model."""
    prompt: str | None = None
    """A single prompt."""
    data: DataConfig | None = None
    """Rows with prompts."""
    attributes: tuple[str, ...] | None = None
    """Attributes of the completions, for a model trained with data.attributes: helpfulness:4,verbosity:2."""
    output: str | None = None
    """A JSONL file for prompts and completions. None: print them."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    seed: int = 0
    """Seed of the samples."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... None: a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.prompt is None) != (self.data is None), "prompt, data", (self.prompt, self.data), "one of the two"
        )
        require_attributes("attributes", self.attributes, "NAME:VALUE, each name once", values=True)
        twice = self.attributes is not None and self.data is not None and self.data.attributes is not None
        require(not twice, "attributes", self.attributes, "none beside data.attributes, which set them already")


def generate(config: GenerateConfig) -> list[dict[str, str]]:
    """Sample one completion of each prompt; print them or write them to `config.output`.

    Returns [{"prompt": ..., "completion": ...}], in the order of the prompts.
    """
    policy, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    freeze(policy)
    ids = [example.prompt for example in _load_prompts(config, policy, tokenizer)]
    experience = sample_completions(policy, tokenizer, ids, config.sampling, generator(config.seed, "generate"))
    prompts = tokenizer.batch_decode(experience.prompts, skip_special_tokens=True)
    completions = tokenizer.batch_decode(experience.completions, skip_special_tokens=True)
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


def _load_prompts(config: GenerateConfig, policy: PreTrainedModel, tokenizer: Tokenizer) -> Iterable[Example]:
    if config.data is not None:
        data = replace(config.data, attributes=config.attributes or config.data.attributes)
        return load_examples(data, tokenizer, need="prompts", model=policy, reserve=config.sampling.max_new_tokens)
    prompt: Prompt | None = config.prompt
    if config.attributes:
        prompt = with_attributes(prompt, config.attributes, {}, "--prompt")
    record = Record(prompt=prompt, completions=(), row={"prompt": config.prompt}, source="--prompt")
    return encode_records([record], tokenizer, stop_ids=stop_ids(tokenizer, policy.generation_config))
