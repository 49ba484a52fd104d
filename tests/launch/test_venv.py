"""launch/venv.sh: the tests bring no torch of gigabytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("packages", "environment", "takes"),
    [
        (["torch", "filelock", "sympy"], {}, True),
        (["torch", "filelock", "nvidia-cudnn-cu13", "triton"], {}, False),
        (["torch", "cuda-bindings"], {}, False),
        (["torch", "nvidia-cudnn-cu13"], {"NOMIC_JAX_TORCH": "1"}, True),
        (None, {}, False),  # no index, or no such version
    ],
)
def test_torch_without_cuda(packages, environment, takes, tmp_path):
    """The interpreter is a stub: it has no torch, and its pip would install ``packages``."""
    report = {"install": [{"metadata": {"name": name}} for name in packages or ()]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
        case "$*" in
        *find_spec*) exit 1 ;;
        *dry-run*) {"exit 1" if packages is None else f"cat {tmp_path}/report.json"} ;;
        *) exec {sys.executable} "$@" ;;
        esac"""
    )
    python.chmod(0o755)
    script = f'source launch/venv.sh; _has_small_torch {python} "torch==2.13.0"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env={"PATH": "/usr/bin:/bin"} | environment)
    assert (done.returncode == 0) == takes
