"""Sampling by others: continuous batching, and a small server that speaks vLLM's dialect and samples by hand."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_core.config import ConfigError, SamplingConfig, from_dict
from rlhf_core.evaluation.compare import EvaluateConfig
from rlhf_core.models.forward import policy_outputs
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import save_model
from rlhf_core.rollout import engines
from rlhf_core.rollout.engines import read_choice, refresh_server, sample_continuously, sample_from_server
from rlhf_core.rollout.generate import GenerateConfig, generate
from rlhf_core.trainers.ppo import PPOConfig

OFTEN = frozenset(range(8))


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_of(policy) -> ValueHead:
    head = ValueHead(policy.config.hidden_size)
    torch.nn.init.normal_(head.linear.weight, generator=numbers(3))
    return head


def forced(policy, rollout, **options):
    with torch.no_grad():
        return policy_outputs(policy.eval(), rollout.pack(), **options)


def agrees(policy, rollout, *, temperature: float = 1.0, head: ValueHead | None = None) -> None:
    """Shapes, ends, and the numbers of a teacher-forced forward."""
    lengths = [len(completion) for completion in rollout.completions]
    assert rollout.logprobs.shape == (len(lengths), max(lengths))
    assert rollout.logprobs.dtype == torch.float32
    truth = forced(policy, rollout, temperature=temperature, value_head=head)
    torch.testing.assert_close(rollout.logprobs, truth.logprobs, rtol=1e-4, atol=1e-4)
    if head is None:
        assert rollout.values is None
    else:
        torch.testing.assert_close(rollout.values, truth.values, rtol=1e-5, atol=1e-5)
    for completion, finished in zip(rollout.completions, rollout.finished.tolist(), strict=True):
        assert finished == (completion[-1] in OFTEN)
        assert not OFTEN & {*completion[:-1]}


# ----------------------------------------------------------------------------------------------------------- continuous


@pytest.mark.parametrize(("n", "batch_size", "temperature", "valued"), [(1, 64, 1.0, False), (3, 4, 0.6, True)])
def test_continuous_batching(make_policy, prompts, n, batch_size, temperature, valued):
    """What a checkpoint wishes for its samples is not what they are drawn by, and nothing of the policy changes."""
    policy = make_policy(max_position_embeddings=256)
    policy.generation_config.top_k, policy.generation_config.temperature = 1, 0.1
    attention, head = policy.config._attn_implementation, head_of(policy) if valued else None
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = SamplingConfig(engine="continuous", max_new_tokens=12, temperature=temperature, batch_size=batch_size)
    rollout = sample_continuously(
        policy, prompts, n, config, stop_ids=OFTEN, generator=numbers(), value_head=head
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training
    assert policy.config._attn_implementation == attention
    assert rollout.prompts == [prompt for prompt in prompts for _ in range(n)]
    assert rollout.group_size == n
    assert len({tuple(completion) for completion in rollout.completions}) > len(prompts) / 2
    assert max(map(len, rollout.completions)) <= 12
    agrees(policy, rollout, temperature=temperature, head=head)
    other = sample_continuously(policy, prompts, n, config, stop_ids=OFTEN, generator=numbers(1))
    assert other.completions != rollout.completions


def test_no_wish_of_a_checkpoint_bends_what_the_continuous_engine_draws_from(make_policy, prompts):
    """Each of these changes the distribution; tokens and log-probs stay those of the plain one, to the last bit."""
    policy = make_policy(max_position_embeddings=256)
    config = SamplingConfig(engine="continuous", max_new_tokens=6)

    def play():
        return sample_continuously(policy, prompts[:3], 2, config, stop_ids=OFTEN, generator=numbers())

    plain, agreed = play(), policy.generation_config
    agrees(policy, plain)
    wishes = dict(
        top_k=1, top_p=0.01, min_p=0.9, typical_p=0.01, repetition_penalty=9.0, no_repeat_ngram_size=1,
        temperature=0.01, do_sample=False, suppress_tokens=[*range(8, 40)], min_new_tokens=6, max_new_tokens=1,
    )  # fmt: skip
    policy.generation_config = GenerationConfig(**wishes)
    wished = play()
    policy.generation_config = agreed
    assert wished.completions == plain.completions
    assert torch.equal(wished.logprobs, plain.logprobs)


@pytest.mark.parametrize("wish", ["top_k", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("engine", ["builtin", "continuous", "server"])
def test_what_would_bend_the_distribution_is_no_setting(wish, engine):
    """0 and 1, which bend nothing, neither: who writes them may mean something by it."""
    for value in (0, 1, 50):
        rows = dict(model="m", data="d.jsonl", output="o", reward_function="a:b")
        with pytest.raises(ConfigError, match=wish):
            from_dict(PPOConfig, rows | {"sampling": {"engine": engine, wish: value}})


def test_a_row_that_the_engine_drops_is_an_error(make_policy, prompts, monkeypatch):
    policy = make_policy()
    done = SimpleNamespace(generated_tokens=[9], logprobs=[-1.0], error=None)
    config = SamplingConfig(engine="continuous", max_new_tokens=1)
    for results, message in (
        ([done] * 5, "5 of 6 rows were completed; the reason is in the log"),
        ([done] * 5 + [SimpleNamespace(generated_tokens=[], logprobs=[], error="no room")], "5 of 6 .*; no room"),
    ):
        monkeypatch.setattr(policy, "generate_batch", lambda *_, results=results, **__: dict(enumerate(results)))
        with pytest.raises(RuntimeError, match=message):
            sample_continuously(policy, prompts, 1, config, stop_ids=OFTEN, generator=numbers())


# ------------------------------------------------------------------------------------------------------------- a server


class Server:
    """Holds a model, samples from it by hand, and can be told to fail. Keeps every request it was sent."""

    def __init__(self, policy):
        self.policy = policy
        self.requests: list[tuple[str, dict | None]] = []
        self.faults: list = []  # functions of the handler, each used up by one request
        self.named_tokens = False  # an older vLLM: no token_ids
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body):
                server.requests.append((self.path, body))
                if server.faults:
                    server.faults.pop(0)(self)
                else:
                    self.reply(200, json.dumps(server.work(self.path, body)))

            def reply(self, status, text):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def work(self, path, body):
        if path == "/v1/models":
            return {"data": [{"id": "first"}, {"id": "second"}]}
        if path == "/load":
            self.policy = AutoModelForCausalLM.from_pretrained(body["path"]).eval()
            return {}
        assert path == "/v1/completions"
        choices = [self.complete(body, j) for j in range(body["n"])]
        return {"choices": choices[::-1]}  # in whatever order

    @torch.no_grad()
    def complete(self, body, j):
        """Log-probs are those of the model itself, before the temperature."""
        ids, logprobs, generator = [], [], numbers(body["seed"] + j)
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
            logits = self.policy(torch.tensor([body["prompt"] + ids]), use_cache=False).logits[0, -1]
            token = torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator).item()
            ids.append(token)
            logprobs.append(logits.log_softmax(-1)[token].item())
        record = {"token_logprobs": logprobs, "tokens": [f"token_id:{token}" for token in ids]}
        stopped = ids[-1] in body["stop_token_ids"]
        choice = {"index": j, "text": "?", "logprobs": record, "finish_reason": "stop" if stopped else "length"}
        return choice if self.named_tokens else choice | {"token_ids": ids}

    def asked(self) -> list[dict]:
        return [body for path, body in self.requests if path == "/v1/completions"]


@pytest.fixture
def policy(make_policy):
    return make_policy().eval()


@pytest.fixture
def server(make_policy, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(engines, "_FIRST_PAUSE", 0.0)
    server = Server(make_policy().eval())
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def settings(server):
    return SamplingConfig(engine="server", server_url=server.url, max_new_tokens=9, batch_size=4)


def draw(policy, prompts, config, n=1, *, seed=0, head=None):
    options = dict(stop_ids=OFTEN, generator=numbers(seed), value_head=head)
    return sample_from_server(policy, None, prompts, n, config, **options)


@pytest.mark.parametrize("named_tokens", [False, True])
def test_a_server_samples(server, policy, prompts, settings, named_tokens):
    server.named_tokens = named_tokens
    rollout = draw(policy, prompts, settings, n=2)
    assert rollout.prompts == [prompt for prompt in prompts for _ in range(2)]
    assert rollout.group_size == 2
    assert 0 < rollout.finished.sum() < 12
    agrees(policy, rollout)
    by_prompt = {tuple(body["prompt"]): body for body in server.asked()}
    for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        choice = server.complete(by_prompt[tuple(prompt)], row % 2)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in completion]
        expected = torch.tensor(choice["logprobs"]["token_logprobs"])
        torch.testing.assert_close(rollout.logprobs[row, : len(completion)], expected, rtol=1e-5, atol=1e-6)


def test_what_a_server_is_asked_for(server, policy, prompts, settings):
    """The whole distribution, in as many words: servers take filters from the checkpoint by default."""
    draw(policy, prompts, replace(settings, temperature=0.5), n=3)
    bodies = server.asked()
    assert sorted(body["prompt"] for body in bodies) == sorted(prompts)
    assert len({body["seed"] for body in bodies}) == len(prompts)
    for body in bodies:
        del body["prompt"], body["seed"]
        assert body == dict(
            model="first", n=3, max_tokens=9, temperature=0.5, stop_token_ids=list(range(8)), logprobs=1,
            top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
            return_token_ids=True, return_tokens_as_token_ids=True, skip_special_tokens=False,
            add_special_tokens=False,
        )  # fmt: skip
    draw(policy, prompts[:1], replace(settings, server_model="second", server_url=f"{server.url}/v1/"))
    assert server.asked()[-1]["model"] == "second"


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprobs_at_the_temperature_and_values(server, policy, prompts, settings, temperature):
    """The server's log-probs are those of temperature 1 whatever it samples at: at others they must not be taken."""
    head = head_of(policy)
    rollout = draw(policy, prompts, replace(settings, temperature=temperature), n=2, head=head)
    agrees(policy, rollout, temperature=temperature, head=head)


