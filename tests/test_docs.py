"""Commands in README.md and docs/ name modules, flags, fields and variants that exist; links lead to something."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import commands as all_commands
from nomic_jax.fitting.named_configs import get_config
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.typed_fields import paths_of

COMMANDS = all_commands()
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Of absl and ml_collections.
COMMON = {"help", "helpfull", "config"}


def commands(text):
    """The commands of a page's bash blocks, as lists of words, and its code spans that are whole commands."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`(nomic-jax [a-z][^`\n]*)`", text)]:
        words = shlex.split(line, comments=True)
        assert words[:2] != ["python", "-m"] or words[2].partition(".")[0] not in ("launch", "convert"), line
        if words[:1] == ["nomic-jax"]:
            yield words


def flags_of(file, seen=()):
    """The flags that a command defines, and those of the modules of launch that it imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", "")
            if name.startswith("DEFINE_"):
                found |= {node.args[0].value, f"no{node.args[0].value}"}
            elif name == "add_argument":
                found.add(str(node.args[0].value).removeprefix("--"))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "launch"):
            for name in ((node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)):
                other = ROOT / "launch" / f"{name}.py"
                if other.exists() and other not in (*seen, file):
                    found |= flags_of(other, (*seen, file))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_exist(page):
    fields = {"config." + path for path in paths_of(TrainConfig)}
    for words in commands(page.read_text(encoding="utf-8")):
        if words[1].startswith("--"):
            continue
        assert words[1] in COMMANDS, words
        known = flags_of(COMMANDS[words[1]].file) | COMMON
        for word in words[2:]:
            if not word.startswith("--"):
                continue
            name, _, value = word.removeprefix("--").partition("=")
            assert name in known or name in fields, f"{' '.join(words)}: there is no {name}"
            if name == "config":
                get_config(value)  # raises ValueError if there is none


def test_wrong_commands_are_found():
    known = flags_of(ROOT / "launch" / "filter.py")
    assert {"k", "model", "traceback", "noprefixes"} <= known and "nn" not in known
    assert "evaluation" in flags_of(ROOT / "convert" / "to_hf.py")
    assert list(commands("```bash\nnomic-jax x --a \\\n  --b=1  # note\n```\n`nomic-jax y z`")) == [
        ["nomic-jax", "x", "--a", "--b=1"],
        ["nomic-jax", "y", "z"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page}: {target}"
        if anchor and linked.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}
            assert anchor in anchors, f"{page}: {target}"


@pytest.mark.exhaustive(reason="every command of the tutorial, on 300 of its pairs: minutes on 2 cores")
def test_the_tutorial_runs(tmp_path, minilm):
    """In order and as written, except for sizes, the download, the server and what is no command of this project."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    files = re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["make_pairs.py", "faq.yaml"]
    for name, content in files:
        (tmp_path / name).write_text(content, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "make_pairs.py"], cwd=tmp_path, env=environment, check=True)
    pairs = (tmp_path / "faq.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert 1500 < len(pairs) < 2500
    (tmp_path / "faq.jsonl").write_text("".join(pairs[:300]), encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(minilm, tmp_path / "base")
    sizes = {"queries": 20, "documents": 40, "config.batch_size": 16, "config.evaluation.every": 2}
    sizes |= {"config.data.query_length": 16, "config.data.document_length": 32}
    outputs = []
    for _, name, *arguments in commands(text):
        flags = [word.removeprefix("--").partition("=")[0] for word in arguments]
        small = [f"--{flag}={sizes[flag]}" if flag in sizes else word for word, flag in zip(arguments, flags)]
        steps = ["--config.steps=4"] if name == "train" else []
        command = [sys.executable, "-m", "launch", name, *small, *steps]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        outputs.append(done.stdout)
    assert len(outputs) == 9 and "largest difference" in outputs[-1]
    card = (tmp_path / "my-embedder" / "README.md").read_text(encoding="utf-8")
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card and "type: ndcg@10" in card
    assert (tmp_path / "faq" / "report.html").stat().st_size > 10_000
