"""How commands end: --help, unknown fields of a configuration, and errors of the commands in convert/."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest

import convert.check
import convert.from_hf
import convert.to_hf
from launch import errors
from nomic_jax import Embedder
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.typed_fields import paths_of
from tests.commands import run

TINY = EmbeddingConfig(EncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("errors") / "model"
    write_checkpoint(
        directory,
        Checkpoint(TINY, {"encoder": init_encoder(jax.random.key(0), TINY.encoder)}, tokenizer, max_length=32),
    )
    return directory


def end(monkeypatch, module, *arguments):
    """Runs the main function of a command and returns its exit code; 0 if it returns."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.parametrize("module", ["launch.mine", "launch.glue"])
def test_help_is_no_error(module):
    done = run(module, "--help")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3


def test_a_part_of_a_command_names_the_command():
    done = run("launch.glue")
    assert done.returncode == 2 and "see nomic-jax evaluate --help" in done.stdout


def test_every_module_of_launch_is_a_command_or_says_whose_part_it_is():
    for file in Path(errors.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert file.stem in ("__init__", "config_files", "errors") or 'if __name__ == "__main__":' in text, file


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("max_seq_length", "data.seq_len"),
        ("batchsize", "batch_size"),
        ("lrr", "optim.lr"),
    ],
)
def test_a_field_of_another_library_names_ours(name, meant, capsys):
    with pytest.raises(SystemExit) as end:
        errors._exit(AttributeError(name))
    assert end.value.code == 2
    assert f"there is no field {name!r} there; did you mean --config.{meant}?" in capsys.readouterr().err


def test_what_other_libraries_call_a_field_is_a_field_here():
    paths = paths_of(TrainConfig)
    assert {"optim.lr", "data.seq_len", "data.num_labels", "evaluation.every"} <= set(paths)
    groups = {path.partition(".")[0] for path in paths}
    assert set(errors._SYNONYMS.values()) <= {*paths, *groups}
    with pytest.raises(SystemExit):
        errors._exit(AttributeError("zzz"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("check", ("missing", "missing")), ("from_hf", ("missing", "out")), ("to_hf", ("missing", "out"))],
)
def test_conversions_end_like_other_commands(name, arguments, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"convert.{name}")
    assert end(monkeypatch, module, *(tmp_path / argument for argument in arguments)) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_check_compares_at_one_length(model, tmp_path, monkeypatch, capsys):
    assert end(monkeypatch, convert.to_hf, model, tmp_path / "short", "--max_length=16") == 0
    assert end(monkeypatch, convert.check, model, tmp_path / "short") == 0
    assert "tokens kept of a text: 32 and 16 by the checkpoints' settings; compared at 16" in capsys.readouterr().out

    class Theirs:
        """Takes the place of SentenceTransformer: importing torch takes seconds, and test_commands.py does."""

        def __init__(self, directory, device):
            self.embedder = Embedder.from_pretrained(directory)

        def __setattr__(self, name, value):
            if name == "max_seq_length":
                assert value == 8
                self.embedder.max_seq_length = value
            super().__setattr__(name, value)

        def encode(self, texts, **options):
            return self.embedder.encode(texts, **options)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Theirs))
    assert end(monkeypatch, convert.check, model, model, "--torch", "--max_length=8") == 0
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert end(monkeypatch, convert.check, model, model, "--torch") == 2
    assert "error: --torch needs sentence_transformers, which is not installed: pip install" in capsys.readouterr().err


def test_an_adapter_without_its_base_is_named(model, tmp_path, monkeypatch, capsys):
    with_adapter, alone = shutil.copytree(model, tmp_path / "with"), tmp_path / "alone"
    alone.mkdir()
    for directory in (with_adapter, alone):
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        assert end(monkeypatch, convert.to_hf, directory, tmp_path / "out") == 2
        assert "adapter_config.json: base_model_name_or_path is None; expected the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_of_the_hub_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert end(monkeypatch, convert.to_hf, "org/some-name_v1.5", tmp_path / "out") == 2
    assert "org/some-name_v1.5 is not a directory and could not be fetched from the hub" in capsys.readouterr().err
    assert end(monkeypatch, convert.to_hf, tmp_path / "org" / "name", tmp_path / "out") == 2
    assert "neither the working directory of a run, nor a checkpoint in it" in capsys.readouterr().err


def test_reports_of_one_name_all_stay_in_the_card(model, tmp_path, monkeypatch):
    names = ("first/model.json", "second/model.json", "other.json")
    for score, name in enumerate(names, 1):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = {"tasks": {"toy": {"ndcg@10": score / 8}}, "average": {"ndcg@10": score / 8}}
        (tmp_path / name).write_text(json.dumps(content))
    given = [f"--evaluation={tmp_path / name}" for name in (*names, names[0])]
    assert end(monkeypatch, convert.to_hf, model, tmp_path / "out", *given) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for text in ("first/model", "second/model", "other", "0.1250", "0.2500", "0.3750"):
        assert text in card
    assert list(convert.to_hf.names_of(["a/x.json"])) == ["x"]