def test_at_temperature_one_the_servers_own_logprobs_are_kept(server, policy, prompts, settings):
    """They are of the weights that sampled, though those here have changed; the values are of the weights here."""
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    rollout = draw(policy, prompts, settings, head=head_of(policy))
    torch.testing.assert_close(rollout.logprobs, forced(server.policy, rollout).logprobs, rtol=1e-4, atol=1e-4)
    assert (rollout.logprobs - forced(policy, rollout).logprobs).abs().max() > 1e-3


def test_neither_batch_nor_n_changes_the_samples(server, policy, prompts, settings):
    first = draw(policy, prompts, settings, n=2)
    for config, n in ((replace(settings, batch_size=1), 2), (replace(settings, batch_size=100), 3)):
        again = draw(policy, prompts, config, n=n)
        assert first.completions == [again.completions[i * n + j] for i in range(len(prompts)) for j in range(2)]
    assert draw(policy, prompts, settings, n=2, seed=1).completions != first.completions


# ---------------------------------------------------------------------------------------------------------- new weights


def test_a_server_is_given_the_weights(server, policy, prompts, settings, make_tokenizer, tmp_path):
    with torch.no_grad():
        policy.lm_head.weight.mul_(3.0)
    tokenizer = make_tokenizer(eos_token="w2")
    options = dict(stop_ids=OFTEN, generator=numbers(), value_head=None)
    stale = sample_from_server(policy, tokenizer, prompts, 1, settings, **options)
    assert (stale.logprobs - forced(policy, stale).logprobs).abs().max() > 0.1
    fresh = replace(settings, server_weights=str(tmp_path / "weights"), server_refresh=f"{server.url}/load")
    agrees(policy, sample_from_server(policy, tokenizer, prompts, 1, fresh, **options))
    paths = [path for path, _ in server.requests]
    assert paths.index("/load") < len(paths) - 1 - paths[::-1].index("/v1/completions")


