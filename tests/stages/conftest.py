"""A small finished run, made by the real stages: corpus, tokenizer, shards, and two models with the weights they start
from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.typed import from_plain
from pipelines.engine.step import Artifact
from tests.stages.grouping import by_kind

CONF = Path(__file__).parents[2] / "conf"
LIBRARY = Path(json.__file__).parents[1]
MODULES = [path for path in LIBRARY.glob("*.py") if 2_000 < path.stat().st_size < 14_000]


class InProcess:
    """A stage's context without an engine: the work is done here, one piece after the other."""

    url = "/store/step/0123456789abcdef"
    """Where the step would be published."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.scratch = out_dir.with_name(f"{out_dir.name}-scratch")
        self.said: list[str] = []

    def map_shards(
        self, fn: Callable[..., Any], payloads: Mapping[str, Any], *, scratch: bool = False, **_: Any
    ) -> dict[str, Any]:
        folder = self.scratch if scratch else self.out_dir
        return {name: json.loads(json.dumps(fn(payload, folder))) for name, payload in payloads.items()}

    def call(self, fn: Callable[..., Any], *args: Any, **_: Any) -> Any:
        return fn(*args)

    def log(self, line: str) -> None:
        self.said.append(line)

    def progress(self, *_: Any, **__: Any) -> None:
        return


@pytest.fixture(scope="session")
def in_process() -> type[InProcess]:
    """in_process(out_dir) is a context for a stage."""
    return InProcess


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Artifacts by step name: corpus, tokenizer, shards, pretrain, finetune (two models of other seeds)."""
    from data.rows.shards import ShardSettings
    from data.text.corpus import CorpusSettings
    from data.text.decontaminate import HeldOutSettings
    from data.tokenizers.training import TokenizerSettings
    from pipelines.stages import corpus, shards, tokenizer

    root = tmp_path_factory.mktemp("run")
    for module in sorted(MODULES):
        copy = root / "text" / module.relative_to(LIBRARY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, copy)
    made: dict[str, Artifact] = {}

    def make(name: str, stage: Any, settings: Any) -> None:
        out_dir = root / name
        out_dir.mkdir()
        made[name] = artifact(name, out_dir, stage.run(settings, by_kind(made), out_dir, InProcess(out_dir)))

    make("corpus", corpus, CorpusSettings(paths=(str(root / "text"),), held_out=HeldOutSettings(fraction=0.2)))
    make("tokenizer", tokenizer, TokenizerSettings(vocab_size=1024))
    make("shards", shards, ShardSettings(seq_len=128))
    for seed, name in enumerate(("pretrain", "finetune")):
        save_model(root / name / "model", seed=seed, vocab_size=1024)
        made[name] = artifact(name, root / name, {"final_loss": 6.0})
    return made


def save_model(folder: Path, *, seed: int, vocab_size: int) -> None:
    """A tiny model whose weights are large enough that it has opinions: near-uniform logits would hide mistakes."""
    import torch

    from model.build import build_model
    from model.config import ModelConfig
    from model.interop import save_pretrained

    torch.set_num_threads(1)
    tiny = from_plain(ModelConfig, yaml.safe_load((CONF / "model" / "tiny.yaml").read_text()), where="model")
    config = replace(tiny, vocab_size=vocab_size)
    model, generator = build_model(config, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() > 1 else 0.2))
        # Single bytes are what a trained model hardly says, and broken characters decode differently everywhere.
        model.frontend.tokens.weight[: 8 + 256] = 0
    save_pretrained(model.state_dict(), config, folder)


def artifact(step: str, folder: Path, metrics: Mapping[str, Any]) -> Artifact:
    """What lies in a folder now, as an artifact."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size} for path in folder.rglob("*") if path.is_file()
    }
    manifest = {"step": step, "metrics": dict(metrics), "content_digest": "0" * 64, "files": files}
    return Artifact(step=step, digest=step.encode().hex().ljust(64, "0"), url=str(folder), manifest=manifest)
