"""From router logits to chosen experts: one function for every way to choose."""

from dataclasses import dataclass

import torch

from model.moe.config import MoeConfig


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
    real_BT: torch.Tensor | None = None,
    chance_BT: torch.Tensor | None = None,
) -> Choices:
    """Each token's top_k experts.

    bias_E: added to the scores for choosing only. real_BT: false for padding. chance_BT: uniform in [0, 1), where a
    second expert is kept by chance.
    """
    router = config.router
    scores_BTE = logits_BTE.sigmoid() if router.scores == "sigmoid" else logits_BTE.softmax(-1)
    ranked_BTE = scores_BTE.detach() if bias_E is None else scores_BTE.detach() + bias_E.float()
    experts_BTJ = _reachable(ranked_BTE, config).topk(config.top_k, dim=-1).indices
    weights_BTJ = scores_BTE.gather(-1, experts_BTJ)
    if router.renormalize:
        weights_BTJ = weights_BTJ / (weights_BTJ.sum(-1, keepdim=True) + 1e-20)
    wanted_BTJ = torch.ones_like(experts_BTJ, dtype=torch.bool)
    if real_BT is not None:
        wanted_BTJ = wanted_BTJ & real_BT[..., None]
    if chance_BT is not None:
        second_BT = 2 * weights_BTJ[..., 1].detach() > chance_BT
        wanted_BTJ = wanted_BTJ & torch.stack([torch.ones_like(second_BT), second_BT], dim=-1)
    load_BE = per_row(experts_BTJ, wanted_BTJ, config.n_experts)
    return Choices(
        experts_BTJ=experts_BTJ,
        weights_BTJ=weights_BTJ * router.scale if router.scale != 1.0 else weights_BTJ,
        kept_BTJ=_within_capacity(experts_BTJ, wanted_BTJ, config),
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


def _within_capacity(experts_BTJ: torch.Tensor, wanted_BTJ: torch.Tensor, config: MoeConfig) -> torch.Tensor:
    """Which of the wanted choices their expert takes: first choices first, then in the order of the row."""
    if config.capacity is None:
        return wanted_BTJ
    _, tokens, top_k = experts_BTJ.shape
    limit = config.capacity.limit(row_tokens=tokens, top_k=top_k, n_experts=config.n_experts)
    # All first choices of the row, then all second ones: [B, J T].
    experts_BN = experts_BTJ.transpose(1, 2).flatten(1)
    wanted_BN = wanted_BTJ.transpose(1, 2).flatten(1)
    arrived_BNE = torch.nn.functional.one_hot(experts_BN, config.n_experts).mul_(wanted_BN[..., None]).cumsum(1)
    place_BN = arrived_BNE.gather(-1, experts_BN[..., None])[..., 0]
    return wanted_BTJ & (place_BN <= limit).unflatten(1, (top_k, tokens)).transpose(1, 2)