def test_a_command_is_given_the_folder(server, policy, settings, make_tokenizer, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[1], 'seen').write_text(' '.join(sys.argv[2:]))")
    folder = tmp_path / "weights"
    folder.mkdir()
    command = f"{sys.executable} '{script}' {folder}"
    config = replace(settings, server_weights=str(folder), server_refresh=command)
    refresh_server(policy, make_tokenizer(), config)
    assert (folder / "seen").read_text() == str(folder)
    assert (folder / "model.safetensors").exists()
    assert not server.requests


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such door')", "exit status 1: no such door"),
        ("while True: pass", "not done in 0.5 s"),
    ],
)
def test_a_command_that_fails(policy, settings, make_tokenizer, tmp_path, code, message):
    command = f'{sys.executable} -c "{code}"'
    config = replace(settings, server_weights=str(tmp_path), server_refresh=command, server_timeout=0.5)
    with pytest.raises(ConnectionError, match=message):
        refresh_server(policy, make_tokenizer(), config)


# --------------------------------------------------------------------------------------------------------------- faults


def test_failures_of_the_line_are_tried_again(server, policy, prompts, settings):
    settings = replace(settings, server_model="first")
    server.faults = [lambda handler: handler.reply(503, "busy"), lambda handler: handler.connection.close()]
    rollout = draw(policy, prompts[:1], settings)
    assert len(server.asked()) == 3
    assert len({body["seed"] for body in server.asked()}) == 1
    agrees(policy, rollout)


