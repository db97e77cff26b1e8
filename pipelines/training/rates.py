"""Learning rates for `auto`, from the optimizer, the model's kind and its width: usable defaults for models without
tuned rates.

    derived(MuonSettings(lr="auto", …), model).matrix_lr        # a plain number, which enters digests

**AdamW.** 6e-4 at a width of 768, falling as 1/width: the rates of GPT-3's table (Brown et al. 2020, table 2.1) and muP's
rule for matrices (Yang et al. 2022, https://arxiv.org/abs/2203.03466), at most AT_MOST. Post-norm towers take a third.

**Muon.** The rates searched for the demo (width 160, embeddings that start at 0.3; DECISIONS, "The demo's recipe") carried
to other models. Matrices: an orthogonal update of root mean square r has the spectral norm r sqrt(width), so the rate
falls as 1/sqrt(width). Norms and biases: the same at every width. An untied head: 1/width above the demo's, as muP has it.
Embeddings: Adam changes a weight by about its rate, so the rate follows the size they start with. A tied table is a head
as well, which an embedding's rate makes diverge: TIED times AdamW's rate. Routers and experts: AdamW's rate.

Pretrained weights must not be forgotten: a training that starts from some takes AGAIN times all these, which is
2e-4 at the width of SmolLM2 135M and 3e-5 at that of Llama 8B. Adapters beside them take ADAPTED times that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from model.config import ModelConfig
from pipelines.training.settings import MuonSettings, OptimSettings

ADAMW_LR, ADAMW_WIDTH = 6e-4, 768
AT_MOST = 4e-3
POST_NORM = 1 / 3
DEMO_WIDTH, DEMO_EMBEDDING_STD = 160, 0.3
AGAIN, ADAPTED, TIED = 0.25, 5.0, 3.0
AnyOptim = TypeVar("AnyOptim", bound=OptimSettings)


def derived(settings: AnyOptim, model: ModelConfig, *, trained_before: bool = False, adapted: bool = False) -> AnyOptim:
    """`settings` with every `auto` replaced by a number.

    trained_before: the model starts from pretrained weights. adapted: these are frozen, adapters are trained.
    """
    adamw: dict[str, float | None] = dict.fromkeys(("lr", "embedding_lr", "head_lr"), adamw_rate(model))
    rates = muon_rates(model) if isinstance(settings, MuonSettings) else adamw
    scale = (AGAIN if trained_before else 1.0) * (ADAPTED if adapted else 1.0)
    chosen = {name: rate for name, rate in rates.items() if getattr(settings, name, None) == "auto"}
    numbers: dict[str, Any] = {name: None if rate is None else rate * scale for name, rate in chosen.items()}
    return replace(settings, **numbers)


def adamw_rate(model: ModelConfig) -> float:
    """AdamW's peak rate for the whole model."""
    rate = min(ADAMW_LR * (ADAMW_WIDTH / width(model)), AT_MOST)
    return rate * POST_NORM if "post" in layouts(model) else rate


def muon_rates(model: ModelConfig) -> dict[str, float | None]:
    """Muon's peak rates by field."""
    narrower = DEMO_WIDTH / width(model)
    tied = bool(model.tied_weights)
    own = model.init.embedding_std or model.init.std or 0.02
    return {
        "lr": 0.01,
        "matrix_lr": 0.0088 * narrower**0.5,
        "embedding_lr": TIED * adamw_rate(model) if tied else 0.2 * (own / DEMO_EMBEDDING_STD),
        "head_lr": 0.04 * min(1.0, narrower),
        "expert_lr": adamw_rate(model) if has_experts(model) else None,
    }


def has_experts(model: ModelConfig) -> bool:
    """Whether any layer chooses among experts."""
    return any(layer.ffn.kind == "moe" for tower in _towers(model) for layer in tower.layers)


def width(model: ModelConfig) -> int:
    """Width of the widest tower."""
    return max(tower.d_model for tower in _towers(model))


def layouts(model: ModelConfig) -> set[str]:
    """Norm layouts of the towers' blocks."""
    return {tower.layout for tower in _towers(model)}


def _towers(model: ModelConfig) -> list[ModelConfig]:
    return [tower for tower in (model, model.encoder, model.tower) if tower is not None]
