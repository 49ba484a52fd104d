"""Work folders of `launch.embed` that hold planted links or other files."""

import os

import numpy as np
import pytest

from nomic_jax.files.reading import FileRefused
from nomic_jax.inference.embed_files import _assemble
from nomic_jax.inference.vectors.work import Work


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    yield tmp_path / "outside"
    assert os.listdir(tmp_path / "outside") == ["kept"]
    assert (tmp_path / "outside" / "kept").read_text() == "kept"


@pytest.mark.parametrize("name", ["lock", "plan.json", "assembled.npy", "part-00000.npy", "thesis.npy"])
def test_shards_of_embed_are_files_of_its_own(tmp_path, outside, name):
    parts = tmp_path / ".out.npy.parts"
    parts.mkdir()
    (parts / name).symlink_to(outside / "kept")
    message = f"parts: holds {name}, which the work of this command does not write"
    with pytest.raises(FileRefused, match=message), Work(tmp_path / "out.npy").opened():
        pass
    assert os.listdir(parts) == [name]
    (parts / name).unlink()
    parts.rmdir()
    parts.symlink_to(outside)
    with pytest.raises(FileRefused, match="parts: is a link"), Work(tmp_path / "out.npy").opened():
        pass


def test_the_output_of_embed_is_assembled_in_a_file_of_its_own(tmp_path, outside):
    work = Work(tmp_path / "out.npy")
    with work.opened():
        parts = tmp_path / ".out.npy.parts"
        np.save(parts / "part-00000.npy", np.ones((2, 3), np.float32))
        (parts / "assembled.npy").symlink_to(outside / "kept")
        _assemble(["part-00000.npy"], work, tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.ones((2, 3), np.float32))
