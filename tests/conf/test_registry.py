"""Parts by kind: ours from a literal table, others' from installed packages, each imported when it is chosen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.refusal import Refusal
from conf.registry import Registry
from model.mixers.base import MixerConfig

PARTS = '''
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from model.ffns.base import AbstractFfnConfig
from model.init import Linear
from model.slots import SlotCosts


@dataclass(frozen=True, kw_only=True)
class SquareConfig(AbstractFfnConfig):
    """A product of two maps of x."""

    version: ClassVar[int] = {version}
    kind: Literal["square"] = "square"
    """Which part this is."""
    d_ff: int = 32
    """Hidden width."""

    def costs(self, d_model: int) -> SlotCosts:
        return SlotCosts(parameters=3 * d_model * self.d_ff, matrices=3 * d_model * self.d_ff)

    def build(self, d_model: int, layer: int) -> nn.Module:
        return Square(self, d_model)


class Square(nn.Module):
    def __init__(self, config: SquareConfig, d_model: int) -> None:
        super().__init__()
        self.one, self.other = (Linear(d_model, config.d_ff, bias=False) for _ in range(2))
        self.down = Linear(config.d_ff, d_model, bias=False, residual=True)

    def forward(self, x_BTD, shared):
        return self.down(self.one(x_BTD) * self.other(x_BTD)), {{}}
'''

PROGRAM = """
import dataclasses, json, sys
from conf.identity import identity
from conf.typed import from_plain, to_plain
from model.config import ModelConfig

assert not [name for name in sys.modules if name.startswith(("acme", "model.mixers.mamba", "model.ffns.experts.config"))]
config = from_plain(ModelConfig, json.loads(sys.argv[1]), "model")

import torch
from model.build import build_model
from model.costs import parameter_counts

model = build_model(config)
row = torch.arange(12).view(2, 6)
before = [p.clone() for p in model.parameters()]
model(row, targets_BT=row)["loss_sum"].backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
print(json.dumps({"identity": identity(config)["ffn"], "plain": to_plain(config), "moved": moved,
                  "counts": [parameter_counts(config).total, sum(p.numel() for p in model.parameters())]}))
"""

MODEL = {"vocab_size": 20, "d_model": 16, "n_layers": 1, "mixer": {"kind": "attention", "n_heads": 2}}


def package(
    folder: Path, *, version: int = 1, entries: str = "[athanor.ffns]\nsquare = acme_parts:SquareConfig\n"
) -> Path:
    """An installed distribution `acme-parts` with one module."""
    info = folder / "acme_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    (folder / "acme_parts.py").write_text(PARTS.format(version=version))
    return folder


def run(model: dict[str, object], *folders: Path) -> subprocess.CompletedProcess[str]:
    """PROGRAM on a model's plain settings, with packages installed in these folders."""
    import json

    root = str(Path(__file__).parents[2])
    program = f"import sys; sys.path[:0] = {[root, *map(str, folders)]!r}\n{PROGRAM}"
    return subprocess.run([sys.executable, "-c", program, json.dumps(model)], capture_output=True, text=True)


def test_a_part_of_another_package_is_configured_hashed_built_and_trained_as_ours_are(tmp_path: Path) -> None:
    import json

    one, two = package(tmp_path / "one"), package(tmp_path / "two", version=2)
    done = run({**MODEL, "ffn": {"kind": "square", "d_ff": 24}}, one)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identity"] == {"from": ["acme-parts", 1], "kind": "square", "d_ff": 24}
    assert found["plain"]["ffn"] == {"kind": "square", "d_ff": 24, "from": "acme-parts"}
    assert found["counts"][0] == found["counts"][1] and found["moved"] > 6
    again = json.loads(run(found["plain"], two).stdout)  # from what was written, under the author's next version
    assert again["identity"]["from"] == ["acme-parts", 2]
    elsewhere = run(found["plain"])
    assert (
        "model.ffn.kind = 'square': a kind of the package acme-parts, which is not installed here" in elsewhere.stderr
    )


def test_a_kind_is_named_by_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = "[athanor.parts]\nours = acme_parts:SquareConfig\n"
    monkeypatch.syspath_prepend(str(package(tmp_path / "claims", entries=claims)))
    with pytest.raises(Refusal, match=r"athanor\.parts = 'ours': acme-parts claims a kind of Athanor itself"):
        Registry("parts", {"ours": "model.ffns.dense:FfnConfig"}).names()
    twice = "[athanor.others]\nmine = acme_parts:SquareConfig\n"
    monkeypatch.syspath_prepend(str(package(tmp_path / "first", entries=twice)))
    other = package(tmp_path / "second", entries=twice)
    (other / "acme_parts-1.0.dist-info").rename(other / "zenith-1.0.dist-info")
    (other / "zenith-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: zenith\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(other))
    with pytest.raises(
        Refusal, match=r"athanor\.others = 'mine': (acme-parts|zenith) claims a kind of (acme-parts|zenith)"
    ):
        Registry("others", {}).names()


def test_what_cannot_be_imported_or_has_no_version_is_refused_by_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[athanor.broken]\ngone = acme_parts:Gone\nunversioned = model.ffns.dense:FfnConfig\n"
    monkeypatch.syspath_prepend(str(package(tmp_path, entries=entries)))
    registry = Registry("broken", {})
    with pytest.raises(Refusal, match=r"'gone': acme_parts:Gone cannot be imported .* Mend or remove acme-parts"):
        registry.load("gone")
    with pytest.raises(Refusal, match=r"'unversioned': model.ffns.dense:FfnConfig of acme-parts has no version"):
        registry.load("unversioned")


def test_a_kind_nobody_has_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        Refusal, match=r"mixer\.kind = 'atention': must be one of attention, .* Did you mean attention\?"
    ):
        MixerConfig.kinds.load("atention", "mixer.kind")


def test_every_entry_of_our_tables_is_the_class_of_its_kind() -> None:
    from model.ffns.base import AbstractFfnConfig
    from model.frontends.base import FrontendConfig
    from model.heads.base import HeadConfig
    from model.positions.base import PositionConfig

    for base in (MixerConfig, AbstractFfnConfig, FrontendConfig, HeadConfig, PositionConfig):
        for kind in base.kinds.table:
            cls = base.kinds.load(kind)
            assert issubclass(cls, base) and cls().kind == kind
