"""Sampling by other engines: transformers' continuous batching, and a server with OpenAI's protocol, such as vLLM.

Both return what `sample` returns, tokens and log-probs of the whole distribution at the temperature: requests switch
off every filter, whatever the checkpoint or the server has as its default. What an engine does not record (the values
of a value head, and a server's log-probs at a temperature other than 1) is computed here by one forward over the
completions. Samples are reproducible from the seed only as far as the engine's scheduling is; where that matters, use
`sample`.
"""

from __future__ import annotations

import http.client
import json
import math
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from rlhf_core.config import SamplingConfig
from rlhf_core.data.tokenize import stop_ids as stop_ids_of
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.models.forward import device_of, evaluating, policy_outputs
from rlhf_core.models.load import save_model
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.sampling import check_prompts, sample

_PAGE = 64  # tokens in a page of the continuous engine's cache
_FIRST_PAUSE = 1.0  # seconds before a request is repeated; doubled each time


def sample_completions(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    n: int = 1,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Experience:
    """Sample `n` completions of each prompt with the engine of the settings, each up to a stop token of the policy.

    Row i * n + j is completion j of prompt i.

    Args:
        generator: on the CPU; the source of all random numbers.
        value_head: maps (B, H) states of the policy's trunk to (B,) values, which are recorded as `values` (B, T).

    Raises:
        ValueError: for an empty prompt, no prompts, n < 1, log-probs that are not finite, and a server's answer that
            cannot be used.
        RuntimeError, ConnectionError: where the continuous engine or the server fails.
    """
    stops = stop_ids_of(tokenizer, policy.generation_config)
    if sampling.engine == "continuous":
        return sample_continuously(
            policy, prompts, n, sampling, stop_ids=stops, generator=generator, value_head=value_head
        )
    if sampling.engine == "server":
        return sample_from_server(
            policy, tokenizer, prompts, n, sampling, stop_ids=stops, generator=generator, value_head=value_head
        )
    return sample(
        policy,
        prompts,
        n,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=stops,
        generator=generator,
        temperature=sampling.temperature,
        batch_size=sampling.batch_size,
        value_head=value_head,
        cache=sampling.kv_cache,
    )


# ------------------------------------------------------------------------------------------------- continuous batching


def sample_continuously(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    config: SamplingConfig,
    *,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Experience:
    """Sample as `sample` does, with `policy.generate_batch`: the next row takes the place of a finished one at once.

    Raises RuntimeError where the engine does not complete a row, and ValueError as `sample` does.
    """
    check_prompts(prompts, n)
    rows = [list(prompt) for prompt in prompts for _ in range(n)]
    longest = max(map(len, rows)) + config.max_new_tokens
    concurrent = min(config.batch_size, len(rows))
    generation = GenerationConfig(
        do_sample=config.temperature > 0, temperature=config.temperature or 1.0, top_k=0, top_p=1.0,
        max_new_tokens=config.max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0,
    )  # fmt: skip
    engine = ContinuousBatchingConfig(
        return_logprobs=True,
        seed=_draw_seeds(generator, 1)[0],
        max_requests_per_batch=concurrent,
        page_size=_PAGE,
        num_blocks=concurrent * -(-longest // _PAGE) + 1,  # the memory of these rows, instead of all free memory
        max_batch_tokens=max(longest, 2048),
        auto_switch_to_flash=False,
    )
    device, attention = device_of(policy), policy.config._attn_implementation
    try:
        policy.set_attn_implementation("sdpa")
        # The engine seeds the global random numbers, which belong to the caller.
        with evaluating(policy), torch.random.fork_rng([device] if device.type == "cuda" else []):
            outputs = policy.generate_batch(rows, generation_config=generation, continuous_batching_config=engine)
    finally:
        policy.set_attn_implementation(attention)
    results = list(outputs.values())
    faults = [result.error for result in results if result.error is not None]
    if faults or len(results) < len(rows):
        raise RuntimeError(
            f"engine='continuous': {len(results) - len(faults)} of {len(rows)} rows were completed; "
            f"{faults[0] if faults else 'the reason is in the log of the engine'}"
        )
    experience = _experience(
        rows, n, [result.generated_tokens for result in results], [result.logprobs for result in results], stop_ids
    )
    if value_head is None:
        return experience
    return replace(experience, values=_teacher_forced(policy, experience, config, value_head)[1])


# ------------------------------------------------------------------------------------------------------------- a server


def sample_from_server(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    n: int,
    config: SamplingConfig,
    *,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Experience:
    """Sample as `sample` does, with requests to {config.server_url}/v1/completions, one a prompt, several at a time.

    The policy's weights are sent to the server first, where the config defines how. The server's log-probs are used at
    temperature 1 only; at other temperatures servers differ in what they return, so the log-probs are computed here.

    Raises ConnectionError where the server does not answer or fails, and ValueError where it refuses a request or its
    answer cannot be used, such as one without token ids: a text that is tokenized again may give other tokens.
    """
    check_prompts(prompts, n)
    if config.server_refresh is not None:
        refresh_server(policy, tokenizer, config)
    base = str(config.server_url).rstrip("/").removesuffix("/v1")
    server = _Server(
        base=base,
        model=config.server_model or _first_model(base, config),
        config=config,
        n=n,
        stop_ids=stop_ids,
        vocabulary=policy.get_input_embeddings().weight.shape[0],
    )
    seeds = _draw_seeds(generator, len(prompts))
    with ThreadPoolExecutor(max(1, config.batch_size // n)) as pool:
        answers = [answer for group in pool.map(server.complete, prompts, seeds) for answer in group]
    rows = [list(prompt) for prompt in prompts for _ in range(n)]
    experience = _experience(rows, n, [ids for ids, _ in answers], [logprobs for _, logprobs in answers], stop_ids)
    if config.temperature == 1.0 and value_head is None:
        return experience
    logprobs, values = _teacher_forced(policy, experience, config, value_head)
    return replace(experience, values=values, logprobs=experience.logprobs if config.temperature == 1.0 else logprobs)


@dataclass(frozen=True)
class _Server:
    """What all requests for completions have in common."""

    base: str
    model: str
    config: SamplingConfig
    n: int
    stop_ids: frozenset[int]
    vocabulary: int

    def complete(self, prompt: Sequence[int], seed: int) -> list[tuple[list[int], list[float]]]:
        """Request n completions of a prompt; return the token ids and log-probs of each, in the server's order."""
        request = dict(
            model=self.model, prompt=list(prompt), n=self.n, max_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature, seed=seed, stop_token_ids=sorted(self.stop_ids), logprobs=1,
            return_token_ids=True, return_tokens_as_token_ids=True, skip_special_tokens=False,
            add_special_tokens=False, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0,
        )  # fmt: skip
        choices = _send(f"{self.base}/v1/completions", self.config, request).get("choices") or []
        if sorted(choice.get("index", -1) for choice in choices) != list(range(self.n)):
            raise ValueError(
                f"{self.base}: {len(choices)} completions of a prompt came back, expected {self.n}, numbered from 0"
            )
        choices.sort(key=lambda choice: choice["index"])
        return [
            read_choice(choice, self.base, self.config.max_new_tokens, self.stop_ids, self.vocabulary)
            for choice in choices
        ]


def refresh_server(policy: PreTrainedModel, tokenizer: Tokenizer, config: SamplingConfig) -> None:
    """Write the policy to `server_weights` and have the server load it, by a POST of {"path": folder} or by a command.

    Returns once the URL has answered or the command has ended; raises as `sample_from_server` does.
    """
    folder, hook = str(config.server_weights), str(config.server_refresh)
    save_model(folder, policy, tokenizer, merge=True)
    if hook.startswith(("http://", "https://")):
        _send(hook, config, {"path": folder})
        return
    try:
        subprocess.run(
            [*shlex.split(hook), folder], check=True, capture_output=True, text=True, timeout=config.server_timeout
        )
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).strip()[-500:]
        raise ConnectionError(f"server_refresh={hook!r}: exit status {error.returncode}: {output}") from None
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"server_refresh={hook!r}: not done in {config.server_timeout:g} s") from None


def read_choice(
    choice: dict[str, Any], server: str, max_new_tokens: int, stop_ids: frozenset[int], vocabulary: int
) -> tuple[list[int], list[float]]:
    """Return the token ids and log-probs of one completion of an answer, up to its first stop token.

    Ids are read from `token_ids`, or from log-prob entries named token_id:17. Raises ValueError, which begins with
    `server`, where the completion cannot be used.
    """
    record = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    if ids is None:
        names = record.get("tokens") or []
        numbers = [name.removeprefix("token_id:") for name in names if isinstance(name, str)]
        ids = [int(number) for name, number in zip(names, numbers, strict=False) if number != name]
        if not ids or len(ids) < len(names):
            raise ValueError(
                f"{server}: the answer has no token ids; expected `token_ids`, or tokens in `logprobs` named "
                "token_id:17, as vLLM gives them. The text alone may give other tokens when it is tokenized again"
            )
    logprobs = record.get("token_logprobs")
    if logprobs is None or len(logprobs) != len(ids):
        raise ValueError(f"{server}: {len(logprobs or [])} log-probs of {len(ids)} tokens; expected one of each")
    length = next((t + 1 for t, token in enumerate(ids) if token in stop_ids), len(ids))
    ids, logprobs = ids[:length], logprobs[:length]
    if not 0 < len(ids) <= max_new_tokens:
        raise ValueError(f"{server}: a completion of {len(ids)} tokens; expected 1 to {max_new_tokens}")
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        raise ValueError(f"{server}: token ids {ids}; expected 0 to {vocabulary - 1}: is it the same model?")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
        raise ValueError(f"{server}: log-probs {logprobs}; expected finite numbers")
    if ids[-1] not in stop_ids and choice.get("finish_reason") != "length":
        raise ValueError(
            f"{server}: finish_reason {choice.get('finish_reason')!r} after token {ids[-1]}; expected a stop token, "
            f"{sorted(stop_ids)}, or the limit of {max_new_tokens} tokens (finish_reason 'length')"
        )
    return ids, [float(value) for value in logprobs]


def _first_model(base: str, config: SamplingConfig) -> str:
    models = _send(f"{base}/v1/models", config).get("data") or []
    if not models:
        raise ValueError(f"{base}: lists no model; set server_model")
    return str(models[0]["id"])


def _send(url: str, config: SamplingConfig, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON answer to a GET, or to a POST of `body`. Connection and server failures are retried."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for attempt in range(config.server_retries + 1):
        if attempt:
            time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=config.server_timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            fault = f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}"
            if error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"{url} refuses the request: {fault}") from None
        except TimeoutError:
            fault = f"no answer in {config.server_timeout:g} s"
        except (OSError, http.client.HTTPException) as error:
            fault = str(getattr(error, "reason", error))
        else:
            break
    else:
        raise ConnectionError(f"{url}: {fault} (tried {config.server_retries + 1} times)")
    try:
        parsed = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"{url}: the answer is no JSON object: {text[:200]!r}")
    return parsed


# ----------------------------------------------------------------------------------------------------- both engines


def _draw_seeds(generator: torch.Generator, count: int) -> list[int]:
    seeds: list[int] = torch.randint(2**31, (count,), generator=generator).tolist()
    return seeds


def _experience(
    rows: list[list[int]],
    n: int,
    completions: list[list[int]],
    logprobs: list[list[float]],
    stop_ids: frozenset[int],
) -> Experience:
    return Experience.sampled(
        prompts=rows,
        completions=completions,
        logprobs=pad_sequence([torch.tensor(line, dtype=torch.float32) for line in logprobs], batch_first=True),
        finished=torch.tensor([completion[-1] in stop_ids for completion in completions]),
        group_size=n,
    )


def _teacher_forced(
    policy: PreTrainedModel,
    experience: Experience,
    config: SamplingConfig,
    value_head: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log-probs and values, each (B, T) on the CPU, by a forward of the policy in evaluation mode."""
    heads = [value_head] if isinstance(value_head, nn.Module) else []
    with torch.no_grad(), evaluating(policy, *heads):
        outputs = [
            policy_outputs(policy, batch, value_head=value_head, temperature=config.temperature or 1.0)
            for batch in experience.packs(config.batch_size)
        ]
    logprobs = torch.cat([output.logprobs for output in outputs]).cpu()
    values = [output.values for output in outputs if output.values is not None]
    return logprobs, torch.cat(values).float().cpu() if values else None
