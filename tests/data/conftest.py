"""One small tokenizer, trained on real library sources, for the tests that need any."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from data.text.readers import ReaderSettings, ReadLog, read_file
from data.text.sources import python_library_files
from data.tokenizers.sentencepiece import Tokenizer
from data.tokenizers.training import TokenizerSettings, train_tokenizer

# An example that takes long because the machine is busy is no failure.
hypothesis_settings.register_profile("no deadline", deadline=None)
hypothesis_settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    """Some modules of the standard library, about half a megabyte."""
    wanted = {
        f"python-library/{name}.py"
        for name in ("ast", "argparse", "json/decoder", "html/entities", "calendar", "shutil", "tabnanny")
    }
    files = [file for file in python_library_files() if file.name in wanted]
    settings, log = ReaderSettings(max_document_characters=None), ReadLog.new()
    return [document.text for file in files for document in read_file(file, settings, log)]


@pytest.fixture(scope="session")
def tokenizer_dir(library_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer of 1024 pieces that may cross scripts, so that punctuation merges with letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(library_texts, TokenizerSettings(vocab_size=1024, split_by_script=False), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)
