"""TRL's `GRPOTrainer._compute_loss`: its eight losses on chosen log-probs, with what can be combined with them.

Left out, because we have no counterpart: `top_entropy_quantile`, the adaptive entropy coefficient, and the loss of
`RLOOTrainer`, whose ratio is the product over a completion's tokens.
"""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset
from golden import Golden, installed, leaf
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

SEED = 1
LENGTHS = [7, 1, 4, 3, 6, 2]
ADVANTAGES = [1.25, -0.75, 0.0, 0.5, -1.5, 0.375]
DRIFTS = [0.25, 0.5, -0.125, -0.25, -0.375, 0.125]  # of the log-probs since sampling, on average over a completion
MAX_LENGTH = 9  # of a completion, which dr_grpo divides by: longer than the longest here

LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
CLIPPED = ["grpo", "dr_grpo", "dapo", "bnpo", "luspo"]


def cases() -> list[dict]:
    """By the names of `GRPOConfig`, and three of the batch.

    `importance_sampling_ratio`, "token" or "sequence": what vLLM's log-probs would have been corrected by.
    `num_items_in_batch`: tokens of the whole generation batch where they are more than this one's.
    `truncated`: one completion does not take part, as `mask_truncated_completions` has it.
    """
    grid = []
    for loss in LOSSES:
        base = dict(loss_type=loss, epsilon=0.2, epsilon_high=1.5 if loss == "cispo" else 0.3)  # cispo's is the ratio
        with_kl = base | dict(beta=0.1)
        grid += [base, with_kl | dict(use_bias_correction_kl=False), with_kl | dict(use_bias_correction_kl=True)]
        grid += [base | dict(off_policy_mask_threshold=0.1), base | dict(importance_sampling_ratio="token")]
        if loss != "vespo":  # whose weight is the ratio's product over tokens already
            grid.append(base | dict(importance_sampling_ratio="sequence"))
            grid.append(base | dict(importance_sampling_level="sequence"))
        if loss in CLIPPED:
            grid.append(base | dict(delta=1.375))
            grid.append(base | dict(delta=1.375, importance_sampling_level="sequence"))
        if loss in ("dapo", "cispo", "vespo"):
            grid.append(base | dict(num_items_in_batch=50))
        grid.append(base | dict(truncated=True))
    grid += [
        *(dict(loss_type=loss, beta=0.1, importance_sampling_level="sequence") for loss in ("grpo", "luspo")),
        dict(loss_type="cispo", epsilon_high=5.0),
        dict(loss_type="sapo", sapo_temperature_pos=1.5, sapo_temperature_neg=2.0),
        dict(loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_pos=2.0, vespo_k_neg=1.5, vespo_lambda_neg=0.5),
        dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=False, off_policy_mask_threshold=0.1),
        dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=False, importance_sampling_ratio="token"),
        dict(loss_type="grpo", entropy_coef=0.01),
        dict(loss_type="dapo", entropy_coef=0.01, num_items_in_batch=50),
    ]
    return grid


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    """Ratios that meet each bound from both sides and with either sign of advantage, by token and by sequence."""
    generator = torch.Generator().manual_seed(SEED)
    mask = tiny.ragged_mask(LENGTHS)
    truncated_mask = mask & (torch.arange(len(LENGTHS)) != 3)[:, None]

    def masked(low: float, high: float) -> Tensor:
        return torch.where(mask, tiny.draw(generator, *mask.shape, low=low, high=high), 0.0)

    logprobs = masked(-3.0, -1.0)
    drift = torch.where(mask, torch.tensor(DRIFTS).float()[:, None], 0.0)
    return {
        "mask": mask,
        "truncated_mask": truncated_mask,
        "advantages": torch.tensor(ADVANTAGES).float(),
        "logprobs": logprobs,
        "new_logprobs": logprobs + drift + masked(-0.75, 0.75),
        "ref_logprobs": logprobs + masked(-0.5, 0.5),
        "entropy": masked(0.0, 2.0),
        "token_ratio": torch.where(mask, tiny.draw(generator, *mask.shape, low=0.5, high=2.0), 1.0),
        "sequence_ratio": tiny.draw(generator, len(LENGTHS), 1, low=0.5, high=2.0),
    }


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    settings = dict(settings)
    ratio, items = settings.pop("importance_sampling_ratio", None), settings.pop("num_items_in_batch", None)
    mask = inputs["truncated_mask" if settings.pop("truncated", False) else "mask"].long()
    new_logprobs = leaf(inputs["new_logprobs"])

    trainer = _trainer(settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (new_logprobs, inputs["entropy"].double(), None)
    batch = dict(
        prompt_ids=torch.full((len(mask), 1), tiny.WORD),
        prompt_mask=torch.ones(len(mask), 1, dtype=torch.long),
        completion_ids=torch.full(mask.shape, tiny.WORD),
        completion_mask=mask,
        advantages=inputs["advantages"].double(),
        old_per_token_logps=inputs["logprobs"].double(),
        ref_per_token_logps=inputs["ref_logprobs"].double(),
        num_items_in_batch=torch.tensor(items) if items else mask.sum(),
    )
    if ratio:  # set here, because the constructor would look for a vLLM to talk to
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        batch["importance_sampling_ratio"] = inputs[f"{ratio}_ratio"].double()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return dict(loss=loss, gradient=new_logprobs.grad)


def _trainer(settings: dict) -> GRPOTrainer:
    return GRPOTrainer(
        model=tiny.causal_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            max_completion_length=MAX_LENGTH,
            num_generations=2,
            per_device_train_batch_size=len(LENGTHS),
            **tiny.quiet(),
            **settings,
        ),
        train_dataset=Dataset.from_list([dict(prompt="a")] * len(LENGTHS)),
        processing_class=tiny.tokenizer(),
    )