@pytest.mark.parametrize(
    ("fault", "kind", "message", "tries"),
    [
        (lambda handler: handler.reply(500, "out of memory"), ConnectionError, "HTTP 500: out of memory .tried 3", 3),
        (lambda handler: handler.reply(429, "slowly"), ConnectionError, "HTTP 429: slowly .tried 3", 3),
        (lambda handler: handler.reply(400, "top_k unknown"), ValueError, "refuses the request: HTTP 400: top_k un", 1),
        (lambda handler: handler.reply(404, "no model"), ValueError, "refuses the request: HTTP 404: no model", 1),
        (lambda handler: handler.reply(200, "<html>"), ValueError, "the answer is no JSON object: '<html>'", 1),
        (lambda handler: handler.reply(200, "[1]"), ValueError, "the answer is no JSON object", 1),
        (lambda handler: time.sleep(1), ConnectionError, "no answer in 0.3 s .tried 3", 3),
        (lambda handler: handler.reply(200, '{"choices": []}'), ValueError, "0 completions of a prompt came back", 1),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_a_server_that_fails(server, policy, prompts, settings, fault, kind, message, tries):
    server.faults = [fault] * 9
    config = replace(settings, server_model="first", server_retries=2, server_timeout=0.3)
    with pytest.raises(kind, match=message):
        draw(policy, prompts[:1], config)
    assert len(server.requests) == tries


def test_nobody_there(policy, prompts, settings):
    config = replace(settings, server_url="http://127.0.0.1:9", server_retries=1)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/v1/models: .*refused.* \(tried 2 times\)"):
        draw(policy, prompts, config)


GOOD = {"token_ids": [9, 10, 3], "logprobs": {"token_logprobs": [-1.0, -2.0, -3]}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ([9, 10, 3], [-1.0, -2.0, -3.0])),
        ({"token_ids": [9, 3, 10]}, ([9, 3], [-1.0, -2.0])),  # the server knows no stop_token_ids
        ({"token_ids": [9, 10, 11], "finish_reason": "length"}, ([9, 10, 11], [-1.0, -2.0, -3.0])),
        ({"token_ids": [9, 10, 11]}, "finish_reason 'stop' after token 11; expected a stop token"),
        ({"token_ids": [9, 10]}, "3 log-probs of 2 tokens; expected one of each"),
        ({"logprobs": None}, "0 log-probs of 3 tokens"),
        ({"logprobs": {"token_logprobs": [-1.0, None, -3.0]}}, "expected finite numbers"),
        ({"logprobs": {"token_logprobs": [-1.0, float("-inf"), -3.0]}}, "expected finite numbers"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "a completion of 0 tokens; expected 1 to 4"),
        ({"token_ids": [9] * 5, "logprobs": {"token_logprobs": [-1] * 5}}, "a completion of 5 tokens; expected 1 to 4"),
        ({"token_ids": [9, 40, 3]}, "expected 0 to 39: is it the same model"),
        ({"token_ids": None}, "the answer has no token ids"),
        ({"token_ids": None, "logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [-1] * 3}}, "no token ids"),
        (
            {"token_ids": None, "logprobs": {"tokens": ["token_id:9", "b", "c"], "token_logprobs": [-1] * 3}},
            "no token ids",
        ),
    ],
    ids=str,
)
def test_reading_a_completion(changes, expected):
    arguments = (GOOD | changes, "server", 4, OFTEN, 40)
    if isinstance(expected, tuple):
        assert read_choice(*arguments) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            read_choice(*arguments)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "server"}, "server_url=None: expected an address such as"),
        ({"engine": "server", "server_url": "localhost:8000"}, "server_url='localhost:8000': expected an address"),
        ({"server_url": "http://a"}, "server_url='http://a': expected engine='server' beside it"),
        ({"engine": "continuous", "server_model": "m"}, "server_model='m': expected engine='server' beside it"),
        (
            {"engine": "server", "server_url": "http://a", "server_weights": "w"},
            "server_weights='w': expected a folder",
        ),
        (
            {"engine": "server", "server_url": "http://a", "server_refresh": "r"},
            "server_weights=None: expected a folder",
        ),
        ({"top_k": 50}, "top_k: no setting of that name"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict(SamplingConfig, values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (PPOConfig, {"model": "m", "data": "d", "output": "o", "reward_function": "a:f"}),
        (EvaluateConfig, {"model": "m", "baseline": "b", "data": "d", "reward_function": "a:f"}),
    ],
)
def test_a_server_must_be_given_weights_that_change(kind, values):
    server = {"engine": "server", "server_url": "http://a"}
    with pytest.raises(ConfigError, match=r"^sampling.server_refresh=None: expected how the server gets"):
        from_dict(kind, values | {"sampling": server})
    told = server | {"server_weights": "w", "server_refresh": "http://a/load"}
    assert from_dict(kind, values | {"sampling": told}).sampling.server_weights == "w"


