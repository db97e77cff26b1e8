"""The selective scan of Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752), a chunk of tokens at a time.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t          y_t = c_t · h_t

h has a state of Z for each of F channels. Everything about a chunk that is no recurrence is one operation over all its
tokens; what is left for each token is one fused multiply-add. The states themselves are never kept: one for each chunk
is, and the backward pass computes the others again, so memory is O(tokens · F), as that of any other layer.

Both directions are custom operators, one node of fixed shape to `torch.compile`. They run wherever PyTorch does; on
CUDA, mamba-ssm's kernel is taken where it is installed.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

CHUNK = 32  # tokens between two states that are kept: together they take 2 bytes a token and channel when Z is 16
TILE_ELEMENTS = 1 << 16  # elements of the state of one token that are worked on at a time: a tile stays in cache


def selective_scan(
    x_BTF: torch.Tensor,
    dt_BTF: torch.Tensor,
    a_FZ: torch.Tensor,
    b_BTZ: torch.Tensor,
    c_BTZ: torch.Tensor,
    starts_BT: torch.Tensor | None = None,
    state_BZF: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y_BTF in the precision of x, the fp32 state after the last token; none from a kernel that keeps it to itself).

    dt_BTF: fp32, not negative; 0 leaves the state as it was. a_FZ: fp32, negative. starts_BT: true where a document
    starts and the state is forgotten. state_BZF: fp32, what came before; null starts from nothing, and with null a
    caller should expect no state back.
    """
    if x_BTF.is_cuda and state_BZF is None and FUSED is not None:
        return fused_scan(FUSED, x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, starts_BT), None
    y_BTF, last_BZF, _ = chunked_scan(x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, starts_BT, state_BZF)
    return y_BTF, last_BZF


