"""From router logits to chosen experts: one function for every way to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.positions.documents import document_ends, document_positions

if TYPE_CHECKING:
    from model.ffns.experts.config import MoeConfig


@dataclass(frozen=True)
class Choices:
    """What the tokens of a pass chose.

    experts_BTJ: int64, best first. weights_BTJ: fp32, what each expert's output is multiplied by.
    kept_BTJ: which choices reach their expert: not those of padding, left to chance, or beyond capacity.
    probabilities_BTE: fp32, scores that sum to one. load_BE: how many choices of each row wanted each expert, fp32.
    """

    experts_BTJ: torch.Tensor
    weights_BTJ: torch.Tensor
    kept_BTJ: torch.Tensor
    probabilities_BTE: torch.Tensor
    load_BE: torch.Tensor


def choose(
    logits_BTE: torch.Tensor,
    config: MoeConfig,
    *,
    bias_E: torch.Tensor | None = None,
    documents_BT: torch.Tensor | None = None,
    causal: bool = False,
    chance_BT: torch.Tensor | None = None,
) -> Choices:
    """Each token's top_k experts.

    bias_E: added to the scores for choosing only. documents_BT: document number of each token, 0 for padding; null is
    one document a row. causal: tokens must not learn of later ones, which decides who comes first where an expert has a
    capacity. chance_BT: uniform in [0, 1), where a second expert is kept by chance.
    """
    router = config.router
    scores_BTE = logits_BTE.sigmoid() if router.scores == "sigmoid" else logits_BTE.softmax(-1)
    ranked_BTE = scores_BTE.detach() if bias_E is None else scores_BTE.detach() + bias_E.float()
    experts_BTJ = _reachable(ranked_BTE, config).topk(config.top_k, dim=-1).indices
    weights_BTJ = scores_BTE.gather(-1, experts_BTJ)
    if router.renormalize:
        weights_BTJ = weights_BTJ / (weights_BTJ.sum(-1, keepdim=True) + 1e-20)
    wanted_BTJ = torch.ones_like(experts_BTJ, dtype=torch.bool)
    if documents_BT is not None:
        wanted_BTJ = wanted_BTJ & (documents_BT != 0)[..., None]
    if chance_BT is not None:
        second_BT = 2 * weights_BTJ[..., 1].detach() > chance_BT
        wanted_BTJ = wanted_BTJ & torch.stack([torch.ones_like(second_BT), second_BT], dim=-1)
    load_BE = per_row(experts_BTJ, wanted_BTJ, config.n_experts)
    return Choices(
        experts_BTJ=experts_BTJ,
        weights_BTJ=weights_BTJ * router.scale if router.scale != 1.0 else weights_BTJ,
        kept_BTJ=_within_capacity(experts_BTJ, wanted_BTJ, config, documents_BT, causal),
        probabilities_BTE=scores_BTE / scores_BTE.sum(-1, keepdim=True) if router.scores == "sigmoid" else scores_BTE,
        load_BE=load_BE,
    )


def per_row(experts_BTJ: torch.Tensor, counted_BTJ: torch.Tensor, n_experts: int) -> torch.Tensor:
    """counts_BE, fp32: how many of the counted choices of each row fall on each expert."""
    counts_BE = torch.zeros(experts_BTJ.shape[0], n_experts, device=experts_BTJ.device)
    return counts_BE.scatter_add_(1, experts_BTJ.flatten(1), counted_BTJ.flatten(1).float())


def _reachable(ranked_BTE: torch.Tensor, config: MoeConfig) -> torch.Tensor:
    """-inf for experts outside a token's best groups."""
    groups, top_groups = config.router.groups, config.router.top_groups
    if groups == top_groups:
        return ranked_BTE
    grouped_BTGE = ranked_BTE.unflatten(-1, (groups, -1))
    best_BTG = grouped_BTGE.topk(2, dim=-1).values.sum(-1)
    inside_BTG = torch.zeros_like(best_BTG, dtype=torch.bool)
    inside_BTG.scatter_(-1, best_BTG.topk(top_groups, dim=-1).indices, True)
    return grouped_BTGE.masked_fill(~inside_BTG[..., None], float("-inf")).flatten(-2)


def _within_capacity(
    experts_BTJ: torch.Tensor,
    wanted_BTJ: torch.Tensor,
    config: MoeConfig,
    documents_BT: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """Which of the wanted choices their expert takes, in the order that `CapacityConfig` tells, document by document."""
    if config.capacity is None:
        return wanted_BTJ
    if documents_BT is None:
        documents_BT = torch.ones_like(wanted_BTJ[..., 0], dtype=torch.int32)
    _, tokens, top_k = experts_BTJ.shape
    here_BT = torch.arange(tokens, device=experts_BTJ.device).expand(documents_BT.shape)
    start_BT, end_BT = here_BT - document_positions(documents_BT), document_ends(documents_BT)
    wanted_BTJE = torch.zeros(*experts_BTJ.shape, config.n_experts, dtype=torch.int64, device=experts_BTJ.device)
    wanted_BTJE.scatter_(-1, experts_BTJ[..., None], wanted_BTJ[..., None].long())
    # How many wanted an expert before place S of the row: as first choice, as second …
    arrived_BSJE = torch.nn.functional.pad(wanted_BTJE.cumsum(1), (0, 0, 0, 0, 1, 0))
    if causal:
        total_BSJE = arrived_BSJE.sum(2, keepdim=True).expand_as(arrived_BSJE)
        ahead_BTJ = _at(total_BSJE, here_BT, experts_BTJ) - _at(total_BSJE, start_BT, experts_BTJ)
    else:
        better_BSJE = arrived_BSJE.cumsum(2) - arrived_BSJE  # … as anything better than the choice in question
        ahead_BTJ = _at(arrived_BSJE, here_BT, experts_BTJ) - _at(arrived_BSJE, start_BT, experts_BTJ)
        ahead_BTJ += _at(better_BSJE, end_BT, experts_BTJ) - _at(better_BSJE, start_BT, experts_BTJ)
    limit_BT = config.capacity.limit(document_tokens=end_BT - start_BT, top_k=top_k, n_experts=config.n_experts)
    return wanted_BTJ & (ahead_BTJ < limit_BT[..., None])


def _at(counts_BSJE: torch.Tensor, place_BT: torch.Tensor, experts_BTJ: torch.Tensor) -> torch.Tensor:
    """counts_BTJ: at the place that each token names, of the expert that is its choice J."""
    top_k, n_experts = experts_BTJ.shape[2], counts_BSJE.shape[3]
    rank_J = torch.arange(top_k, device=place_BT.device)
    index_BTJ = (place_BT[..., None] * top_k + rank_J) * n_experts + experts_BTJ
    return counts_BSJE.flatten(1).gather(1, index_BTJ.flatten(1)).view_as(experts_BTJ)
