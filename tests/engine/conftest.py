"""The store and backend of most tests here. Worker processes import the functions they run by module name: this folder's
program must have one."""

import sys
from pathlib import Path

import pytest

from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.store.local import LocalStore

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def backend() -> LocalBackend:
    return LocalBackend(cpus=2, gpus=0, in_process=True)
