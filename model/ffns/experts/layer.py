"""The mixture of experts itself: router, dispatch, experts, and what the layer tells about both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.ffns.dense import ACTIVATIONS, FeedForward
from model.ffns.experts.routing import Choices, choose, per_row
from model.init import Declared, Parameter, declare
from model.kernels.grouped import Gather, Scatter, by_expert, grouped_matmul
from model.mixers.base import MixerInput
from model.noise import uniform
from model.slots import Record

if TYPE_CHECKING:
    from model.ffns.experts.config import MoeConfig


class Router(Declared):
    """logits_BTE of every expert for every token, in fp32: in half precision the choice itself is unstable (Switch)."""

    declared = declare(weight=Parameter("router", "weight"))

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Computed in fp32 under autocast too."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_BTE: torch.Tensor = _WideLinear.apply(x_BTD, self.weight)
        return logits_BTE


class _WideLinear(torch.autograd.Function):
    """x weightᵀ in fp32, which keeps x as it is for the backward pass and no fp32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x_BTD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        """fp32 logits_BTE of inputs of any precision."""
        ctx.save_for_backward(x_BTD, weight_ED)
        return nn.functional.linear(x_BTD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients in the precision of each input, of products in fp32."""
        x_BTD, weight_ED = ctx.saved_tensors
        grad_NE = grads[0].flatten(0, 1)
        grad_BTD = (grads[0] @ weight_ED.float()).to(x_BTD.dtype)
        return grad_BTD, (grad_NE.T @ x_BTD.flatten(0, 1).float()).to(weight_ED.dtype)


class Experts(Declared):
    """All experts' weights, fused: `gate_up` [E, 2F, D] (gates first; `up` [E, F, D] without them), `down` [E, D, F].

    elsewhere: set from outside where this process does not hold the experts: (x_QD, ends_E) -> y_QD by way of those
    that do.
    """

    elsewhere: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, config: MoeConfig, d_model: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated
        first = "gate_up" if config.gated else "up"
        hidden = 2 * config.d_ff if config.gated else config.d_ff
        self.register_parameter(first, nn.Parameter(torch.empty(config.n_experts, hidden, d_model)))
        self.down = nn.Parameter(torch.empty(config.n_experts, d_model, config.d_ff))
        self.declared = {first: Parameter("expert", "weight"), "down": Parameter("expert", "residual")}

    def forward(self, x_QD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """y_QD, row by row of the expert it is sorted to."""
        device = x_QD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_QD.dtype
        if self.elsewhere is not None:
            return self.elsewhere(x_QD.to(dtype), ends_E)
        first_EFD = self.get_parameter("gate_up" if self.gated else "up")
        return self.through(x_QD.to(dtype), ends_E, first_EFD, self.down)

    def through(
        self, x_QD: torch.Tensor, ends_E: torch.Tensor, first_EFD: torch.Tensor, down_EDF: torch.Tensor
    ) -> torch.Tensor:
        """y_QD by these weights, of any number of experts."""
        hidden_QF = grouped_matmul(x_QD, first_EFD.to(x_QD.dtype), ends_E)
        if self.gated:
            gate_QF, up_QF = hidden_QF.chunk(2, dim=-1)
            hidden_QF = self.activation(gate_QF) * up_QF
        else:
            hidden_QF = self.activation(hidden_QF)
        return grouped_matmul(hidden_QF, down_EDF.to(x_QD.dtype), ends_E)


class MixtureOfExperts(nn.Module):
    """x_BTD -> y_BTD, each token by the experts that it chose. Dropless and limited routing are one path: a choice that
    is not kept is sorted behind the last expert's and adds nothing.

    layer: which layer of the model this is, so that layers draw different noise.
    """

    selection_bias: torch.Tensor

    def __init__(self, config: MoeConfig, d_model: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.router = Router(d_model, config.n_experts)
        self.experts = Experts(config, d_model)
        self.shared = FeedForward(config.shared, d_model) if config.shared else None
        if config.balance.bias_rate is not None:
            self.register_buffer("selection_bias", torch.zeros(config.n_experts))

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput) -> tuple[torch.Tensor, Record]:
        """y_BTD, and of this pass:

        load_E, kept_E: int64, choices of each expert and those that reached it. auxiliary_B: fp32, the weighted
        balance and z-losses of each row, in training where they have a weight.
        """
        logits_BTE = self.router(self._jittered(x_BTD, shared))
        documents_BT = shared.mask.documents_BT
        padding_BT1 = shared.padding(x_BTD.shape[1])
        if documents_BT is None and padding_BT1 is not None:
            documents_BT = (~padding_BT1[..., 0]).int()
        real_BT = None if documents_BT is None else documents_BT != 0
        choices = choose(
            logits_BTE,
            self.config,
            bias_E=None if self.config.balance.bias_rate is None else self.selection_bias,
            documents_BT=documents_BT,
            causal=shared.mask.causal,
            chance_BT=self._chance(x_BTD, shared),
        )
        x_ND, top_k = x_BTD.flatten(0, 1), self.config.top_k
        to = by_expert(choices.experts_BTJ.view(-1, top_k), choices.kept_BTJ.view(-1, top_k), self.config.n_experts)
        y_QD = self.experts(Scatter.apply(x_ND, to.order_Q, to.place_Q), to.ends_E)
        router = self.config.router
        whole = router.renormalize and router.scale == 1.0
        y_ND = Gather.apply(y_QD, choices.weights_BTJ.view(-1, top_k), to.order_Q, to.place_Q, whole)
        y_BTD = y_ND.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, shared)[0]
        return y_BTD, self._record(logits_BTE, choices, real_BT)

    def _record(self, logits_BTE: torch.Tensor, choices: Choices, real_BT: torch.Tensor | None) -> Record:
        n_experts, balance = self.config.n_experts, self.config.balance
        kept_BE = per_row(choices.experts_BTJ, choices.kept_BTJ, n_experts)
        record = {"load_E": choices.load_BE.sum(0).long(), "kept_E": kept_BE.sum(0).long()}
        if self.training and (balance.loss or balance.z_loss):
            real_BT = torch.ones_like(logits_BTE[..., 0]) if real_BT is None else real_BT.float()
            tokens_B1 = real_BT.sum(1, keepdim=True).clamp(min=1)
            share_BE = choices.load_BE / choices.load_BE.sum(1, keepdim=True).clamp(min=1)
            mean_BE = (choices.probabilities_BTE * real_BT[..., None]).sum(1) / tokens_B1
            z_B = (logits_BTE.logsumexp(-1).square() * real_BT / tokens_B1).sum(1)
            record["auxiliary_B"] = balance.loss * n_experts * (share_BE * mean_BE).sum(1) + balance.z_loss * z_B
        return record

    def _jittered(self, x_BTD: torch.Tensor, shared: MixerInput) -> torch.Tensor:
        jitter = self.config.router.jitter
        if not self.training or not jitter:
            return x_BTD
        noise_BTD = self._noise(shared, x_BTD.shape[1], x_BTD.shape[2])
        return x_BTD.float() * (1 + jitter * (2 * noise_BTD - 1))

    def _chance(self, x_BTD: torch.Tensor, shared: MixerInput) -> torch.Tensor | None:
        if not self.training or not self.config.router.second_by_chance:
            return None
        # Draws of jitter take the layer's own number, these the one's complement: no draw is used twice.
        return self._noise(shared, x_BTD.shape[1], 1, layer=~self.layer)[..., 0]

    def _noise(self, shared: MixerInput, tokens: int, draws: int, layer: int | None = None) -> torch.Tensor:
        assert shared.row_keys_B is not None, "a router that draws noise needs the keys of the rows"
        number = self.layer if layer is None else layer
        return uniform(shared.row_keys_B, seed=self.config.router.seed, layer=number, tokens=tokens, draws=draws)

    @torch.no_grad()
    def rebalance(self, load_E: torch.Tensor) -> None:
        """Move the selection bias by one step against the load that all tokens of an update made."""
        rate = self.config.balance.bias_rate
        if rate is not None:
            load_E = load_E.to(self.selection_bias.device, torch.float32)
            self.selection_bias += rate * (load_E.mean() - load_E).sign()


def rebalance(model: nn.Module, loads: Mapping[str, torch.Tensor]) -> None:
    """After an update: `loads` has the choices of each expert for every layer by name (`3`, `encoder.3`), over all its
    tokens."""
    for name, load_E in loads.items():
        *stack, number = name.split(".")
        experts = model.get_submodule(".".join((*stack, "stack.layers", number, "ffn")))
        assert isinstance(experts, MixtureOfExperts)
        experts.rebalance(load_E)
