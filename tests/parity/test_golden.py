"""The golden files: they are complete, record the versions that wrote them, and are small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.parity.golden import FOLDER, Case, case_name, hold, read

DPO = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
DPO = (DPO + "sigmoid_norm").split()
GRPO = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
DIVERGENCES = {"forward_kl", "js_divergence", "alpha_divergence"}
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}


def settings_of(file: str, loss: str) -> list[dict]:
    return [case.settings for case in read(file).cases.values() if case.settings["loss_type"] in (loss, [loss])]


def test_the_files():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert list(FILES) == sorted(set(re.findall(r'read\("(\w+)"\)', tests))), "a file without a test, or the reverse"
    assert sum(path.stat().st_size for path in FILES.values()) < 480_000


@pytest.mark.parametrize("file", FILES)
def test_each_says_what_made_it(file):
    """The recorded versions are those that the requirements pin."""
    golden = read(file)
    pins = "requirements-1.12.txt" if file == "trl_ppo" else "requirements.txt"
    requirements = (Path(__file__).parent / pins).read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements, re.MULTILINE))
    peers = {"trl", "liger-kernel", "stable-baselines3"} & golden.versions.keys()
    assert len(peers) == 1 and "torch" in golden.versions and isinstance(golden.seed, int)
    assert {name: pinned.get(name, golden.versions[name]) for name in golden.versions} == golden.versions
    for name, case in golden.cases.items():
        assert case_name(case.settings) == name
        assert all(result.isfinite().all() for result in case.results.values())


@pytest.mark.parametrize("loss", DPO)
def test_every_dpo_loss_and_what_it_combines_with(loss):
    settings = settings_of("trl_dpo", loss)
    assert len({each["beta"] for each in settings}) == 2
    with_divergence = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
    divergences = {each["f_divergence_type"] for each in settings if "f_divergence_type" in each}
    assert divergences == (DIVERGENCES if loss in with_divergence else set())
    assert any("ld_alpha" in each for each in settings) or loss == "sft"
    absent = [name for name in read("trl_dpo").absent if name.startswith(f"{loss} ") and "use_weighting" in name]
    assert any("use_weighting" in each for each in settings) != bool(absent)


def test_what_trl_cannot_do_is_recorded_with_its_reason():
    reasons = {name.split()[0]: reason for name, reason in read("trl_dpo").absent.items()}
    assert reasons.keys() == {"hinge", "aot", "aot_unpaired", "sft"}
    assert all(reasons[loss].startswith("NotImplementedError") for loss in ("aot", "aot_unpaired"))
    assert all(reasons[loss].startswith("RuntimeError") for loss in ("hinge", "sft"))


@pytest.mark.parametrize("loss", GRPO)
def test_every_grpo_loss_and_what_it_combines_with(loss):
    settings = settings_of("trl_grpo", loss)
    fields = {"epsilon", "beta", "use_bias_correction_kl", "off_policy_mask_threshold", "importance_sampling_ratio"}
    assert fields | {"truncated"} <= {key for each in settings for key in each}
    assert any(each.get("importance_sampling_level") == "sequence" for each in settings) or loss == "vespo"


def test_holding_tells_a_wrong_number():
    """One part in 1e5 of one entry, and anything where there should be nothing, are refused; 1e-7 is not."""
    case = Case({}, {"loss": torch.tensor(2.0), "gradient": torch.tensor([0.0, -4.0, 1.0])})
    hold(case, loss=torch.tensor(2.0 * (1 + 1e-7)), gradient=case.results["gradient"] * (1 + 1e-7))
    with pytest.raises(AssertionError, match="loss"):
        hold(case, loss=torch.tensor(2.0 * (1 + 1e-5)), gradient=case.results["gradient"])
    for wrong in ([1e-5, -4.0, 1.0], [0.0, -4.0, 1.00001]):
        with pytest.raises(AssertionError, match="gradient"):
            hold(case, loss=torch.tensor(2.0), gradient=torch.tensor(wrong))
    with pytest.raises(AssertionError):
        hold(case, loss=torch.tensor(2.0))