def recurrent_scan(
    x_BTF: torch.Tensor,
    dt_BTF: torch.Tensor,
    a_FZ: torch.Tensor,
    b_BTZ: torch.Tensor,
    c_BTZ: torch.Tensor,
    starts_BT: torch.Tensor | None = None,
    state_BZF: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token: the oracle, and the form for decoding, where there is only one token."""
    a_ZF = a_FZ.T
    state_BZF = x_BTF.new_zeros((), dtype=torch.float32) if state_BZF is None else state_BZF
    outputs = []
    for token in range(x_BTF.shape[1]):
        dt_B1F = dt_BTF[:, token, None].float()
        decay_BZF = (dt_B1F * a_ZF).exp()
        if starts_BT is not None:
            decay_BZF = decay_BZF.masked_fill(starts_BT[:, token, None, None], 0.0)
        input_B1F = dt_B1F * x_BTF[:, token, None].float()
        state_BZF = decay_BZF * state_BZF + input_B1F * b_BTZ[:, token, :, None].float()
        outputs.append((c_BTZ[:, token, None].float() @ state_BZF)[:, 0])
    return torch.stack(outputs, dim=1).to(x_BTF.dtype), state_BZF


@torch.library.custom_op("athanor::selective_scan", mutates_args=())
def chunked_scan(
    x_BTF: torch.Tensor,
    dt_BTF: torch.Tensor,
    a_FZ: torch.Tensor,
    b_BTZ: torch.Tensor,
    c_BTZ: torch.Tensor,
    starts_BT: torch.Tensor | None,
    state_BZF: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y_BTF, the last state_BZF, and for the backward pass the state before each chunk, kept_YBZF."""
    y_BTF, last_BZF, kept_YBZF = _empty_outputs(x_BTF, a_FZ)
    for rows, channels in _tiles(x_BTF, a_FZ):
        h_BZF = torch.zeros_like(last_BZF[rows, :, channels])
        if state_BZF is not None:
            h_BZF.copy_(state_BZF[rows, :, channels])
        for index, tokens in enumerate(_chunks(x_BTF)):
            kept_YBZF[index, rows, :, channels] = h_BZF
            chunk = _Chunk(x_BTF, dt_BTF, a_FZ, b_BTZ, starts_BT, (rows, tokens, channels), h_BZF)
            y_UB1F = _dot(c_BTZ[rows, tokens].float().transpose(0, 1)[:, :, None], chunk.states_UBZF)
            y_BTF[rows, tokens, channels] = y_UB1F[:, :, 0].transpose(0, 1).to(y_BTF.dtype)
            h_BZF = chunk.states_UBZF[-1]
        last_BZF[rows, :, channels] = h_BZF
    return y_BTF, last_BZF, kept_YBZF


@torch.library.custom_op("athanor::selective_scan_backward", mutates_args=())
def _backward(
    grad_BTF: torch.Tensor,
    grad_last_BZF: torch.Tensor | None,
    x_BTF: torch.Tensor,
    dt_BTF: torch.Tensor,
    a_FZ: torch.Tensor,
    b_BTZ: torch.Tensor,
    c_BTZ: torch.Tensor,
    starts_BT: torch.Tensor | None,
    kept_YBZF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, a, b, c and of the state at the start; chunk by chunk from the last."""
    dx_BTF, ddt_BTF = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x_BTF, dt_BTF))
    db_BTZ, dc_BTZ = (torch.zeros_like(t, dtype=torch.float32) for t in (b_BTZ, c_BTZ))
    da_FZ, dstate_BZF = torch.zeros_like(a_FZ), torch.zeros_like(kept_YBZF[0])
    for rows, channels in _tiles(x_BTF, a_FZ):
        carry_BZF = dstate_BZF[rows, :, channels]  # what later tokens ask of the last state of the chunk
        if grad_last_BZF is not None:
            carry_BZF.copy_(grad_last_BZF[rows, :, channels])
        for index, tokens in reversed(list(enumerate(_chunks(x_BTF)))):
            part = (rows, tokens, channels)
            before_BZF = kept_YBZF[index, rows, :, channels]
            chunk = _Chunk(x_BTF, dt_BTF, a_FZ, b_BTZ, starts_BT, part, before_BZF)
            grad_UB1F = grad_BTF[part].float().transpose(0, 1)[:, :, None].contiguous()
            c_UBZ = c_BTZ[rows, tokens].float().transpose(0, 1)
            dstates_UBZF = grad_UB1F * c_UBZ[..., None]
            dstates_UBZF[-1] += carry_BZF
            for token in range(len(dstates_UBZF) - 1, 0, -1):
                dstates_UBZF[token - 1].addcmul_(chunk.decay_UBZF[token], dstates_UBZF[token])
            torch.mul(chunk.decay_UBZF[0], dstates_UBZF[0], out=carry_BZF)
            dc_BTZ[rows, tokens] += _dot(chunk.states_UBZF, grad_UB1F.transpose(2, 3))[..., 0].transpose(0, 1)
            db_BTZ[rows, tokens] += _dot(dstates_UBZF, chunk.input_UB1F.transpose(2, 3))[..., 0].transpose(0, 1)
            dinput_UBF = _dot(chunk.b_UBZ[:, :, None], dstates_UBZF)[:, :, 0]
            # From here on the gradient of the exponent dt a, and the decay's memory as room for products.
            dexponent_UBZF, room_UBZF = dstates_UBZF.mul_(chunk.decay_UBZF), chunk.decay_UBZF
            dexponent_UBZF[1:].mul_(chunk.states_UBZF[:-1])
            dexponent_UBZF[0].mul_(before_BZF)
            ddt_UBF = torch.mul(dexponent_UBZF, chunk.a_ZF, out=room_UBZF).sum(2)
            ddt_UBF.addcmul_(dinput_UBF, chunk.x_UBF)
            da_ZF = torch.mul(dexponent_UBZF, chunk.dt_UB1F, out=room_UBZF).sum((0, 1))
            da_FZ[channels] += da_ZF.T
            dx_BTF[part] = (dinput_UBF * chunk.dt_UB1F[:, :, 0]).transpose(0, 1).to(dx_BTF.dtype)
            ddt_BTF[part] = ddt_UBF.transpose(0, 1).to(ddt_BTF.dtype)
    return dx_BTF, ddt_BTF, da_FZ, db_BTZ.to(b_BTZ.dtype), dc_BTZ.to(c_BTZ.dtype), dstate_BZF


class _Chunk:
    """The states after every token of a chunk, of some rows and channels, and what they were made from."""

    def __init__(
        self,
        x_BTF: torch.Tensor,
        dt_BTF: torch.Tensor,
        a_FZ: torch.Tensor,
        b_BTZ: torch.Tensor,
        starts_BT: torch.Tensor | None,
        part: tuple[slice, slice, slice],
        before_BZF: torch.Tensor,
    ) -> None:
        rows, tokens, channels = part
        self.x_UBF = x_BTF[part].float().transpose(0, 1).contiguous()
        self.dt_UB1F = dt_BTF[part].float().transpose(0, 1)[:, :, None].contiguous()
        self.a_ZF = a_FZ[channels].T.contiguous()
        self.b_UBZ = b_BTZ[rows, tokens].float().transpose(0, 1).contiguous()
        self.input_UB1F = self.dt_UB1F * self.x_UBF[:, :, None]
        span_UB1F = self.dt_UB1F
        if starts_BT is not None:  # an endless step forgets everything
            endless = torch.finfo(torch.float32).max
            span_UB1F = span_UB1F.masked_fill(starts_BT[rows, tokens].T[:, :, None, None], endless)
        # PyTorch's exp2 takes a third of the time of its exp on CPUs.
        exponent_UBZF = span_UB1F * (self.a_ZF * math.log2(math.e))
        self.decay_UBZF = torch.exp2(exponent_UBZF, out=exponent_UBZF)
        self.states_UBZF = self.input_UB1F * self.b_UBZ[..., None]
        for token in range(len(self.states_UBZF)):
            before_BZF = self.states_UBZF[token].addcmul_(self.decay_UBZF[token], before_BZF)


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix products, one for each token and row."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _tiles(x_BTF: torch.Tensor, a_FZ: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and channels whose states are of TILE_ELEMENTS together: none depends on another."""
    rows, _, width = x_BTF.shape
    some_channels = max(1, min(width, TILE_ELEMENTS // a_FZ.shape[1]))
    some_rows = max(1, TILE_ELEMENTS // (some_channels * a_FZ.shape[1]))
    for row in range(0, rows, some_rows):
        for channel in range(0, width, some_channels):
            yield slice(row, min(row + some_rows, rows)), slice(channel, min(channel + some_channels, width))


def _chunks(x_BTF: torch.Tensor) -> Iterator[slice]:
    tokens = x_BTF.shape[1]
    return (slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK))


def _empty_outputs(x_BTF: torch.Tensor, a_FZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, tokens, width = x_BTF.shape
    last_BZF = x_BTF.new_empty(rows, a_FZ.shape[1], width, dtype=torch.float32)
    kept_YBZF = last_BZF.new_empty(-(-tokens // CHUNK), *last_BZF.shape)
    return torch.empty_like(x_BTF, memory_format=torch.contiguous_format), last_BZF, kept_YBZF


@chunked_scan.register_fake
def _(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_outputs(x, a)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    grad_last: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    starts: torch.Tensor | None,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, a, b, c))
    return *like, torch.empty_like(kept[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, starts_BT, state_BZF = inputs
    ctx.has_state = state_BZF is not None
    ctx.save_for_backward(x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, starts_BT, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_BTF: torch.Tensor | None, grad_last_BZF: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    x_BTF, *others, kept_YBZF = ctx.saved_tensors
    grad_BTF = torch.zeros_like(x_BTF) if grad_BTF is None else grad_BTF
    *grads, dstate_BZF = _backward(grad_BTF, grad_last_BZF, x_BTF, *others, kept_YBZF)
    return *grads, None, dstate_BZF if ctx.has_state else None


chunked_scan.register_autograd(_differentiate, setup_context=_setup)


def fused_scan(
    kernel: Callable[..., torch.Tensor],
    x_BTF: torch.Tensor,
    dt_BTF: torch.Tensor,
    a_FZ: torch.Tensor,
    b_BTZ: torch.Tensor,
    c_BTZ: torch.Tensor,
    starts_BT: torch.Tensor | None,
) -> torch.Tensor:
    """y_BTF from a kernel with the signature of mamba-ssm's `selective_scan_fn`, which knows no documents.

    Before every start stands one more token, with an input of 0 and a step so long that nothing of the state is left.
    """
    if starts_BT is None:
        moved = (t.transpose(1, 2).contiguous() for t in (x_BTF, dt_BTF, b_BTZ, c_BTZ))
        x_BFT, dt_BFT, b_BZT, c_BZT = moved
        return kernel(x_BFT, dt_BFT, a_FZ, b_BZT, c_BZT).transpose(1, 2)
    rows, tokens, _ = x_BTF.shape
    before_BT = starts_BT.cumsum(1)
    longer = tokens + int(before_BT[:, -1].max())
    places_BT = before_BT + torch.arange(tokens, device=x_BTF.device)
    rows_B1 = torch.arange(rows, device=x_BTF.device)[:, None]

    def spread(t_BTF: torch.Tensor, filling: float) -> torch.Tensor:
        return t_BTF.new_full((rows, longer, t_BTF.shape[2]), filling).index_put((rows_B1, places_BT), t_BTF)

    dt_BTF = spread(dt_BTF, 1e9)
    x_BTF, b_BTZ, c_BTZ = (spread(t, 0.0) for t in (x_BTF, b_BTZ, c_BTZ))
    return fused_scan(kernel, x_BTF, dt_BTF, a_FZ, b_BTZ, c_BTZ, None)[rows_B1, places_BT]


def _mamba_ssm() -> Callable[..., torch.Tensor] | None:
    try:
        found: Callable[..., torch.Tensor] = importlib.import_module(
            "mamba_ssm.ops.selective_scan_interface"
        ).selective_scan_fn
    except (ImportError, AttributeError):
        return None
    return found


FUSED = _mamba_ssm() if torch.cuda.is_available() else None
"""mamba-ssm's kernel, where there is one and a device for it."""
