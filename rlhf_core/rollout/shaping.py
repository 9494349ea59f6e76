"""What happens to a completion's score between the reward and the advantages, by the settings `score.*`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rlhf_core.config import ScoreShapingConfig
from rlhf_core.control import RunningMoments
from rlhf_core.ops.shaping import clip_scores, missing_eos_penalty, overlong_penalty, scale_scores
from rlhf_core.rollout.experience import Experience


class ScoreShaping:
    """Center, scale and clip scores, then apply the penalties of length.

    Attributes:
        initial: moments of the starting policy's scores, whose mean is subtracted; its mean is 0 if none were measured.
        seen: moments of all scores so far, by which scores are scaled.
    """

    def __init__(self, config: ScoreShapingConfig, max_new_tokens: int):
        self.config, self.max_new_tokens = config, max_new_tokens
        self.initial, self.seen = RunningMoments(), RunningMoments()

    def shape(self, experience: Experience, *, update: bool = True) -> Experience:
        """Return the experience with shaped scores: centered, scaled, clipped, and last the penalties of a missing
        end-of-sequence token and of length, so that no clip reduces them and they enter no moment.

        Token scores are scaled as well, and otherwise left as they are. Completions that do not take part keep score 0.
        With update=False the scores do not enter `seen`.
        """
        config, tokens = self.config, experience.token_scores
        scores = experience.scores - self.initial.mean
        if config.scale != "none":
            if update:
                self.seen.update(scores, experience.takes_part, all_ranks=True)
            mean = self.seen.mean if config.scale == "normalize" else 0.0
            scores = scale_scores(scores, std=self.seen.std, mean=mean)
            tokens = None if tokens is None else scale_scores(tokens, std=self.seen.std)
        if config.clip is not None:
            scores = clip_scores(scores, low=-config.clip, high=config.clip)
        if config.missing_eos in ("subtract", "replace"):
            scores = missing_eos_penalty(
                scores, experience.finished, penalty=config.missing_eos_penalty, mode=config.missing_eos
            )
        if config.overlong_buffer:
            buffer = config.overlong_buffer
            scores = scores + overlong_penalty(experience.lengths, max_length=self.max_new_tokens, buffer=buffer)
        return replace(experience, scores=torch.where(experience.takes_part, scores, 0.0), token_scores=tokens)

    def exclude_truncated(self, experience: Experience) -> Experience:
        """Return the experience without truncated completions if `missing_eos` is "mask"."""
        return experience.exclude(~experience.finished) if self.config.missing_eos == "mask" else experience

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial.state_dict(), "seen": self.seen.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial.load_state_dict(state["initial"])
        self.seen.load_state_dict(state["seen"])
