"""The command nomic-jax: its list of commands, names that nearly match, configurations by name, completion, info."""

import subprocess
import sys
from pathlib import Path

import pytest

import convert.to_hf
from launch import __main__ as nomic_jax_command
from launch import completion, config_files, info
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.typed_fields import meanings_of
from tests.commands import run

ROOT = Path(__file__).parent.parent.parent


def end(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["nomic-jax", *arguments])
    with pytest.raises(SystemExit) as end:
        nomic_jax_command.main()
    return end.value.code


def test_help_lists_every_command_and_imports_none(monkeypatch, capsys):
    code = "import sys; from launch.__main__ import main; sys.argv = ['nomic-jax', '--help']\n"
    code += "try: main()\nfinally: print(sorted({'jax', 'numpy', 'absl', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    known = nomic_jax_command.commands()
    assert {"train", "to-hf", "from-hf", "check", "data-order", "embed", "search", "evaluate", "info"} <= set(known)
    assert not {"errors", "engine", "teacher", "glue", "config-files"} & set(known)
    for name, command in known.items():
        assert len(command.summary) > 10 and "python -m" not in command.summary, name
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {name} ")]
        assert len(line) <= 80
    assert end(monkeypatch) == 2 and "usage: nomic-jax" in capsys.readouterr().out


def test_a_new_module_is_a_command(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    main = 'if __name__ == "__main__":\n    '
    (tmp_path / "launch" / "new_one.py").write_text(f'"""Does it: nomic-jax new-one X"""\n{main}run(main)\n')
    (tmp_path / "launch" / "part.py").write_text(f'"""A part."""\n{main}refer("part", __doc__, "launch.new_one")\n')
    (tmp_path / "launch" / "shared.py").write_text('"""No command."""\n')
    monkeypatch.setattr(nomic_jax_command, "FOLDER", tmp_path / "launch")
    ((name, command),) = nomic_jax_command.commands().items()
    assert (name, command.module, command.summary) == ("new-one", "launch.new_one", "Does it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["data_ordr"], "did you mean data-order?"),
        (["zzz"], "see nomic-jax --help"),
        (
            ["lineage", "x", "--recorded_path"],
            "unrecognized arguments: --recorded_path; did you mean --recorded_paths?",
        ),
        (["lineage"], "the following arguments are required: CHECKPOINT; see --help"),
    ],
)
def test_a_name_that_nearly_matches(arguments, message, monkeypatch, capsys):
    assert end(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.strip().endswith(message)


def test_commands_run_as_modules():
    """nomic-jax X does what python -m launch.X does, also what reads the flags of the main module."""
    done = run("launch", "search", "--help")
    assert done.returncode == 0 and "--query_prompt" in done.stdout and "Searches a corpus" in done.stdout
    done = run("launch", "search", "--modle=x")
    assert done.returncode == 2 and "Unknown command line flag 'modle'. Did you mean: model" in done.stderr
    done = run("launch", "to_hf", "--help")
    assert done.returncode == 0 and "--mlm_head" in done.stdout


def test_help_of_train_explains_every_field():
    configs = [config_files.get_config(name).to_dict() for name in config_files.shipped()]
    fields = {path for config in configs for path in config_files._flat(config)}
    meanings = meanings_of(TrainConfig)
    assert len(fields) > 60 and not [path for path in fields if not meanings[path]]
    assert meanings["data.query_length"] == "maximum number of tokens of a query and of a document."
    assert meanings["data.cache_dir"] == "directory of tokenised text, reused by later runs."
    done = run("launch.train", "--help")
    assert done.returncode == 0 and "--config: mlm, contrastive" in done.stdout
    for path in fields:
        assert f"--config.{path}: " in done.stdout
    shown = " ".join(done.stdout.split())
    assert "(default: contrastive 16384; distillation 1024; finetune 256; glue 16; mlm 4096)" in shown


def test_a_configuration_by_name_or_file(tmp_path, monkeypatch):
    assert config_files.get_config("mlm").steps == 100_000
    assert config_files.get_config("mlm:debug").steps == 20
    assert config_files.get_config(f"{ROOT}/configs/mlm.py:debug") == config_files.get_config("mlm:debug")
    monkeypatch.chdir(tmp_path)
    for file in ("mine.py", r"C:\mine.py"):  # a drive of Windows is no variant
        Path(file).write_text("def get_config(variant='none'): return variant")
        assert config_files.get_config(file) == "none" and config_files.get_config(f"{file}:a:b") == "a:b"
    with pytest.raises(ValueError, match="there is no configuration mlmm; did you mean --config=mlm:debug"):
        config_files.get_config("mlmm:debug")
    with pytest.raises(ValueError, match=r"no configuration configs/mlm.py; did you mean --config=mlm\?"):
        config_files.get_config("configs/mlm.py")  # as in a checkout, elsewhere
    with pytest.raises(ValueError, match="write one of :paper, :debug"):
        config_files.get_config("mlm:debugg")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nomic-jax t", ["to-hf", "train"]),
        ("nomic-jax mine --in", ["--input="]),  # of the module that mine shares with filter
        ("nomic-jax train --config=mlm:d", ["--config=mlm:debug"]),
        ("nomic-jax train --config glue:", ["glue:paper", "glue:debug"]),
        ("nomic-jax to-hf --ml", ["--mlm_head"]),
        ("nomic-jax embed --overw", ["--overwrite"]),
        ("nomic-jax to-hf runs/", []),
        ("nomic-jax nothing --", []),
    ],
)
def test_completion(line, words):
    assert completion.next_words(line) == words


def test_flags_for_completion_are_those_of_the_parser(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["to_hf", "--help"])
    with pytest.raises(SystemExit):
        convert.to_hf.main()
    shown = {word.strip("[],") for word in capsys.readouterr().out.split() if word.startswith(("--", "[--"))}
    flags = {flag.rstrip("=") for flag in completion.flags_of(ROOT / "convert" / "to_hf.py")}
    assert flags == {flag for flag in shown if flag.replace("_", "").lstrip("-").isalpha()}


def test_bash_completes(tmp_path):
    """Bash splits a word at = and :, and replaces only what follows them."""
    script = f'nomic-jax() {{ (cd {ROOT} && {sys.executable} -m launch "$@"); }}\n' + completion.SCRIPTS["bash"]
    for line, expected in (("nomic-jax sea", "search"), ("nomic-jax train --config=mlm:deb", "debug")):
        asked = f'\ncompopt() {{ :; }}\nCOMP_LINE="{line}" COMP_POINT={len(line)}\n_nomic_jax; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script + asked], capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_info_names_versions_and_no_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sys, "argv", ["info"])
    info.main()
    shown = capsys.readouterr().out
    assert "jax 0." in shown and "cpu (cpu)" in shown and "compiled programs: " in shown and "secret" not in shown
