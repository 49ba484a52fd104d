"""Work folders of token caches that hold planted links."""

import os

import pytest

from nomic_jax.data.mixture import Source
from nomic_jax.data.tokens.pretokenize import pretokenize
from nomic_jax.files.reading import FileRefused


def test_token_caches_are_not_written_through_links(tmp_path, tokenizer):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n')
    source = Source("a", str(tmp_path / "a.jsonl"), "text", ("text",))
    cache = tmp_path / "cache"
    pretokenize(source, tokenizer, cache, progress=False)
    (lock,) = (name for name in os.listdir(cache) if name.endswith(".lock"))
    (tmp_path / "a.jsonl").write_text('{"text": "a b c d"}\n')
    (cache / lock).unlink()
    (cache / lock).symlink_to(outside / "kept")
    with pytest.raises(FileRefused, match="lock: is a link"):
        pretokenize(source, tokenizer, cache, progress=False)
    (cache / lock).unlink()
    (cache / lock.replace(".lock", ".pieces")).symlink_to(outside)
    with pytest.raises(FileRefused, match="pieces: is a link"):
        pretokenize(source, tokenizer, cache, progress=False)
    assert os.listdir(outside) == ["kept"] and (outside / "kept").read_text() == "kept"
