"""benchmarks/gpu without a GPU: every check and every row runs, and a failure in one does not end the run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def suite(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_does_everything(tmp_path):
    path = tmp_path / "results" / "dry.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--json", str(path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert all(found["checks"].values()) and len(found["checks"]) == 7
    assert len(found["rows"]) == 9
    for name, row in found["rows"].items():
        assert {"ours", "eager"} <= set(row["seconds"]), name
    assert found["failed"] == {} and found["not_run"] == []
    assert found["versions"]["torch"] and found["date"] and "--dry-run" in found["command"]
    *_, last = done.stdout.splitlines()
    assert last.startswith("packed_attention fwd+bwd")


# Stands in for the worker: units "a", "b" (contestants x and y) and "c", of which one fails.
WORKER = """
import json, os, sys, time
journal, units, without = open(sys.argv[1], "a"), json.loads(sys.argv[2]), json.loads(sys.argv[3])
def write(event, **fields):
    print(json.dumps({"event": event, **fields}), file=journal, flush=True)
for unit in units:
    write("begin", unit=unit, contestant=None)
    if unit == "b":
        for contestant in ("x", "y"):
            if contestant in without.get(unit, []):
                continue
            write("begin", unit=unit, contestant=contestant)
            if contestant == "x":
                BAD
    write("done", unit=unit, result={"without": without.get(unit, [])})
"""


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("time.sleep(60)", "took more than 2 s"),
        ("print('segfault or so'); os._exit(9)", "the process ended with 9: segfault or so"),
        ("write('lost', unit=unit, contestant=contestant, reason='spoiled'); sys.exit(3)", "spoiled"),
    ],
    ids=["hangs", "dies", "spoils the device"],
)
def test_a_failing_contestant_is_the_only_one_lost(suite, tmp_path, monkeypatch, bad, reason):
    (tmp_path / "worker.py").write_text(WORKER.replace("BAD", bad))
    monkeypatch.setattr(suite, "HERE", tmp_path)
    findings = suite.Findings()
    suite.work(["a", "b", "c"], findings, time.monotonic() + 60, 2.0, dry_run=False)
    assert findings.lost == {"b": {"x": reason}}
    assert findings.done == {"a": {"without": []}, "b": {"without": ["x"]}, "c": {"without": []}}
    assert findings.failed == {}


def test_a_failing_check_fails_alone(suite, tmp_path, monkeypatch):
    bad = WORKER.replace('if unit == "b":', 'if unit == "b":\n        os._exit(9)').replace("BAD", "pass")
    (tmp_path / "worker.py").write_text(bad)
    monkeypatch.setattr(suite, "HERE", tmp_path)
    findings = suite.Findings()
    suite.work(["a", "b", "c"], findings, time.monotonic() + 60, 2.0, dry_run=False)
    assert findings.failed == {"b": "the process ended with 9"}
    assert set(findings.done) == {"a", "c"}


def test_past_the_deadline_the_rest_is_left(suite, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER.replace("BAD", "time.sleep(60)"))
    monkeypatch.setattr(suite, "HERE", tmp_path)
    findings = suite.Findings()
    begin = time.monotonic()
    suite.work(["a", "b", "c"], findings, begin + 2, 50.0, dry_run=False)
    assert time.monotonic() - begin < 10
    assert set(findings.done) == {"a"} and findings.left(["a", "b", "c"]) == ["b", "c"]


def test_a_worker_that_cannot_start_ends_the_run(suite, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("import sys; sys.exit('no CUDA here')")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    findings = suite.Findings()
    suite.work(["a", "b"], findings, time.monotonic() + 60, 5.0, dry_run=False)
    assert set(findings.failed) == {"a", "b"} and "no CUDA here" in findings.failed["a"]


def test_the_table(suite, capsys):
    """Floors, goals and ratios by hand: 10 ms with a floor of 9, a rival four times slower, one that failed."""
    row = dict(
        seconds={"ours": 0.010, "eager": 0.040},
        floor=0.009,
        goal=0.85,
        goals={"eager": 5.0},
        most_seconds=None,
        launches=1,
    )
    unit = "row: kl_divergence forward"
    findings = suite.Findings(
        done={unit: row}, lost={unit: {"compile": "AssertionError: x", "TRL": "trl is not installed"}}
    )
    suite.show(findings, [unit, "row: gae, whitened"], dry_run=False)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "kl_divergence", "forward", "10.000", "90%", "85%", "yes;", "one", "launch", "(1)", "yes;", "5x", "eager", "NO",
        "4.00x", "failed", "absent",
    ]  # fmt: skip
    assert second.split() == ["gae,", "whitened", "not", "run"]
