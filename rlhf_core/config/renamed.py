"""Settings that were renamed: an old name is an error that gives the new one."""

from __future__ import annotations

_KL = ("coef", "target", "horizon", "control", "coef_end", "estimator", "ratio", "stop")
_VALUE = ("coef", "clip", "detach", "warmup")
_LOSS = ("clip", "clip_high", "dual_clip", "ratio_max", "temperature_pos", "temperature_neg", "nll_coef")

RENAMED = {
    "ppo_epochs": "rollout_epochs",
    **{f"kl_{name}": f"kl.{name}" for name in _KL},
    "kl_in": "kl.apply_to",
    "value": "value.model",
    **{f"value_{name}": f"value.{name}" for name in _VALUE},
    **{f"score_{name}": f"score.{name}" for name in ("center", "scale", "clip")},
    "missing_eos": "score.missing_eos",
    "missing_eos_penalty": "score.missing_eos_penalty, with score.missing_eos=subtract or replace",
    "overlong_buffer": "score.overlong_buffer",
    "mask_truncated": "score.missing_eos=mask",
    **{f"reference_{name}": f"reference.{name}" for name in ("update", "every", "rate")},
    "cache_reference": "reference.cache",
    "reference_cache": "reference.cache_folder",
    **{name: f"loss_options={name}:NUMBER" for name in _LOSS},
}
