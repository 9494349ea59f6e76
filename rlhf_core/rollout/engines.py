"""Sampling by others: transformers' continuous batching, and a server that speaks OpenAI's protocol, such as vLLM.

Both give what `sample` gives, tokens and log-probs of the plain distribution at the temperature: every filter is
switched off in the request, whatever the checkpoint or the server has as its default. What they do not record (a value
head's values, and a server's log-probs at a temperature other than 1) is computed here by one teacher-forced pass.
Samples follow the seed only as far as the engine's scheduling repeats itself; where that matters, let `sample` decode.
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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from rlhf_core.config import SamplingConfig
from rlhf_core.models.forward import device_of, evaluating, policy_outputs
from rlhf_core.models.load import save_model
from rlhf_core.rollout.sampling import Rollout, check_prompts

_PAGE = 64  # tokens of a page of the continuous engine's cache
_FIRST_PAUSE = 1.0  # seconds before a request is sent again; doubled each time


# ------------------------------------------------------------------------------------------------- continuous batching


def sample_continuously(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    config: SamplingConfig,
    *,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """As `sample`, by `policy.generate_batch`: a row that ends makes room for the next at once.

    Raises RuntimeError where the engine gives up on a row, and ValueError as `sample` does.
    """
    check_prompts(prompts, n)
    rows = [list(prompt) for prompt in prompts for _ in range(n)]
    longest = max(map(len, rows)) + config.max_new_tokens
    together = min(config.batch_size, len(rows))
    wanted = GenerationConfig(
        do_sample=config.temperature > 0, temperature=config.temperature or 1.0, top_k=0, top_p=1.0,
        max_new_tokens=config.max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0,
    )  # fmt: skip
    engine = ContinuousBatchingConfig(
        return_logprobs=True,
        seed=_draw_seeds(generator, 1)[0],
        max_requests_per_batch=together,
        page_size=_PAGE,
        num_blocks=together * -(-longest // _PAGE) + 1,  # the memory of these rows, not all that is free
        max_batch_tokens=max(longest, 2048),
        auto_switch_to_flash=False,
    )
    device, attention = device_of(policy), policy.config._attn_implementation
    try:
        policy.set_attn_implementation("sdpa")
        # The engine seeds the global random numbers, which are the trainer's.
        with evaluating(policy), torch.random.fork_rng([device] if device.type == "cuda" else []):
            outputs = policy.generate_batch(rows, generation_config=wanted, continuous_batching_config=engine)
    finally:
        policy.set_attn_implementation(attention)
    results = list(outputs.values())
    faults = [result.error for result in results if result.error is not None]
    if faults or len(results) < len(rows):
        raise RuntimeError(
            f"engine='continuous': {len(results) - len(faults)} of {len(rows)} rows were completed; "
            f"{faults[0] if faults else 'what the engine logged says why'}"
        )
    rollout = _rollout(
        rows, n, [result.generated_tokens for result in results], [result.logprobs for result in results], stop_ids
    )
    return rollout if value_head is None else replace(rollout, values=_forced(policy, rollout, config, value_head)[1])


# ---------------------------------------------------------------------------------------------------------- a server


def sample_from_server(
    policy: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    config: SamplingConfig,
    *,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """As `sample`, by requests to {config.server_url}/v1/completions, one for each prompt, several at a time.

    The server is given the policy's weights first, where the config says how. Its log-probs are used at temperature 1;
    at others some servers give those of temperature 1 and some do not say, so ours are computed.

    Raises ConnectionError where the server does not answer or fails, and ValueError where it refuses a request or its
    answer cannot be used, such as one without token ids: a text that is tokenized again may be other tokens.
    """
    check_prompts(prompts, n)
    if config.server_refresh is not None:
        refresh_server(policy, tokenizer, config)
    base = config.server_url.rstrip("/").removesuffix("/v1")
    name = config.server_model or _first_model(base, config)
    vocabulary = policy.get_input_embeddings().weight.shape[0]

    def ask(work: tuple[Sequence[int], int]) -> list[tuple[list[int], list[float]]]:
        prompt, seed = work
        answer = _send(
            f"{base}/v1/completions",
            config,
            dict(
                model=name, prompt=list(prompt), n=n, max_tokens=config.max_new_tokens, temperature=config.temperature,
                seed=seed, stop_token_ids=sorted(stop_ids), logprobs=1, return_token_ids=True,
                return_tokens_as_token_ids=True, skip_special_tokens=False, add_special_tokens=False,
                top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
            ),
        )  # fmt: skip
        choices = answer.get("choices") or []
        if sorted(choice.get("index", -1) for choice in choices) != list(range(n)):
            raise ValueError(f"{base}: {len(choices)} completions of a prompt came back, expected {n}, numbered from 0")
        choices.sort(key=lambda choice: choice["index"])
        return [read_choice(choice, base, config.max_new_tokens, stop_ids, vocabulary) for choice in choices]

    work = list(zip(prompts, _draw_seeds(generator, len(prompts)), strict=True))
    with ThreadPoolExecutor(max(1, config.batch_size // n)) as pool:
        answers = [line for lines in pool.map(ask, work) for line in lines]
    rows = [list(prompt) for prompt in prompts for _ in range(n)]
    rollout = _rollout(rows, n, [ids for ids, _ in answers], [logprobs for _, logprobs in answers], stop_ids)
    if config.temperature == 1.0 and value_head is None:
        return rollout
    logprobs, values = _forced(policy, rollout, config, value_head)
    return replace(rollout, values=values, logprobs=rollout.logprobs if config.temperature == 1.0 else logprobs)


def refresh_server(policy: nn.Module, tokenizer: Any, config: SamplingConfig) -> None:
    """Write the policy to `server_weights` and have the server load it, by a POST of {"path": folder} or by a command.

    Returns when the URL has answered or the command has ended; raises as `sample_from_server` does.
    """
    folder, hook = config.server_weights, config.server_refresh
    save_model(folder, policy, tokenizer, merge=True)
    if hook.startswith(("http://", "https://")):
        _send(hook, config, {"path": folder})
        return
    try:
        subprocess.run(
            [*shlex.split(hook), folder], check=True, capture_output=True, text=True, timeout=config.server_timeout
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()[-500:]
        raise ConnectionError(f"server_refresh={hook!r}: exit status {error.returncode}: {said}") from None
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"server_refresh={hook!r}: not done in {config.server_timeout:g} s") from None


def read_choice(
    choice: dict[str, Any], server: str, max_new_tokens: int, stop_ids: frozenset[int], vocabulary: int
) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of one completion of an answer, up to its first stop token; ValueError if they cannot be.

    Ids are read from `token_ids`, or from log-prob entries named token_id:17.
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
                "token_id:17, as vLLM gives them. The text alone may be other tokens when it is tokenized again"
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
    return models[0]["id"]


def _send(url: str, config: SamplingConfig, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer to a GET, or to a POST of `body`. Failures of line and server are tried again."""
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
            try:
                parsed = json.loads(text) if text.strip() else {}
            except json.JSONDecodeError:
                parsed = None
            if not isinstance(parsed, dict):
                raise ValueError(f"{url}: the answer is no JSON object: {text[:200]!r}")
            return parsed
    raise ConnectionError(f"{url}: {fault} (tried {config.server_retries + 1} times)")


# ---------------------------------------------------------------------------------------------------------- for both


def _draw_seeds(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**31, (count,), generator=generator).tolist()


def _rollout(
    rows: list[list[int]],
    n: int,
    completions: list[list[int]],
    logprobs: list[list[float]],
    stop_ids: frozenset[int],
) -> Rollout:
    return Rollout(
        prompts=rows,
        completions=completions,
        logprobs=pad_sequence([torch.tensor(line, dtype=torch.float32) for line in logprobs], batch_first=True),
        finished=torch.tensor([completion[-1] in stop_ids for completion in completions]),
        group_size=n,
    )


def _forced(
    policy: nn.Module, rollout: Rollout, config: SamplingConfig, value_head: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and values, each (B, T) on the CPU, of the policy as it is."""
    heads = [value_head] if isinstance(value_head, nn.Module) else []
    with torch.no_grad(), evaluating(policy, *heads):
        outputs = [
            policy_outputs(policy, batch, value_head=value_head, temperature=config.temperature or 1.0)
            for batch in rollout.packs(config.batch_size)
        ]
    values = None if value_head is None else torch.cat([output.values for output in outputs]).float().cpu()
    return torch.cat([output.logprobs for output in outputs]).cpu(), values
