"""What a layer of experts is: how many, how a token chooses among them, and what keeps them evenly used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.ffns.base import AbstractFfnConfig
from model.ffns.dense import Activation, FfnConfig
from model.ffns.experts.layer import MixtureOfExperts
from model.limits import check_counts
from model.slots import SlotCosts


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts. Logits and scores are fp32 whatever the model's precision."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """softmax over all experts, or a sigmoid for each (DeepSeek-V3, https://arxiv.org/abs/2412.19437)."""
    renormalize: bool = True
    """The weights of the chosen sum to one (Mixtral, https://arxiv.org/abs/2401.04088); false: as they were scored
    (Switch)."""
    scale: float = 1.0
    """What the weights are multiplied by afterwards."""
    groups: int = 1
    """Equal groups that experts stand in; a group is as good as its two best experts together (DeepSeek-V3)."""
    top_groups: int = 1
    """Groups within which a token chooses, its best."""
    jitter: float = 0.0
    """In training the router's input is multiplied by noise from 1 - jitter to 1 + jitter (Switch,
    https://arxiv.org/abs/2101.03961)."""
    second_by_chance: bool = False
    """In training the second expert is kept with probability 2 x its weight (GShard,
    https://arxiv.org/abs/2006.16668)."""
    seed: int = 0
    """Of that noise, which is a function of (seed, layer, the row's tokens, place in the row) alone."""

    def __post_init__(self) -> None:
        if self.groups < 1 or not 1 <= self.top_groups <= self.groups:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has groups={self.groups}, top_groups={self.top_groups}: a token "
                    "chooses from at least one group and from no more than there are"
                ),
            )
        if not 0 <= self.jitter < 1:
            raise Refusal("jitter", self.jitter, "noise of 1 ± jitter needs a jitter from 0 to 1")
        if self.scale <= 0:
            raise Refusal("scale", self.scale, "weights are multiplied by it, so it must be positive")

    @property
    def is_random(self) -> bool:
        """Whether training draws noise."""
        return self.jitter > 0 or self.second_by_chance


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the load even.

    The loss is E · Σ_e f_e P_e of every row, where f_e is the share of the row's choices that fell on expert e and P_e its
    mean probability: 1 where all are equal (Switch, equation 4, there over a batch).
    """

    loss: float = 0.01
    """Weight of that loss, a mean over the row's tokens."""
    z_loss: float = 0.0
    """Weight of the mean of logsumexp(logits)² (ST-MoE, https://arxiv.org/abs/2202.08906)."""
    bias_rate: float | None = None
    """After every step an expert's selection bias falls or rises by this where it had more or less than its share; it
    takes part in choosing, not in the weights (https://arxiv.org/abs/2408.15664). Null: no bias."""

    def __post_init__(self) -> None:
        for name in ("loss", "z_loss", "bias_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise Refusal(f"{name}", value, "a weight or a rate is 0 or more")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many tokens of one document an expert takes. Who comes too late passes by the expert on the residual, and is
    counted.

    In a causal stack tokens come one after the other, each with all its choices, so that no later token can take the
    place of an earlier one; where all see all, first choices come before second ones (GShard's Algorithm 1,
    https://arxiv.org/abs/2006.16668), then in the order of the document. Other documents of a row, other rows and padding
    change nothing. While generating, the tokens of one pass are a document: the prompt, then each token alone, which is
    never turned away. One of the two fields is given.
    """

    factor: float | None = None
    """So many times an equal share of the document's tokens, rounded up (Switch, GShard)."""
    tokens: int | None = None
    """So many tokens."""

    def __post_init__(self) -> None:
        if (self.factor is None) is (self.tokens is None) or (self.factor or self.tokens or 0) <= 0:
            raise Refusal(
                "",
                NO_VALUE,
                f"has factor={self.factor}, tokens={self.tokens}: give one of them, above 0",
                "or set ffn.capacity to null, which drops no token",
            )

    def limit(self, *, document_tokens: torch.Tensor, top_k: int, n_experts: int) -> torch.Tensor:
        """Tokens that one expert takes of documents with so many."""
        if self.tokens is not None:
            return torch.full_like(document_tokens, self.tokens)
        assert self.factor is not None
        return (document_tokens.double() * (self.factor * top_k) / n_experts).ceil().long()


@dataclass(frozen=True, kw_only=True)
class MoeConfig(AbstractFfnConfig):
    """A mixture of experts in the place of the feed-forward network (Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538).
    """

    routes: ClassVar[bool] = True

    kind: Literal["moe"] = "moe"
    """Which part this is."""
    n_experts: int = 8
    """Experts of a layer."""
    top_k: int = 2
    """Experts that a token uses."""
    d_ff: int = 512
    """Hidden width of one expert."""
    activation: Activation = "silu"
    """Of the experts' hidden layer."""
    gated: bool = True
    """As in a dense network."""
    shared_d_ff: int = 0
    """Hidden width of what every token passes as well (DeepSeek's shared experts, side by side); 0: none."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How a token chooses."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """What keeps the load even."""
    capacity: CapacityConfig | None = None
    """Null: every token goes to all the experts it chose (dropless)."""

    def __post_init__(self) -> None:
        check_counts(self, "n_experts", "d_ff")
        if self.shared_d_ff < 0:
            raise Refusal("shared_d_ff", self.shared_d_ff, "it must be at least 0")
        router = self.router
        if self.n_experts % router.groups:
            raise Refusal(
                "n_experts",
                self.n_experts,
                f"with router.groups {router.groups}: groups are equally large, so groups must divide n_experts",
            )
        if router.groups > 1 and self.n_experts // router.groups < 2:
            raise Refusal(
                "router.groups",
                router.groups,
                (f"for {self.n_experts} experts: a group is judged by its two best experts, so give it two"),
                "use fewer groups",
            )
        reachable = self.n_experts // router.groups * router.top_groups
        if not 1 <= self.top_k <= reachable:
            raise Refusal(
                "top_k",
                self.top_k,
                f"of {reachable} experts within reach: a token chooses at least one expert and none twice",
                "lower top_k, or raise n_experts or router.top_groups",
            )
        if self.top_k == 1 and router.renormalize and self.n_experts > 1:
            raise Refusal(
                "top_k",
                1,
                "with router.renormalize: the one weight would always be 1 and the router would never learn",
                "set router.renormalize to false",
            )
        if router.second_by_chance and self.top_k != 2:
            raise Refusal(
                "router.second_by_chance",
                True,
                (f"with top_k {self.top_k}: GShard's rule is about the second of two experts"),
                "set top_k to 2",
            )

    @property
    def experts(self) -> int:
        return self.n_experts

    @property
    def is_random(self) -> bool:
        return self.router.is_random

    def build(self, d_model: int, layer: int) -> nn.Module:
        return MixtureOfExperts(self, d_model, layer)

    @property
    def shared(self) -> FfnConfig | None:
        """The network that every token passes."""
        return (
            FfnConfig(d_ff=self.shared_d_ff, activation=self.activation, gated=self.gated) if self.shared_d_ff else None
        )

    def costs(self, d_model: int) -> SlotCosts:
        """Every expert is a parameter; a token is multiplied with top_k of them, the router and what is shared."""
        expert = (3 if self.gated else 2) * d_model * self.d_ff
        router = self.n_experts * d_model
        shared = self.shared.costs(d_model) if self.shared else SlotCosts(parameters=0, matrices=0)
        active = self.top_k * expert + router + shared.parameters
        # A token's copy for each expert and what that returns, and the hidden layer between them; in fp32 the scores,
        # and in int64 which experts were chosen and where the copies went.
        hidden = (4 if self.gated else 2) * self.d_ff
        return SlotCosts(
            parameters=self.n_experts * expert + router + shared.parameters,
            active=active,
            matrices=active,
            kept_elements=self.top_k * (2 * d_model + hidden) + shared.kept_elements,
            kept_bytes=8 * self.n_experts + 32 * self.top_k + 12,
        )
