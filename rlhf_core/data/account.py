"""Counts of the rows and tokens of a data set: kept, dropped and why, cut and where."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_core.data.records import Example


@dataclass
class Count:
    """Rows that were dropped, cut or noted for one reason."""

    rows: int = 0
    tokens: int = 0  # tokens lost; 0 where a row was dropped before it was tokenised
    first: str = ""  # the place of the first such row


@dataclass
class Account:
    """Counts that are filled while a data set is read; kept with its cache and in run.json."""

    source: str = ""
    rows: int = 0  # rows kept
    prompt_tokens: int = 0
    completion_tokens: int = 0
    supervised_tokens: int = 0  # completion tokens that a loss counts
    dropped: dict[str, Count] = field(default_factory=dict)  # by reason
    cut: dict[str, Count] = field(default_factory=dict)  # by what was cut
    noted: dict[str, Count] = field(default_factory=dict)  # remarks on rows that lost nothing

    @property
    def rows_dropped(self) -> int:
        return sum(count.rows for count in self.dropped.values())

    @property
    def rows_read(self) -> int:
        return self.rows + self.rows_dropped

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def keep(self, example: Example) -> None:
        completion_tokens = sum(map(len, example.completions))
        self.rows += 1
        self.prompt_tokens += len(example.prompt)
        self.completion_tokens += completion_tokens
        self.supervised_tokens += completion_tokens if example.supervised is None else sum(map(sum, example.supervised))

    def drop(self, reason: str, place: str, tokens: int = 0) -> None:
        _add(self.dropped, reason, place, tokens)

    def cut_off(self, what: str, place: str, tokens: int) -> None:
        _add(self.cut, what, place, tokens)

    def note(self, what: str, place: str) -> None:
        _add(self.noted, what, place, 0)

    def kept_line(self) -> str:
        """Return one line on the rows and tokens that were kept."""
        prompt, completion, supervised = self.prompt_tokens, self.completion_tokens, self.supervised_tokens
        of = f" of {self.rows_read:,}" if self.rows_read > self.rows else ""
        parts = f"{prompt:,} of prompts, {completion:,} of completions" if completion else "all of prompts"
        partly = "" if supervised == completion else f", {supervised:,} of these supervised"
        return f"{self._prefix}{self.rows:,}{of} rows, {self.tokens:,} tokens: {parts}{partly}"

    def warnings(self, rows_read: int | None = None) -> list[str]:
        """Return up to three lines: on the rows that were dropped, that were cut, and that have a remark."""
        total = f"{self.rows_read if rows_read is None else rows_read:,}"
        lines = []
        for verb, counts in (("dropped ", self.dropped), ("cut ", self.cut), ("", self.noted)):
            if counts:
                rows = sum(count.rows for count in counts.values())
                tokens = sum(count.tokens for count in counts.values())
                of_tokens = {
                    "dropped ": f" with {tokens:,} tokens" if tokens else "",
                    "cut ": f", {tokens:,} tokens off",
                }
                lines.append(
                    f"{self._prefix}{verb}{rows:,} of {total} rows{of_tokens.get(verb, '')}: {list_reasons(counts)}"
                )
        return lines

    def nothing_left(self) -> str:
        """Return the message of the error that is raised when no row is left."""
        reasons = list_reasons(self.dropped) or "there is nothing in it"
        return f"{self._prefix}0 of {self.rows_read:,} rows left: {reasons}"

    @property
    def _prefix(self) -> str:
        return f"{self.source}: " if self.source else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Account":
        counts = {
            name: {reason: Count(**count) for reason, count in values[name].items()}
            for name in ("dropped", "cut", "noted")
        }
        return cls(**values | counts)


def _add(counts: dict[str, Count], reason: str, place: str, tokens: int) -> None:
    count = counts.setdefault(reason, Count(first=place))
    count.rows += 1
    count.tokens += tokens


def list_reasons(counts: dict[str, Count], *, most: int = 5) -> str:
    """Return "2 x this, 1 x that (first: rows.jsonl:3)", most frequent first; empty for no counts."""
    if not counts:
        return ""
    by_rows = sorted(counts.items(), key=lambda item: -item[1].rows)
    parts = [f"{count.rows:,} x {reason}" for reason, count in by_rows[:most]]
    rest = sum(count.rows for _, count in by_rows[most:])
    parts += [f"{rest:,} x other reasons"] * bool(rest)
    return f"{', '.join(parts)} (first: {next(iter(counts.values())).first})"
