"""A checkpoint is whole or not there: whatever happens while it is written, and whatever happens to it later."""

import builtins
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.config import OptimConfig
from rlhf_core.training import checkpoint
from rlhf_core.training.checkpoint import find_fault, load_checkpoint, newest_checkpoint, save_checkpoint
from rlhf_core.training.optim import build_optimizer

FILES = {"policy.safetensors", "critic.safetensors", "optimizer.safetensors", "config.json", "state.json"}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """The calls are made, the wait for the disk is saved."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Learner:
    """Two modules and their optimizer; `learn` takes a step that is a function of the step's number."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.modules = {"policy": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "critic": nn.Linear(4, 1)}
        self.optimizer = build_optimizer(self.modules.values(), OptimConfig(lr=0.1, weight_decay=0.1))
        self.step = 0

    def learn(self) -> "Learner":
        self.step += 1
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(self.step))
        self.modules["critic"](self.modules["policy"](inputs)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    def save(self, root: Path, keep: int = 2, **state) -> Path:
        return save_checkpoint(
            root,
            self.step,
            modules=self.modules,
            optimizer=self.optimizer,
            config={"lr": 0.1},
            state=state,
            keep=keep,
        )

    def load(self, path: Path) -> "Learner":
        self.step = load_checkpoint(path, modules=self.modules, optimizer=self.optimizer)["step"]
        return self

    def everything(self) -> list[torch.Tensor]:
        weights = [value for module in self.modules.values() for value in module.state_dict().values()]
        moments = self.optimizer.state_dict()["state"]
        return weights + [moments[number][name] for number in sorted(moments) for name in sorted(moments[number])]


def same(one: Learner, other: Learner) -> bool:
    pairs = list(zip(one.everything(), other.everything(), strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def after(steps: int) -> Learner:
    learner = Learner()
    for _ in range(steps):
        learner.learn()
    return learner


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# ----------------------------------------------------------------------------------------------------------- the layout


def test_what_a_checkpoint_holds(tmp_path):
    path = after(3).save(tmp_path / "deep" / "checkpoints", controllers={"kl": {"kl_coef": 0.1}})
    assert path == tmp_path / "deep" / "checkpoints" / "step-000003"
    assert {file.name for file in path.iterdir()} == FILES | {"manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["step"] == 3
    assert manifest["files"].keys() == FILES
    for name, about in manifest["files"].items():
        assert about["bytes"] == (path / name).stat().st_size
        assert len(about["sha256"]) == 64
    assert manifest["versions"]["torch"] == version("torch")
    assert json.loads((path / "state.json").read_text()) == {"step": 3, "controllers": {"kl": {"kl_coef": 0.1}}}
    assert json.loads((path / "config.json").read_text()) == {"lr": 0.1}
    assert names(path.parent) == ["step-000003"]


def test_the_same_config_has_the_same_hash(tmp_path):
    manifests = [json.loads((after(n).save(tmp_path) / "manifest.json").read_text()) for n in (1, 2)]
    first, second = (manifest["files"] for manifest in manifests)
    assert first["config.json"] == second["config.json"]
    assert first["policy.safetensors"] != second["policy.safetensors"]


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    path = after(1).save(tmp_path)
    Learner().load(path)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_everything_comes_back_and_training_goes_on_as_if_nothing_had_been(tmp_path):
    path = after(3).save(tmp_path)
    restored = Learner(seed=1).load(path)
    assert restored.step == 3
    assert same(restored, after(3))
    assert same(restored.learn().learn(), after(5))


def test_an_optimizer_that_has_not_stepped_yet(tmp_path):
    path = Learner().save(tmp_path)
    assert find_fault(path) is None
    assert same(Learner(seed=1).load(path).learn(), after(1))


def test_half_precision_moments_keep_their_type(tmp_path):
    def half():
        learner = Learner()
        learner.modules["policy"].bfloat16()
        learner.optimizer = build_optimizer([learner.modules["policy"]], OptimConfig(lr=0.1))
        for parameter in learner.modules["policy"].parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        learner.optimizer.step()
        return learner

    learner = half()
    path = learner.save(tmp_path)
    fresh = half().load(path)
    assert same(learner, fresh)
    assert {value.dtype for value in fresh.everything()} == {torch.bfloat16, torch.float32}


def test_tied_weights_come_back_tied(tmp_path):
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = build_optimizer([model], OptimConfig())
    options = dict(config={}, state={}, keep=1)
    path = save_checkpoint(tmp_path, 1, modules={"policy": model}, optimizer=optimizer, **options)
    other = LlamaForCausalLM(config)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    load_checkpoint(path, modules={"policy": other}, optimizer=build_optimizer([other], OptimConfig()))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------------- which are kept


def test_the_newest_are_kept(tmp_path):
    learner = Learner()
    for _ in range(5):
        learner.learn().save(tmp_path, keep=2)
    assert names(tmp_path) == ["step-000004", "step-000005"]
    learner.learn().save(tmp_path, keep=1)
    assert names(tmp_path) == ["step-000006"]


def test_a_damaged_later_one_does_not_push_out_what_was_just_saved(tmp_path):
    learner = after(1)
    learner.save(tmp_path)
    for step in (7, 9):
        damage(shutil.copytree(tmp_path / "step-000001", tmp_path / f"step-{step:06d}"), "policy.safetensors")
    learner.learn().save(tmp_path, keep=1)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert not (tmp_path / "step-000001").exists()


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    damage(after(2).save(tmp_path), "state.json")
    path = after(2).save(tmp_path)
    assert find_fault(path) is None


def test_more_than_a_million_steps(tmp_path):
    learner = Learner()
    for step in (999_999, 1_000_000, 1_000_001):
        learner.step = step
        learner.save(tmp_path, keep=2)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-1000001"
    assert names(tmp_path) == ["step-1000000", "step-1000001"]


def test_no_checkpoint_at_all(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "step-000003.tmp-77").mkdir()
    (tmp_path / "step-last").mkdir()
    assert newest_checkpoint(tmp_path) is None


# ------------------------------------------------------------------------------------------------------ what is damaged


def damage(path: Path, name: str) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def truncate(path: Path, name: str) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-1])


def remove(path: Path, name: str) -> None:
    (path / name).unlink()


def empty(path: Path, name: str) -> None:
    (path / name).write_bytes(b"")


@pytest.mark.parametrize("harm", [damage, truncate, remove, empty])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_is_told_and_the_older_checkpoint_taken(tmp_path, caplog, harm, name):
    old = after(1).save(tmp_path)
    harm(after(2).save(tmp_path), name)
    assert newest_checkpoint(tmp_path) == old
    reason = "is missing" if harm is remove else "differs from what was written (size or checksum)"
    assert [r.getMessage() for r in caplog.records] == [
        f"skipping checkpoint {tmp_path / 'step-000002'}: {name} {reason}"
    ]
    assert same(Learner(seed=1).load(old), after(1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it cannot be read ([Errno 2] No such file or directory: "),
        (b"", "it cannot be read (Expecting value: "),
        (b'{"schema": 1', "it cannot be read ("),
        (b"\xff\xfe", "it cannot be read ('utf-8' codec"),
        (b"null", "its manifest is not valid"),
        (b"[]", "its manifest is not valid"),
        (b"{}", "its manifest is not valid"),
        (b'{"schema": 1}', "its manifest is not valid"),
        (b'{"schema": 1, "files": []}', "its manifest is not valid"),
        (b'{"schema": 2, "files": {}}', "its schema is 2, expected 1"),
    ],
)
def test_a_bad_manifest(tmp_path, caplog, content, reason):
    old, new = after(1).save(tmp_path), after(2).save(tmp_path)
    if content is None:
        (new / "manifest.json").unlink()
    else:
        (new / "manifest.json").write_bytes(content)
    assert find_fault(new).startswith(reason)
    assert newest_checkpoint(tmp_path) == old
    assert f"skipping checkpoint {new}: {reason}" in caplog.text


def test_no_flipped_bit_of_the_manifest_is_taken_for_other_weights(tmp_path):
    path = after(1).save(tmp_path)
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    places, told = range(0, len(whole), 3), 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 7)
        manifest.write_bytes(changed)
        told += find_fault(path) is not None  # what it does not tell is in what nobody loads by: step, versions
    assert told > 0.7 * len(places)
    assert same(Learner(seed=1).load(path), after(1))


def test_every_checkpoint_damaged(tmp_path, caplog):
    for step in (1, 2):
        damage(after(step).save(tmp_path), "optimizer.safetensors")
    assert newest_checkpoint(tmp_path) is None
    assert caplog.text.count("skipping checkpoint") == 2


# ------------------------------------------------------------------------------------- what happens while it is written


class Killed(BaseException):
    """The process is gone: nothing more of it runs."""


class Accidents:
    """Makes the k-th of all calls that touch the disk go wrong. `dead`: every later one too, as after SIGKILL."""

    def __init__(self, monkeypatch, at: int, error: BaseException, *, dead: bool):
        self.calls, self.at, self.error, self.dead = 0, at, error, dead
        for owner, name in [
            (Path, "mkdir"), (Path, "rename"), (Path, "open"), (Path, "write_text"), (os, "fsync"), (os, "open"),
            (shutil, "rmtree"), (checkpoint, "save_model"), (checkpoint, "save_file"), (checkpoint, "_describe"),
        ]:  # fmt: skip
            monkeypatch.setattr(
                owner, name, self.wrap(getattr(owner, name), writes=name in ("write_text", "save_file"))
            )

    def wrap(self, function, *, writes: bool):
        def call(*args, **kwargs):
            if self.calls == self.at or (self.dead and self.calls > self.at):
                first, self.calls = self.calls == self.at, self.calls + 1
                if writes and first:  # half of it got to the disk
                    target = next(arg for arg in args if isinstance(arg, Path))
                    with builtins.open(target, "wb") as file:
                        file.write(b'{"schema": 1, ')
                raise self.error
            self.calls += 1
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("error", "dead", "keep"),
    [(OSError(28, "No space left on device"), False, 2), (KeyboardInterrupt(), False, 1), (Killed(), True, 1)],
    ids=["disk full", "interrupted", "killed"],
)
def test_an_accident_at_any_point_leaves_the_old_or_the_new_one(tmp_path, error, dead, keep):
    expected = {step: after(step) for step in (1, 2, 3)}
    seen = set()
    for at in range(1000):
        root = tmp_path / str(at)
        expected[1].save(root, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            accidents = Accidents(patch, at, error, dead=dead)
            try:
                expected[2].save(root, keep=keep)
            except type(error):
                pass
            else:
                assert accidents.calls <= at  # no accident was swallowed
                break
        newest = newest_checkpoint(root)
        step = int(newest.name.removeprefix("step-"))
        assert step in (1, 2)
        seen.add(step)
        assert same(Learner(seed=1).load(newest), expected[step])
        whole = {path.name for path in root.iterdir() if find_fault(path) is None and ".tmp-" not in path.name}
        assert whole <= {"step-000001", "step-000002"}
        if not dead:
            assert not any(".tmp-" in name for name in names(root))  # an error cleans up after itself
        expected[3].save(root, keep=keep)  # by the same process, or one of the same number
        assert newest_checkpoint(root).name == "step-000003"
        assert not any(".tmp-" in name for name in names(root))
    assert at > 25
    assert seen == {1, 2}


def test_a_full_disk_under_safetensors_is_an_ordinary_error(tmp_path, monkeypatch):
    def fail(*args):
        raise checkpoint.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match=r"step-000001 could not be written: .*No space left on device"):
        after(1).save(tmp_path)
    assert names(tmp_path) == []


def test_each_file_is_flushed_and_the_manifest_written_last(tmp_path, monkeypatch):
    """A name that is on disk before its content is a checkpoint of zeros after a power cut."""
    events = []
    opened, flush, rename, write = os.open, os.fsync, Path.rename, Path.write_text
    paths = {}

    def note_open(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        paths[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("flush", paths[fd])), flush(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(("rename", to.name)), rename(self, to))[1])
    monkeypatch.setattr(
        Path, "write_text", lambda self, text: (events.append(("write", self.name)), write(self, text))[1]
    )
    root = tmp_path / "checkpoints"
    after(1).save(root)
    assert [event for event in events if event[0] == "write"][-1] == ("write", "manifest.json")
    renamed = events.index(("rename", "step-000001"))
    temporary = f"step-000001.tmp-{os.getpid()}"
    assert {name for kind, name in events[:renamed] if kind == "flush"} == FILES | {"manifest.json", temporary}
    assert events[renamed - 1] == ("flush", temporary)
    assert events[renamed + 1 :] == [("flush", "checkpoints")]
