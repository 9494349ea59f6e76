"""The command line: what it explains, how settings come together, and how it ends."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_core import cli
from rlhf_core.cli import JOBS, field_sentences, main, options_of
from rlhf_core.config import kinds_of
from rlhf_core.demo.language import build_model
from rlhf_core.training.run import Interrupted

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
RUN = ["--model", "m", "--data", "d.jsonl", "--output", "o"]
every_job = pytest.mark.parametrize("job", JOBS)


def config_of(job: str) -> type:
    module, kind, _, _ = JOBS[job]
    return getattr(importlib.import_module(module), kind)


@pytest.fixture
def configs(monkeypatch):
    """The configs that jobs were called with, instead of their work."""
    seen = []
    for module, _, function, _ in JOBS.values():
        monkeypatch.setattr(f"{module}.{function}", seen.append)
    return seen


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    build_model(folder, seed=0)
    return folder


def write_rows(path: Path, count: int = 8) -> Path:
    rows = [{"prompt": "vesa lumira tesu sadira", "completion": "kapi penira lari kovira ."}] * count
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------- what it explains


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_names_every_job(capsys, arguments):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for name, (_, _, _, summary) in JOBS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", said, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rlhf-core \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_overview_is_given_without_the_heavy_imports():
    code = "import sys; from rlhf_core.cli import main; main(['--help']); main(['nojob'])\n"
    code += "print([name for name in ('torch', 'transformers', 'yaml', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def settings(kind: type):
    """Yield (class, field) of every setting, groups opened."""
    for name, inner in kinds_of(kind).items():
        yield kind, name
        if inner.is_group:
            yield from settings(inner.type)


def shown(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


@every_job
def test_help_all_explains_every_setting_in_a_sentence(capsys, job):
    said, kind = shown(capsys, job, "--help-all"), config_of(job)
    dense = "".join(said.split())
    for cls, name in settings(kind):
        sentence = field_sentences(cls).get(name, "")
        assert re.match(r"\S.*\.$", sentence), f"{cls.__name__}.{name} is not explained: {sentence!r}"
        assert "".join(sentence.rstrip(".").split()) in dense
    for option in options_of(kind):
        assert re.search(rf"(^  |, ){re.escape(option.names[-1])}\b", said, re.MULTILINE)
    assert "==SUPPRESS==" not in said
    assert "MISSING" not in said


@every_job
def test_help_explains_the_common_settings(capsys, job):
    said, kind = shown(capsys, job, "--help"), config_of(job)
    options = re.findall(r"^  --([a-z.-]+)", said, re.MULTILINE)
    names = [option.path.removesuffix(".path") for option in options_of(kind)]
    common = getattr(kind, "common", [name for name in kinds_of(kind) if name in names])
    assert [option.replace("-", "_") for option in options] == ["config", *common]
    assert len(common) <= 20 and {*common} <= {*names}
    assert all(name in common for name in ("model", "data", "output") if name in names)
    last = f"rlhf {job} --help-all explains all {len(names)} settings."
    assert said.splitlines()[-1] == last or len(common) == len(names)
    assert shown(capsys, job, "-h") == said


def test_help_gives_the_bounds_and_the_defaults_of_the_job(capsys):
    def note(job: str, option: str) -> str:
        said = " ".join(shown(capsys, job, "--help-all").split())
        return re.search(rf"{option} .*?\(([^()]*(?:default: .*?|required))\)", said)[1]

    assert note("sft", "--optim.eps") == "more than 0; default: 1e-08"
    assert note("ppo", "--optim.eps") == "more than 0; default: 1e-05"
    assert note("ppo", "--optim.schedule") == "default: linear"
    assert note("sft", "--optim.betas") == "0 <= betas < 1; default: 0.9,0.999"
    assert note("sft", "--model") == "required"
    assert note("sft", "--eval-data") == "default: none"
    assert note("sft", "--no-resume") == "default: off"
    assert note("ppo", "--reward-model") == "default: none"
    assert note("ppo", "--kl.control") == "default: adaptive"


# ------------------------------------------------------------------------------------------- how settings come together


def test_hyphens_and_underscores_are_the_same(configs):
    for style in (
        "--batch-size 4 --data.skip-bad-rows 2 --optim.max-grad-norm none --eval-data e_e.jsonl",
        "--batch_size 4 --data.skip_bad_rows 2 --optim.max_grad_norm none --eval_data.path e_e.jsonl",
        "--batch-size=4 --data.skip_bad-rows=2 --optim.max_grad_norm=none --eval_data=e_e.jsonl",
    ):
        assert main(["sft", *RUN, *style.split()]) == 0
        config = configs.pop()
        assert (config.batch_size, config.data.skip_bad_rows, config.optim.max_grad_norm) == (4, 2, None)
        assert config.eval_data.path == "e_e.jsonl"


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path, configs):
    file = tmp_path / "sft.yaml"
    file.write_text("model: m\ndata: {path: d.jsonl, limit: 7}\noutput: o\nbatch_size: 4\noptim: {lr: 5e-6}\n")
    assert main(["sft", "--config", str(file), "--batch-size", "2", "--optim.weight-decay", "0.1", "--resume"]) == 0
    (config,) = configs
    assert (config.batch_size, config.data.limit, config.resume) == (2, 7, True)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.eps) == (5e-6, 0.1, 1e-8)


def test_a_path_alone_in_the_file_takes_options_of_its_group(tmp_path, configs):
    file = tmp_path / "dpo.yaml"
    file.write_text("model: m\ndata: pairs.jsonl\noutput: o\n")
    assert main(["dpo", "--config", str(file), "--data.limit", "3", "--model.dtype", "bfloat16"]) == 0
    (config,) = configs
    assert (config.data.path, config.data.limit) == ("pairs.jsonl", 3)
    assert (config.model.path, config.model.dtype) == ("m", "bfloat16")


def test_what_a_file_gave_can_be_switched_off(tmp_path, configs):
    file = tmp_path / "dpo.yaml"
    file.write_text("model: m\ndata: d\noutput: o\neval_data: {path: e, limit: 3}\nreference: r\nmax_steps: 5")
    none = ["--eval-data", "none", "--reference", "none", "--max-steps", "none", "--optim.max-grad-norm", "none"]
    assert main(["dpo", "--config", str(file), *none]) == 0
    (config,) = configs
    assert (config.eval_data, config.reference.path, config.max_steps, config.optim.max_grad_norm) == (None,) * 4


def test_a_later_file_wins(tmp_path, configs):
    for name, text in {"a": "model: m\ndata: d\noutput: o\noptim: {lr: 1, eps: 2}", "b": "optim: {lr: 3}"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert main(["sft", "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]) == 0
    assert (configs[0].optim.lr, configs[0].optim.eps) == (3, 2)


def test_one_option_of_a_group_keeps_the_rest_of_the_jobs_own(configs):
    assert main(["ppo", *RUN, "--reward-function", "module:function", "--optim.lr", "1e-4"]) == 0
    (config,) = configs
    assert (config.optim.lr, config.optim.schedule, config.optim.eps) == (1e-4, "linear", 1e-5)
    assert config.reward_model is None


@pytest.mark.parametrize(
    "weights", [["--reward-weights", "-1,2"], ["--reward-weights=-1,2"], ["--reward_weights", "-1,2"]]
)
def test_lists_may_begin_with_a_minus(configs, weights):
    sources = ["--reward-function", "module:function,module:other", *weights, "--optim.eps", ".1"]
    assert main(["ppo", *RUN, *sources]) == 0
    assert configs[0].reward_weights == (-1.0, 2.0)
    assert configs[0].reward_function == ("module:function", "module:other")
    assert configs[0].optim.eps == 0.1


def test_a_comma_inside_a_part_of_a_list(configs):
    assert main(["ppo", *RUN, "--checker", r"regex:a{2\,3},numeric"]) == 0
    assert configs[0].checker == ("regex:a{2,3}", "numeric")


def test_options_of_a_loss(tmp_path, configs):
    file = tmp_path / "dpo.yaml"
    file.write_text("loss: [simpo, r_dpo]\nloss_options: {gamma: 0.5, length_coef: 1e-2}")
    assert main(["dpo", *RUN, "--config", str(file)]) == 0
    assert main(["dpo", *RUN, "--loss", "simpo,r_dpo", "--loss-options", "gamma:0.5,length_coef:1e-2"]) == 0
    assert configs[0] == configs[1]
    assert configs[0].loss_options == ("gamma:0.5", "length_coef:1e-2")


def test_switches(configs):
    assert main(["sft", *RUN, "--no-progress", "--model.gradient-checkpointing", "--no-resume"]) == 0
    (config,) = configs
    assert (config.progress, config.model.gradient_checkpointing, config.resume) == (False, True, False)


# ---------------------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sftt"], "rlhf: no job named 'sftt'; did you mean sft?"),
        (["sft", *RUN, "--batchsiz", "4"], "rlhf sft: --batchsiz: no setting of that name; did you mean --batch-size?"),
        (["sft", *RUN, "--batchsiz=4"], "rlhf sft: --batchsiz: no setting of that name; did you mean --batch-size?"),
        (["sft", *RUN, "--lr", "1"], "rlhf sft: --lr: no setting of that name; did you mean --optim.lr?"),
        (["sft", *RUN, "--batch", "4"], "rlhf sft: --batch: no setting of that name"),  # no silent abbreviations
        (["sft", *RUN, "--beta", "1"], "rlhf sft: --beta: no setting of that name; did you mean --data?"),
        (["sft", *RUN, "fast"], "rlhf sft: 'fast': expected an option that starts with --"),
        (["sft", *RUN, "--batch-size", "x"], "rlhf sft: batch_size='x': expected a whole number"),
        (["sft", *RUN, "--optim.schedule", "cosin"], "rlhf sft: optim.schedule='cosin': expected one of cosine,"),
        (["sft", *RUN[2:]], "rlhf sft: model is missing"),
        (["sft", *RUN[2:], "--model.dtype", "float32"], "rlhf sft: model.path is missing"),
        (["ppo", *RUN], "rlhf ppo: reward_model, reward_function, checker: expected at least one of them"),
        (["dpo", *RUN, "--beta", "-1"], "rlhf dpo: beta=-1.0: expected more than 0"),
        (["ppo", *RUN, "--kl-coef", "1"], "rlhf ppo: --kl-coef: renamed to --kl.coef\n"),
        (["ppo", *RUN, "--value=head"], "rlhf ppo: --value: renamed to --value.model\n"),
        (["ppo", *RUN, "--no-value_detach"], "rlhf ppo: --no-value-detach: renamed to --value.detach\n"),
        (["grpo", *RUN, "--mask-truncated"], "rlhf grpo: --mask-truncated: renamed to --score.missing-eos=mask\n"),
        (["grpo", *RUN, "--clip-high", "1"], "rlhf grpo: --clip-high: renamed to --loss-options=clip_high:NUMBER\n"),
        (
            ["rloo", *RUN, "--missing-eos-penalty", "1"],
            "rlhf rloo: --missing-eos-penalty: renamed to --score.missing-eos-penalty, "
            "with --score.missing-eos=subtract or replace\n",
        ),
        (["sft", *RUN, "--kl-coef", "1"], "rlhf sft: --kl-coef: no setting of that name"),  # it has no such group
        (["sft", "--config", "nowhere.yaml"], "rlhf sft: config='nowhere.yaml': No such file or directory"),
    ],
)  # fmt: skip
def test_a_wrong_command_ends_with_2_and_says_what_is_wrong(capsys, configs, arguments, message):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message)
    assert said.out == ""
    assert configs == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "batchsize: no setting of that name; did you mean batch_size?"),
        ("optim: {lrr: 4}", "optim.lrr: no setting of that name; did you mean lr?"),
        ("1: 2", "1: no setting of that name"),
        ("- a\n- b", "expected settings, one `name: value` per line"),
        ("", "expected settings, one `name: value` per line"),
        ("a: [", "is not YAML: "),
        ("batch_size: null", "batch_size=None: expected a whole number"),
        ("kl_coef: 1", "kl_coef: no setting of that name"),
    ],
)
def test_a_wrong_file_ends_with_2(tmp_path, capsys, configs, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["sft", *RUN, "--config", str(tmp_path / "wrong.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert configs == []


def test_an_option_without_its_value_ends_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["sft", *RUN, "--batch-size"])
    assert end.value.code == 2
    assert "--batch-size: expected one argument" in capsys.readouterr().err


def test_bad_data_ends_with_1_and_says_where(tmp_path, capsys, model):
    data = write_rows(tmp_path / "rows.jsonl", count=3)
    data.write_text(data.read_text().replace("completion", "completed", 2).replace("completed", "completion", 1))
    assert main(["sft", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rlhf sft: rows.jsonl:2: ")
    assert "'completion' is missing" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_model_ends_with_1(tmp_path, capsys):
    assert main(["sft", "--model", str(tmp_path / "none"), "--data", "d", "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == f"rlhf sft: no model folder at {tmp_path / 'none'}\n"


def test_a_used_folder_ends_with_2(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["sft", "--model", "m", "--data", "d", "--output", str(tmp_path)]) == 2
    assert "the folder is not empty. --resume continues its run, --overwrite starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ImportError("plotting needs matplotlib: pip install ..."), 1, "rlhf sft: plotting needs matplotlib: pip "),
        (OSError(28, "No space left on device"), 1, "rlhf sft: [Errno 28] No space left on device"),
        (FloatingPointError("sft: not finite"), 1, "rlhf sft: sft: not finite"),
        (KeyboardInterrupt(), 130, "rlhf sft: stopped; the step in progress was not kept"),
        (Interrupted("sft: stopped after step 3 of 9. Kept x"), 130, "sft: stopped after step 3 of 9. Kept x"),
    ],
)  # fmt: skip
def test_what_can_happen_is_said_in_a_line(monkeypatch, capsys, error, status, message):
    def fail(config):
        raise error

    monkeypatch.setattr("rlhf_core.trainers.sft.train", fail)
    assert main(["sft", *RUN]) == status
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_a_job_that_cannot_be_imported_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setitem(cli.JOBS, "sft", ("rlhf_core.no_such_module", "SFTConfig", "train", "..."))
    assert main(["sft", *RUN]) == 1
    assert capsys.readouterr().err == "rlhf sft: No module named 'rlhf_core.no_such_module'\n"


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fail(config):
        raise TypeError("a bug")

    monkeypatch.setattr("rlhf_core.trainers.sft.train", fail)
    with pytest.raises(TypeError):
        main(["sft", *RUN])


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    with pytest.raises(OSError, match="no model folder"):
        main(["sft", "--model", "./none", "--data", "d", "--output", "o"])


# ---------------------------------------------------------------------------------------------------- as a user sees it


def rlhf(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "rlhf_core", *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )


def test_a_run_from_a_shell_and_an_interruption_of_it(tmp_path, model):
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    command = ["sft", "--model", model, "--data", data, "--output", output, "--batch-size", 8, "--epochs", 120]
    process = rlhf(*command)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    step = int(re.search(r"sft: stopped after step (\d+) of 120\.", said)[1])
    kept = output / "checkpoints" / f"step-{step:06d}"
    assert f"Kept {kept}; the same command with --resume goes on from there." in said
    assert (kept / "manifest.json").exists()
    assert not (output / "model.safetensors").exists()

    assert main([*map(str, command), "--resume", "--no-progress"]) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 121))
    assert (output / "model.safetensors").exists()


def test_the_last_lines_of_a_run(tmp_path, capfd, model):
    data = write_rows(tmp_path / "rows.jsonl")
    command = ["sft", "--model", model, "--data", data, "--eval-data", data, "--output", tmp_path / "run"]
    assert main([*map(str, command), "--batch-size", "4"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"sft: 2 steps in \d+ s; eval_nll [\d.]+", said[-2])
    assert said[-1] == f"sft: the model is in {tmp_path / 'run'}"
    assert any(re.search(r"sft: 100%.*2/2.*nll=", line) for line in said)
