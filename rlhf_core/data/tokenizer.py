"""The interface that rlhf_core needs of a tokenizer: a subset of transformers' `PreTrainedTokenizerBase`.

It exists for annotations only. transformers is slow to import, and configs and data code do not need it.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol


class AddedToken(Protocol):
    """A token that was added to a vocabulary (`tokenizers.AddedToken`)."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """A tokenizer as `transformers.AutoTokenizer` loads it.

    Fast tokenizers also have a `backend_tokenizer`, a `tokenizers.Tokenizer`; read it with `getattr(..., None)`.
    """

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    padding_side: str
    chat_template: str | None

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    def __call__(
        self,
        text: str | list[str],
        /,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        verbose: bool = True,
    ) -> Mapping[str, Any]: ...

    def decode(
        self,
        token_ids: Sequence[int],
        /,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], /, *, skip_special_tokens: bool = False
    ) -> list[str]: ...

    def convert_ids_to_tokens(self, ids: int, /) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], /) -> int: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> Any: ...

    def get_chat_template(self, chat_template: str | None, tools: list[dict[str, Any]] | None, /) -> str: ...

    def save_pretrained(self, save_directory: str | PathLike[str], /) -> Any: ...
