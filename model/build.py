"""From a configuration to a model."""

import logging

import torch
from torch import nn

from model.architecture import Transformer
from model.block import Block
from model.config import LayerConfig, ModelConfig
from model.errors import ModelError
from model.ffns.build import build_ffn
from model.frontends.base import Frontend
from model.frontends.mel import MelFrontend, MelFrontendConfig
from model.frontends.patches import PatchFrontend, PatchFrontendConfig
from model.frontends.text import Embedding, TokenFrontend
from model.frontends.waveform import WaveformFrontend, WaveformFrontendConfig
from model.heads.classifiers import (
    ClassifierHead,
    ClassifierHeadConfig,
    SpanHead,
    SpanHeadConfig,
    TokenClassifierHead,
    TokenClassifierHeadConfig,
)
from model.heads.ctc import CtcHead, CtcHeadConfig
from model.heads.distractor import DistractorHead, DistractorHeadConfig
from model.heads.embedding import EmbeddingHead, EmbeddingHeadConfig
from model.heads.language import Head, LanguageHead, LanguageHeadConfig, NoHead, Transform
from model.init import initialize
from model.kernels.attention import AttentionKernel
from model.kernels.select import Kind, select_kernel
from model.kernels.selective_scan import FUSED
from model.mixers.attention import CrossAttention
from model.mixers.bigbird import BigBirdAttention
from model.mixers.build import build_mixer
from model.mixers.mamba import MambaConfig
from model.norms.norm import build_norm
from model.positions.position import AlibiConfig, RelativeBias, RelativePositionConfig, build_positions
from model.stack import Stack

log = logging.getLogger("athanor.model")


def build_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kernel: str = "auto",
) -> Transformer:
    """The model of `config` with its starting weights, a function of `seed` alone; on the meta device, without any.

    kernel: `auto`, or one of `kernels.select.KERNELS`. Raises ModelError for a configuration that cannot be built.
    """
    attend = select_kernel(kernel, _needs(config))
    with torch.device("meta"):
        model = _assemble(config, config.require_vocab_size(), attend).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        initialize(model, config=config.init, n_layers=config.n_layers, seed=seed)
        for name, inner in (("encoder.", config.encoder), ("tower.", config.tower)):
            if inner is not None:
                initialize(model, config=inner.init, n_layers=inner.n_layers, seed=seed, within=name)
    log.info("attention kernels on %s: %s", torch.device(device).type, attend.described(torch.device(device).type))
    if any(isinstance(layer.mixer, MambaConfig) for layer in config.layers):
        log.info("selective scan: %s", "mamba-ssm" if FUSED is not None else "chunked, mamba-ssm is not installed")
    return model


def _needs(config: ModelConfig) -> set[Kind]:
    """Kinds of mask that this model cannot do without."""
    needs: set[Kind] = {"window"} if config.windows else set()
    if isinstance(config.position, AlibiConfig | RelativePositionConfig):
        needs.add("biased")
    if config.grids:
        needs.add("sparse")
    if config.encoder is not None:
        needs |= _needs(config.encoder)
        needs.add("cross")
    if config.tower is not None:
        needs |= _needs(config.tower)
    return needs


def _assemble(config: ModelConfig, vocab_size: int, attend: AttentionKernel) -> Transformer:
    """vocab_size: the decoder's, which an encoder without one of its own shares."""
    encoder = None if config.encoder is None else _assemble(config.encoder, vocab_size, attend)
    tower = None if config.tower is None else _assemble(config.tower, config.tower.require_vocab_size(), attend)
    vocab_size = config.vocab_size or vocab_size
    frontend = _frontend(config, vocab_size)
    stack = Stack(
        [_block(config, number, attend) for number in range(config.n_layers)],
        nn.Identity() if config.layout == "post" else build_norm(config.norm, config.d_model),
    )
    for number, mixer in enumerate(module for module in stack.modules() if isinstance(module, BigBirdAttention)):
        mixer.seed = number  # each layer draws blocks of its own
    distances: RelativeBias | None = None
    if isinstance(config.position, RelativePositionConfig):
        distances = RelativeBias(config.position, config.attention_heads, causal=config.causal)
    return Transformer(config, frontend, stack, _head(config, vocab_size), encoder, distances, tower)


def _frontend(config: ModelConfig, vocab_size: int) -> Frontend:
    chosen, width = config.frontend, config.d_model
    positions = build_positions(config.position, config.n_positions, width)
    norm = build_norm(config.norm, width) if chosen.norm else None
    if isinstance(chosen, PatchFrontendConfig):
        return PatchFrontend(chosen, width, positions, norm, config.dropout)
    if isinstance(chosen, MelFrontendConfig):
        return MelFrontend(chosen, width, positions, norm, config.dropout)
    if isinstance(chosen, WaveformFrontendConfig):
        return WaveformFrontend(chosen, width, config.norm.eps, norm, config.dropout)
    return TokenFrontend(
        Embedding(vocab_size, width),
        positions,
        config.dropout,
        scale=width**0.5 if chosen.scale_by_sqrt_width else 1.0,
        types=Embedding(chosen.token_types, width) if chosen.token_types else None,
        norm=norm,
    )


def _head(config: ModelConfig, vocab_size: int) -> Head:
    chosen, width = config.head, config.d_model
    if isinstance(chosen, LanguageHeadConfig):
        return LanguageHead(
            nn.Parameter(torch.empty(vocab_size, width)),
            soft_cap=config.logit_soft_cap,
            z_loss=config.z_loss,
            bias=chosen.bias,
            transform=None if chosen.transform is None else Transform(width, chosen.transform, config.norm),
            scale=width**-0.5 if chosen.scale_input else 1.0,
            smoothing=chosen.label_smoothing,
            weights=chosen.weights,
        )
    if isinstance(chosen, ClassifierHeadConfig):
        return ClassifierHead(chosen, width, config.dropout)
    if isinstance(chosen, TokenClassifierHeadConfig):
        return TokenClassifierHead(chosen, width, config.dropout)
    if isinstance(chosen, CtcHeadConfig):
        return CtcHead(chosen, vocab_size, width)
    if isinstance(chosen, DistractorHeadConfig):
        book = getattr(config.frontend, "codebook", None)
        if book is None or book.width != chosen.codes:
            raise ModelError(
                f"head.codes is {chosen.codes} with frontend.codebook {book}: frames are told apart by entries of that "
                "codebook, so set frontend.codebook with width equal to head.codes."
            )
        return DistractorHead(chosen, width)
    if isinstance(chosen, EmbeddingHeadConfig):
        return EmbeddingHead(chosen, width)
    return SpanHead(width) if isinstance(chosen, SpanHeadConfig) else NoHead()


def _block(config: ModelConfig, number: int, attend: AttentionKernel) -> Block:
    layer = config.layers[number]
    ffn = build_ffn(layer.ffn, config.d_model, number)
    one_norm = config.layout == "parallel" or ffn is None
    return Block(
        layout=config.layout,
        mixer_norm=build_norm(config.norm, config.d_model),
        mixer=build_mixer(layer.mixer, config.d_model, config.norm, attend),
        ffn_norm=None if one_norm else build_norm(config.norm, config.d_model),
        cross_norm=None if layer.cross is None else build_norm(config.norm, config.d_model),
        cross=_cross(config, layer, attend),
        ffn=ffn,
        dropout=config.dropout,
    )


def _cross(config: ModelConfig, layer: LayerConfig, attend: AttentionKernel) -> CrossAttention | None:
    if layer.cross is None or config.encoder is None:
        return None
    return CrossAttention(layer.cross, config.d_model, config.norm, attend, config.encoder.d_model)
