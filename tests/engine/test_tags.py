"""Tags: a name moves, is forgotten, and says what is wrong; in both stores alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.refusal import Refusal
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.runner import run
from pipelines.engine.step import Artifact, Step
from pipelines.engine.store import tags
from pipelines.engine.store.base import Store
from pipelines.engine.store.open import open_store


def letters(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
    (out_dir / "letters.txt").write_text(settings["letters"])
    return {}


def made(store: Store, text: str) -> Artifact:
    step = Step(name="letters", kind="corpus", run=letters, version=1, settings={"letters": text})
    [report] = run([step], store=store, backend=LocalBackend(cpus=1, gpus=0, in_process=True))
    artifact = store.find("letters", report.digest)
    assert artifact is not None
    return artifact


def course(store: Store) -> None:
    one, other = made(store, "one"), made(store, "other")
    tags.write(store, "best", one)
    assert tags.find(store, "best").digest == one.digest
    tags.write(store, "best", other)
    tags.write(store, "first-try", one)
    assert {tag.name: tag.digest for tag in tags.listed(store)} == {"best": other.digest, "first-try": one.digest}
    tags.remove(store, "best")
    assert [tag.name for tag in tags.listed(store)] == ["first-try"]
    with pytest.raises(Refusal, match=r"tag:best: no such tag in the store .*; there are first-try"):
        tags.find(store, "best")
    tags.write(store, "best", one)  # a name that was forgotten is free
    assert tags.find(store, "best").digest == one.digest
    with pytest.raises(Refusal, match=r"tag = '\.\./x': a name has letters"):
        tags.write(store, "../x", one)


def test_a_name_stands_for_one_artifact_until_it_is_moved_or_forgotten(tmp_path: Path) -> None:
    course(open_store(tmp_path))


def test_tags_in_a_bucket_are_as_tags_in_a_folder(bucket: str) -> None:
    course(open_store(f"{bucket}/store"))


def test_a_tag_whose_artifact_is_gone_and_a_damaged_one_are_told(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    artifact = made(store, "one")
    tags.write(store, "best", artifact)
    (tmp_path / "letters").rename(tmp_path / "moved")
    with pytest.raises(Refusal, match="which is not there any more"):
        tags.find(store, "best")
    record = tmp_path / ".tags" / "best.json"
    record.write_text(record.read_text().replace(artifact.digest, "0" * 64))
    with pytest.raises(Refusal, match=r"best\.json: is damaged .* Delete it\.$"):
        tags.find(store, "best")
