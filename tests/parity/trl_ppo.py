"""TRL 1.12's `PPOTrainer.train`, whole: from a rollout to the gradients of its updates.

The completions are chosen here, so that they end in every way: at once, in the middle, with the last token of the
buffer, and not at all. All else is TRL's own code on tiny models in float64: `train` runs one iteration and is looked
at from outside, its local variables after the backward of each micro-batch and at the end.

1.12.0 is the last TRL that had PPO, and needs an environment of its own.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable

import numpy as np
import tiny
import torch
from datasets import Dataset
from golden import Golden, installed
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

SEED = 8
ROWS, WIDTH = 16, 5  # completions, and the tokens of their buffer
PROMPTS = [1, 3, 2, 3]  # lengths, again and again
LENGTHS = [5, 1, 3, 5, 2, 4, 5, 5, 1, 4, 3, 5, 2, 4, 5, 3]
CUT_OFF = [0, 6, 11]  # of those that fill the buffer, the ones without an end; the others end with its last token
EPOCHS = 2
ROLLOUT = ["logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns"]
GAUGES = {  # what is logged, by our names
    "approx_kl": "policy/approxkl_avg",
    "clip_fraction": "policy/clipfrac_avg",
    "entropy": "policy/entropy_avg",
    "ratio": "val/ratio",
    "kl": "objective/kl",
}


def cases() -> list[dict]:
    """By the names of `PPOConfig`; and `pad`, the token that pads.

    Without a stop token every completion fills the buffer. Two minibatches an epoch but where
    `gradient_accumulation_steps` makes micro-batches of what would be one.
    """
    full, ended = dict(stop_token=None), dict(stop_token="eos")
    return [
        full | dict(max_grad_norm=0.01),
        full | dict(kl_estimator="k3", temperature=1.0, gamma=0.9, lam=0.8),
        full | dict(whiten_rewards=True),
        ended,
        ended | dict(kl_estimator="k3", gamma=0.9, lam=0.8, cliprange=0.1, cliprange_value=0.05, vf_coef=0.5),
        ended | dict(whiten_rewards=True),
        ended | dict(missing_eos_penalty=1.0),
        ended | dict(gradient_accumulation_steps=2, num_mini_batches=1),
        ended | dict(gradient_accumulation_steps=2, num_mini_batches=2),
        ended | dict(pad="eos"),
    ]


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    """Both sets of completions, each with its lengths, and all weights, in float32, which holds them exactly."""
    generator = torch.Generator().manual_seed(SEED)
    words = torch.randint(tiny.WORD, len(tiny.WORDS), (2, ROWS, WIDTH), generator=generator)
    lengths = torch.tensor(LENGTHS)
    ends = torch.arange(WIDTH) == lengths[:, None] - 1
    ends[CUT_OFF] = False
    weights = {
        f"{role}.{name}": tensor.float()
        for role, model in tiny.ppo_models(SEED).items()
        for name, tensor in model.state_dict().items()
    }
    return {
        "full_responses": words[0],
        "full_lengths": torch.full((ROWS,), WIDTH),
        "eos_responses": words[1].masked_fill(ends, tiny.EOS),
        "eos_lengths": lengths,
        **weights,
    }


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    settings = dict(settings)
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    if settings.pop("pad", None) == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    which = "eos" if settings["stop_token"] else "full"
    past_end = torch.arange(WIDTH) >= inputs[f"{which}_lengths"][:, None]
    responses = inputs[f"{which}_responses"].masked_fill(past_end, tokenizer.pad_token_id)
    trainer = _trainer(settings, tokenizer)
    watch = Watch(trainer)
    ppo_trainer.batch_generation = chosen(responses)
    trainer.add_callback(watch)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return watch.seen()


def chosen(responses: Tensor) -> Callable:
    """In the place of `batch_generation`: these completions, and the logits that the policy gives for them."""

    def generate(model: nn.Module, queries: Tensor, _: int, pad: int, config: object) -> tuple[Tensor, Tensor]:
        whole = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / config.temperature

    return generate


class Watch(TrainerCallback):
    """What `train` computes, taken from its local variables."""

    def __init__(self, trainer: PPOTrainer):
        self.roles = {"policy": trainer.policy_model, "value_model": trainer.value_model}
        self.parts: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        backward, step = trainer.accelerator.backward, trainer.optimizer.optimizer.step

        def watched_backward(loss: Tensor) -> None:
            backward(loss)
            local = self._locals()
            part = {name: local[name].detach() for name in ["new_logprobs", "vpred", "pg_loss", "vf_loss"]}
            self.parts.append(part | dict(rows=torch.from_numpy(local["micro_batch_inds"])))

        def watched_step(*arguments: object, **options: object) -> object:
            """Inside accelerate's wrapper, which leaves some calls out, and after any clipping."""
            self.gradients.append(
                {
                    role: torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
                    for role, model in self.roles.items()
                }
            )
            return step(*arguments, **options)

        trainer.accelerator.backward, trainer.optimizer.optimizer.step = watched_backward, watched_step

    def on_step_end(self, *_: object, **__: object) -> None:
        local = self._locals()
        self.rollout = {name: local[name].detach() for name in ["queries", *ROLLOUT]}
        self.gauges = {name: torch.tensor(local["metrics"][theirs]) for name, theirs in GAUGES.items()}

    def seen(self) -> dict[str, Tensor]:
        """Of the parameters' gradients only those of the last update, which all before it have led to."""
        parts = {name: torch.stack([part[name] for part in self.parts]) for name in self.parts[0]}
        gradients = {f"{role}_gradient": gradient.float() for role, gradient in self.gradients[-1].items()}
        return self.rollout | self.gauges | parts | gradients | dict(updates=torch.tensor(len(self.gradients)))

    def _locals(self) -> dict:
        frame = sys._getframe(1)
        while frame.f_code is not PPOTrainer.train.__code__:
            frame = frame.f_back
        return frame.f_locals


def _trainer(settings: dict, tokenizer: object) -> PPOTrainer:
    np.random.seed(SEED)  # whence it shuffles
    models = tiny.ppo_models(SEED)
    # Twice the rows that are asked for: in the last batch of an epoch accelerate lets every call update.
    firsts = [tiny.WORD + row % 4 for row in range(2 * ROWS)]
    prompts = [list(range(first, first + PROMPTS[row % 4])) for row, first in enumerate(firsts)]
    data = Dataset.from_dict(dict(input_ids=prompts))
    accumulation = settings.get("gradient_accumulation_steps", 1)
    config = dict(
        per_device_train_batch_size=ROWS // accumulation,
        local_rollout_forward_batch_size=ROWS,
        num_ppo_epochs=EPOCHS,
        num_mini_batches=2,
        total_episodes=ROWS,
        response_length=WIDTH,
        optim="sgd",  # so that an update is its gradient
        learning_rate=0.02,
        num_sample_generations=0,
        save_strategy="no",
    )
    return PPOTrainer(
        args=PPOConfig(**tiny.quiet() | config | dict(gradient_accumulation_steps=1) | settings),
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=models["reference"],
        value_model=models["value_model"],
        reward_model=models["reward_model"],
        train_dataset=data,
        eval_dataset=data,
    )
