"""What became of the rows and tokens of a data set: kept, dropped and why, cut and where. Nothing is lost unsaid."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.data.tokenize import Example


@dataclass
class Loss:
    """Rows that lost something, or all, for one reason."""

    rows: int = 0
    tokens: int = 0  # 0 where a row was dropped before it was tokenised
    first: str = ""  # the place of the first of them


@dataclass
class Account:
    """Filled while a data set is read; kept beside its cache and in run.json."""

    source: str = ""
    rows: int = 0  # that are trained on
    prompt_tokens: int = 0
    completion_tokens: int = 0
    supervised_tokens: int = 0  # completion tokens that a loss counts
    dropped: dict[str, Loss] = field(default_factory=dict)  # by reason
    cut: dict[str, Loss] = field(default_factory=dict)  # by what was cut
    noted: dict[str, Loss] = field(default_factory=dict)  # what to know of rows that lost nothing

    @property
    def rows_dropped(self) -> int:
        return sum(loss.rows for loss in self.dropped.values())

    @property
    def rows_read(self) -> int:
        return self.rows + self.rows_dropped

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def keep(self, example: "Example") -> None:
        completion_tokens = sum(map(len, example.completions))
        self.rows += 1
        self.prompt_tokens += len(example.prompt)
        self.completion_tokens += completion_tokens
        self.supervised_tokens += completion_tokens if example.supervised is None else sum(map(sum, example.supervised))

    def drop(self, reason: str, place: str, tokens: int = 0) -> None:
        _count(self.dropped, reason, place, tokens)

    def cut_off(self, what: str, place: str, tokens: int) -> None:
        _count(self.cut, what, place, tokens)

    def note(self, what: str, place: str) -> None:
        _count(self.noted, what, place, 0)

    def kept_line(self) -> str:
        prompt, completion, supervised = self.prompt_tokens, self.completion_tokens, self.supervised_tokens
        of = f" of {self.rows_read:,}" if self.rows_read > self.rows else ""
        parts = f"{prompt:,} of prompts, {completion:,} of completions" if completion else "all of prompts"
        learned = "" if supervised == completion else f", {supervised:,} of these supervised"
        return f"{self._prefix}{self.rows:,}{of} rows, {self.tokens:,} tokens: {parts}{learned}"

    def losses(self, rows_read: int | None = None) -> list[str]:
        """A line on what was dropped, one on what was cut, one on what else to know; none where there is nothing."""
        total = f"{self.rows_read if rows_read is None else rows_read:,}"
        lines = []
        for verb, losses in (("dropped ", self.dropped), ("cut ", self.cut), ("", self.noted)):
            if losses:
                rows, tokens = (sum(getattr(loss, name) for loss in losses.values()) for name in ("rows", "tokens"))
                of_tokens = {
                    "dropped ": f" with {tokens:,} tokens" if tokens else "",
                    "cut ": f", {tokens:,} tokens off",
                }
                lines.append(f"{self._prefix}{verb}{rows:,} of {total} rows{of_tokens.get(verb, '')}: {listed(losses)}")
        return lines

    def nothing_left(self) -> str:
        """For an error."""
        reasons = listed(self.dropped) or "there is nothing in it"
        return f"{self._prefix}0 of {self.rows_read:,} rows left: {reasons}"

    @property
    def _prefix(self) -> str:
        return f"{self.source}: " if self.source else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Account":
        losses = {
            name: {reason: Loss(**loss) for reason, loss in values[name].items()}
            for name in ("dropped", "cut", "noted")
        }
        return cls(**values | losses)


def _count(losses: dict[str, Loss], reason: str, place: str, tokens: int) -> None:
    loss = losses.setdefault(reason, Loss(first=place))
    loss.rows += 1
    loss.tokens += tokens


def listed(losses: dict[str, Loss], *, most: int = 5) -> str:
    """'2 x this, 1 x that (first: rows.jsonl:3)', the commonest first; nothing for nothing."""
    if not losses:
        return ""
    commonest = sorted(losses.items(), key=lambda item: -item[1].rows)
    parts = [f"{loss.rows:,} x {reason}" for reason, loss in commonest[:most]]
    rest = sum(loss.rows for _, loss in commonest[most:])
    parts += [f"{rest:,} x other reasons"] * bool(rest)
    return f"{', '.join(parts)} (first: {next(iter(losses.values())).first})"
