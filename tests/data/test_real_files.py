"""Real files from their path to the packed batch: no format is named, no column renamed."""

import pytest
from transformers import AutoTokenizer

from rlhf_core.batch import PackedBatch
from rlhf_core.config import DataConfig
from rlhf_core.data.formats import read_records
from rlhf_core.data.loader import load_examples
from tests.conftest import shared_folder

NEEDS = {  # by the prefix of a file's name
    "pref": "preference",
    "hh": "preference",
    "kto": "unpaired",
    "prompts": "prompts",
}
NUMBER_OF_COMPLETIONS = {"supervised": 1, "preference": 2, "unpaired": 1, "prompts": 0}
# Rows that cannot be used: an empty answer (Alpaca, HH, LLMBar), and dialogues that differ before the last answer (HH).
BAD_ROWS = {"alpaca_data.json.gz": 28, "hh_rlhf_harmless_base_raw_test.jsonl.gz": 9, "pref_llmbar_test.jsonl.gz": 1}
NAMES = sorted(path.name for path in (shared_folder() / "data").glob("*.gz"))


def need_of(name: str) -> str:
    return NEEDS.get(name.split("_")[0], "supervised")


def test_the_files_are_there(shared):
    assert len(NAMES) == 32


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_read(shared, name):
    """Only rows that are known to be bad are skipped; `DataError` would name any other."""
    records = read_records(shared / "data" / name, need=need_of(name), skip_bad_rows=BAD_ROWS.get(name, 0))
    assert len(records) >= 110
    for record in records:
        assert len(record.completions) == NUMBER_OF_COMPLETIONS[need_of(name)]
        assert all(isinstance(completion, str) and completion.strip() for completion in record.completions)
        assert record.prompt is None if "text" in record.row else record.prompt
        assert (record.label is not None) == (need_of(name) == "unpaired")
        assert (record.weight, record.margin, record.steps, record.tools) == (1.0, None, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_in_the_batch(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    data = DataConfig(path=str(shared / "data" / name), limit=40, skip_bad_rows=9)
    examples = load_examples(data, tokenizer, need=need_of(name))
    assert len(examples) == 40
    if need_of(name) == "prompts":
        assert all(example.prompt and not example.completions for example in examples)
        return
    batch = PackedBatch.pack([(row.prompt, row.completions, row.supervised) for row in examples], share=True)
    completions = [ids for row in examples for ids in row.completions]
    assert [
        ids[mask].tolist() for ids, mask in zip(batch.completion_ids(), batch.loss_mask, strict=True)
    ] == completions
    assert batch.num_tokens == sum(len(row.prompt) for row in examples) + sum(map(len, completions))
    assert batch.num_supervised_tokens == batch.num_completion_tokens
    assert all(ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1] for ids in completions)
