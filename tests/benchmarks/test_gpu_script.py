"""benchmarks/gpu/quarter_hour.sh: a failing step stops nothing and is named; and its wheels. CI runs the real steps."""

import os
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import wheels
from benchmarks.gpu.short_run import check_losses

ROOT = Path(__file__).parent.parent.parent
# Stands in for Python: pytest fails, the stage rows are killed as by a lack of memory, everything else passes.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "called: $*"
case "$*" in *'-m pytest'*) exit 3 ;; *mlm,contrastive*) kill -9 $$ ;; esac
"""


def script(*arguments, **environment):
    command = ["bash", "benchmarks/gpu/quarter_hour.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake)}
    done = script("--tiny", f"--out={tmp_path}/out", "--commit=abc", **environment)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    verdicts = {line.split()[0]: line.partition(" s  ")[2] for line in summary.splitlines()[1:]}
    names = ["tests", "rows", "peers", "deterministic", "train_mlm", "train_contrastive", "train_finetune"]
    assert list(verdicts) == names and verdicts["tests"] == "FAILED: exit code 3"
    assert verdicts["rows"].startswith("FAILED: killed") and {verdicts[name] for name in names[2:]} == {"passed"}
    assert summary in done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "called: -m benchmarks.gpu --parts=torch_train,encode --seconds=230" in log and "--commit=abc --tiny" in log
    # Only some steps; they pass.
    done = script(f"--out={tmp_path}/out", "--steps=peers,train_mlm", **environment)
    assert done.returncode == 0 and "tests" not in done.stdout.partition("== summary")[0].replace("--steps", "")


def test_a_call_that_is_cut_leaves_no_process(tmp_path):
    fake, pid = tmp_path / "python", tmp_path / "pid"
    fake.write_text(f'#!/usr/bin/env bash\ncase "$*" in *mlm*) echo $$ > {pid}; exec sleep 60 ;; esac\n')
    fake.chmod(0o755)
    command = ["bash", "benchmarks/gpu/quarter_hour.sh", f"--out={tmp_path}/out"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake)}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    while not (pid.exists() and pid.read_text().strip()):
        time.sleep(0.02)
    running.terminate()
    assert "FAILED: SIGTERM" in running.communicate(timeout=30)[0] and running.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "FAILED: SIGTERM" in (tmp_path / "out" / "log.txt").read_text()
    assert (tmp_path / "out" / "summary.txt").read_text().splitlines()[-1].startswith("tests ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=tests,rowz", "there is no step rowz"),
        ("--step=tests", "unknown option"),
        ("--wheels=/no/such", "/no/such"),
    ],
)
def test_a_mistake_is_answered_before_anything_runs(tmp_path, option, message):
    done = script(f"--out={tmp_path}/out", option, PATH="/usr/bin:/bin", PYTHON="false")
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out" / "log.txt").exists()


def write_wheel(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "value = 7\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_wheels_of_missing_packages_only_are_installed(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match=r"there is no wheel in .*make them with"):
        wheels.install_missing(tmp_path, tmp_path / "target")
    write_wheel(tmp_path, "made_up_package")
    write_wheel(tmp_path, "numpy")
    wheels.install_missing(tmp_path, tmp_path / "target")
    assert "made_up_package" in capsys.readouterr().out and not (tmp_path / "target" / "numpy.py").exists()
    monkeypatch.syspath_prepend(tmp_path / "target")
    assert __import__("made_up_package").value == 7
    monkeypatch.setattr(wheels, "LIMIT_BYTES", 100)
    with pytest.raises(SystemExit, match=r"MiB, more than 0; the largest: .*numpy-1\.0"):
        wheels.check_size(tmp_path)


def test_every_wheel_has_a_version_in_the_lock_files(tmp_path):
    versions = wheels.pinned(ROOT)
    assert list(versions) == list(wheels.PACKAGES) and set(wheels.TRAINING) < versions.keys()
    assert f"grain=={versions['grain']} " in (ROOT / "requirements-ci-py312.lock").read_text()
    for lock in wheels.LOCKS:
        (tmp_path / lock).write_text("grain==1.0\n")
    with pytest.raises(SystemExit, match="no version of array-record"):
        wheels.pinned(tmp_path)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([9.0 - 0.1 * step for step in range(16)], None),
        ([9.0] * 16, "the loss does not fall"),
        ([9.0] * 15 + [float("nan")], "the loss does not fall"),
        ([9.0 - 0.1 * step for step in range(15)], "not 1 to 16"),
    ],
)
def test_a_short_run_must_have_every_step_and_a_falling_loss(tmp_path, losses, message):
    lines = [f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines).replace("nan", "NaN"))
    if message is None:
        return check_losses(tmp_path)
    with pytest.raises(SystemExit, match=message):
        check_losses(tmp_path)


@pytest.mark.exhaustive(reason="trains, kills and exports for half a minute; CI does so with benchmarks/gpu/one_gpu.sh")
def test_a_short_run_of_a_stage(tmp_path):
    environment = dict(os.environ, XLA_FLAGS="--xla_backend_optimization_level=0")
    command = ["bash", "benchmarks/gpu/quarter_hour.sh", "--tiny", "--steps=train_contrastive", f"--out={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "resuming from step 6 " in done.stdout
