"""`athanor tag`: names for artifacts, in the store that holds them.

athanor tag best pretrain experiment=demo      # best stands for that step's artifact, made already
athanor generate --from tag:best store=runs --prompt "def "
athanor tag                                    # the tags of the store runs/; else store=DIR or experiment=…
athanor tag --delete best
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.refusal import NO_VALUE, Refusal
from pipelines.console import display as console
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.step import Artifact
from pipelines.engine.store import tags
from pipelines.engine.store.base import Store
from pipelines.engine.store.open import open_store, storage_errors
from pipelines.execution import get_step, require_artifact
from pipelines.graph import build
from pipelines.settings.compose import compose
from pipelines.verbs.verify import store_of


def tag(words: Sequence[str], *, delete: str | None) -> int:
    """Give, list or delete a tag: `words` are its name and a step's, and overrides."""
    names, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if names and delete is None:
        return _give(names, overrides)
    store = open_store(store_of(overrides, "tag"))
    with storage_errors(store):
        if delete is not None:
            tags.remove(store, delete)
        rows = [(each.name, each.step, each.digest[:SHORT], each.tagged) for each in tags.listed(store)]
    console.console().print(console.table(None, ("tag", "step", "digest", "since"), rows))
    return 0


def _give(names: Sequence[str], overrides: Sequence[str]) -> int:
    if len(names) != 2 or not any(override.startswith("experiment=") for override in overrides):
        raise Refusal(
            "tag",
            " ".join(names),
            "a tag takes a name, a step and the experiment that made it",
            "write athanor tag NAME STEP experiment=…, with the run's own overrides",
        )
    settings = compose(overrides)
    steps = build(settings)
    step = get_step(steps, names[1])
    require_artifact(settings, step, overrides)
    store = open_store(settings.store)
    with storage_errors(store):
        from pipelines.engine import runner

        digest = next(report.digest for report in runner.plan([step], store=store) if report.name == step.name)
        artifact = store.find(step.name, digest)
        assert artifact is not None
        tags.write(store, names[0], artifact)
    console.console().print(f"{tags.PREFIX}{names[0]} is {artifact.url}", markup=False)
    return 0


def tagged_model(source: str, overrides: Sequence[str]) -> tuple[str, Path, Path | None]:
    """(the step that made it, the model's folder, its tokenizer's) of `tag:NAME`; null where the model's folder has one.

    Raises Refusal where the tag stands for no model, or its tokenizer is gone.
    """
    store = open_store(store_of(overrides, "generate"))
    with storage_errors(store):
        artifact = tags.find(store, source.removeprefix(tags.PREFIX))
        if "model/config.json" not in artifact.manifest["files"]:
            raise Refusal(
                source, NO_VALUE, f"it stands for {artifact.url}, which holds no model", "tag a step that trains"
            )
        store.verify(artifact, (), ("model/*",))
        return artifact.step, artifact.path / "model", _tokenizer(store, artifact, source)


def _tokenizer(store: Store, artifact: Artifact, source: str) -> Path | None:
    if any(name.startswith("model/tokenizer") for name in artifact.manifest["files"]):
        return None
    made_with = artifact.manifest["inputs"].get("tokenizer")
    tokenizer = None if made_with is None else store.find(made_with["step"], made_with["digest"])
    if tokenizer is None:
        raise Refusal(source, NO_VALUE, "the tokenizer that it was trained with is not in the store", "tag its export")
    store.verify(tokenizer, (), ("*",))
    return tokenizer.path