def test_there_must_be_something_to_continue(policy, settings):
    for prompts, n, message in (
        ([], 1, "no prompts"),
        ([[3], []], 1, "prompt 1 is empty"),
        ([[3]], 0, "n=0: expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(policy, prompts, settings, n=n)
        with pytest.raises(ValueError, match=message):
            sample_continuously(policy, prompts, n, SamplingConfig(), stop_ids=OFTEN, generator=numbers())


def test_generate_asks_the_server(server, policy, settings, make_tokenizer, tmp_path, capsys):
    policy.generation_config.eos_token_id = [*OFTEN]
    save_model(tmp_path / "model", policy, make_tokenizer(eos_token="w2"))
    [row] = generate(GenerateConfig(model=tmp_path / "model", prompt="w9 w10", sampling=settings, device="cpu"))
    [body] = server.asked()
    assert body["prompt"] == [9, 10]
    assert row["completion"].split() == [f"w{token}" for token in server.complete(body, 0)["token_ids"] if token != 2]


def test_the_engine_is_that_of_the_settings(policy, prompts, settings, server, monkeypatch, make_tokenizer):
    tokenizer = make_tokenizer(eos_token="w2")
    policy.generation_config.eos_token_id = [2, 5]
    asked = []
    for name in ("sample", "sample_continuously", "sample_from_server"):
        monkeypatch.setattr(engines, name, lambda *args, name=name, **options: asked.append((name, options)))
    for engine, config in (
        ("sample", SamplingConfig()),
        ("sample_continuously", SamplingConfig(engine="continuous")),
        ("sample_from_server", settings),
    ):
        engines.sample_completions(policy, tokenizer, prompts, config, numbers())
        name, options = asked.pop()
        assert name == engine
        assert options["stop_ids"] == {2, 5}
