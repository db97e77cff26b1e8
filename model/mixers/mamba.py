"""Mamba's mixer: a short convolution and a selective state space (Gu & Dao 2023, https://arxiv.org/abs/2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.init import Declared, Linear, Parameter, declare
from model.kernels.causal_conv import causal_conv
from model.kernels.selective_scan import CHUNK, FUSED, recurrent_scan, selective_scan
from model.limits import check_counts
from model.mixers.base import Mixer, MixerConfig, MixerInput, MixerState, refuse_decoder_only
from model.norms.norm import NormConfig
from model.positions.documents import document_starts
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.kernels.attention import AttentionKernel


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """A selective state space behind a short convolution."""

    kind: Literal["mamba"] = "mamba"
    """Which part this is."""
    expand: int = 2
    """Channels inside, in multiples of d_model."""
    d_state: int = 16
    """State of each channel."""
    d_conv: int = 4
    """Taps of the convolution."""
    dt_rank: int | None = None
    """Of the map that gives each channel its time step; null: d_model / 16, rounded up."""
    bias: bool = False
    """The outer projections have offsets."""
    conv_bias: bool = True
    """The convolution has an offset."""

    def __post_init__(self) -> None:
        check_counts(self, "expand", "d_state", "d_conv", "dt_rank")

    def rank(self, d_model: int) -> int:
        """Rank of the map to time steps."""
        return -(-d_model // 16) if self.dt_rank is None else self.dt_rank

    def check(self, model: ModelConfig) -> None:
        """Every width will do."""
        refuse_decoder_only(self.kind, model)

    def kernel_line(self) -> str:
        return f"selective scan: {'mamba-ssm' if FUSED is not None else 'chunked, mamba-ssm is not installed'}"

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> Mamba:
        return Mamba(self, d_model)

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """Four projections; the convolution and the scan in `token_flops`, whose exponentials are left out."""
        width, rank, state = self.expand * d_model, self.rank(d_model), self.d_state
        matrices = d_model * 2 * width + width * (rank + 2 * state) + rank * width + width * d_model
        vectors = width * (self.d_conv + state + 2) + (width if self.conv_bias else 0)
        biases = 2 * width + d_model if self.bias else 0
        return SlotCosts(
            parameters=matrices + vectors + biases,
            matrices=matrices,
            token_flops=width * (2 * self.d_conv + 6 * state + 4),
            kept_elements=7 * width + rank + 2 * state,
            kept_bytes=8 * width + 4 * width * state // CHUNK,
            state=width * (self.d_conv - 1),
            state_bytes=4 * width * state,
        )


class MambaState(MixerState):
    """The last inputs of the convolution, and the state of every channel in fp32; as large after a million tokens."""

    rewindable = False

    def __init__(self, past_BTF: torch.Tensor, scan_BZF: torch.Tensor) -> None:
        self.past_BTF = past_BTF
        self.scan_BZF = scan_BZF

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.past_BTF = self.past_BTF[rows_B]
        self.scan_BZF = self.scan_BZF[rows_B]


class Mamba(Mixer):
    """out(silu(gate) * (scan(x) + skip * x)), x = silu(conv(in x)); the scan's step, input and output maps come from x."""

    declared = declare(a_log=Parameter("recurrence", "decay"), skip=Parameter("recurrence", "ones"))

    def __init__(self, config: MambaConfig, d_model: int) -> None:
        super().__init__()
        width, rank = config.expand * d_model, config.rank(d_model)
        self.parts = (rank, config.d_state, config.d_state)
        self.in_proj = Linear(d_model, 2 * width, bias=config.bias)
        self.conv = CausalConv(width, config.d_conv, config.conv_bias)
        self.x_proj = Linear(width, sum(self.parts))
        self.dt_proj = TimeStep(rank, width)
        self.a_log = nn.Parameter(torch.empty(width, config.d_state))
        self.skip = nn.Parameter(torch.empty(width))
        self.out_proj = Linear(width, d_model, bias=config.bias, residual=True)

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        """The state is forgotten where a document begins. Raises Refusal for a prefix."""
        if shared.mask.prefix_B is not None or shared.mask.globals_BT is not None:
            raise Refusal(
                "model",
                NO_VALUE,
                "prefix_B or globals_BT was given, and mixer.kind is mamba: a scan looks back only",
                "leave prefixes and global tokens out",
            )
        x_BTF, gate_BTF = self.in_proj(x_BTD).chunk(2, dim=-1)
        documents_BT = shared.mask.documents_BT
        if state is not None:
            assert isinstance(state, MambaState)
            x_BTF = self._convolved_behind(state, x_BTF, shared)
        else:
            x_BTF = self.conv(x_BTF, documents_BT)
        x_BTF = nn.functional.silu(x_BTF)
        low_BTR, b_BTZ, c_BTZ = self.x_proj(x_BTF).split(self.parts, dim=-1)
        dt_BTF = self.dt_proj(low_BTR)
        a_FZ = -self.a_log.float().exp()
        starts_BT = None if documents_BT is None else document_starts(documents_BT)
        if state is None:
            y_BTF, _ = selective_scan(x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, starts_BT)
        else:
            padding_BT1 = shared.padding(x_BTF.shape[1])
            if padding_BT1 is not None:
                dt_BTF = dt_BTF.masked_fill(padding_BT1, 0.0)  # no time passes: the state stays
            scan = recurrent_scan if x_BTF.shape[1] == 1 else selective_scan
            y_BTF, last_BZF = scan(x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, starts_BT, state.scan_BZF)
            assert last_BZF is not None
            state.scan_BZF = last_BZF
        y_BTF = torch.addcmul(y_BTF, x_BTF, self.skip.to(x_BTF.dtype))
        return self.out_proj(y_BTF * nn.functional.silu(gate_BTF))

    def _convolved_behind(self, state: MambaState, x_BTF: torch.Tensor, shared: MixerInput) -> torch.Tensor:
        """The convolution of what continues a state, which is left with the last inputs."""
        past, documents_BT = state.past_BTF.shape[1], shared.mask.documents_BT
        longer_BTF = torch.cat((state.past_BTF, x_BTF), dim=1)
        if documents_BT is not None:  # the state is empty then, and its zeros may belong to any document
            documents_BT = nn.functional.pad(documents_BT, (past, 0), mode="replicate")
        y_BTF: torch.Tensor = self.conv(longer_BTF, documents_BT)[:, past:]
        if documents_BT is not None:  # a document shorter than the convolution ends behind zeros, not another's end
            longer_BTF = longer_BTF * (documents_BT == documents_BT[:, -1:])[..., None]
        if shared.lengths_B is None:
            state.past_BTF = longer_BTF[:, x_BTF.shape[1] :].clone()  # a view would hold the whole prompt
        else:
            places_BT = shared.lengths_B[:, None] + torch.arange(past, device=x_BTF.device)
            state.past_BTF = longer_BTF.gather(1, places_BT[..., None].expand(-1, -1, x_BTF.shape[2]))
        return y_BTF

    def new_state(self, rows: int, max_tokens: int) -> MambaState:
        width, state = self.a_log.shape
        past_BTF = self.a_log.new_zeros(rows, self.conv.weight.shape[2] - 1, width)
        return MambaState(past_BTF, self.a_log.new_zeros(rows, state, width, dtype=torch.float32))


class CausalConv(Declared):
    """The convolution's weight [F, 1, taps], as torch's grouped convolution stores it, and its bias."""

    declared = declare(weight=Parameter("matrix", "fan_in"), bias=Parameter("bias", "zeros"))

    def __init__(self, width: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, taps))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x_BTF: torch.Tensor, documents_BT: torch.Tensor | None) -> torch.Tensor:
        """y_BTF: each channel with its own taps, over a token and those before it in its document."""
        return causal_conv(x_BTF, self.weight, self.bias, documents_BT)


class TimeStep(Declared):
    """softplus(W x + b) in fp32, where b alone decides between steps of 0.001 and 0.1: bf16 would round it by 1 %."""

    declared = declare(weight=Parameter("matrix", "fan_in"), bias=Parameter("bias", "time_step"))

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, rank))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, low_BTR: torch.Tensor) -> torch.Tensor:
        """fp32 dt_BTF, all positive, of the low-rank low_BTR."""
        return nn.functional.softplus(nn.functional.linear(low_BTR, self.weight).float() + self.bias.float())
