"""From a configuration to a model."""

import logging

import torch
from torch import nn

from model.architectures import Transformer
from model.block import Block
from model.config import LayerConfig, ModelConfig
from model.ffn import build_ffn
from model.frontends import Embedding, TokenFrontend
from model.heads import LanguageHead, LanguageHeadConfig, NoHead, Transform
from model.init import initialize
from model.interfaces import Frontend, Head
from model.kernels.attention import AttentionKernel, select_kernel
from model.mixers.attention import CrossAttention
from model.mixers.build import build_mixer
from model.modalities.class_head import ClassHead, ClassHeadConfig
from model.modalities.ctc_head import CtcHead, CtcHeadConfig
from model.modalities.mel import MelFrontend, MelFrontendConfig
from model.modalities.patches import PatchFrontend, PatchFrontendConfig
from model.modalities.waveform import WaveformFrontend, WaveformFrontendConfig
from model.norm import build_norm
from model.position import build_positions
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

    kernel: `auto`, or one of `kernels.attention.KERNELS`. Raises ModelError for a configuration that cannot be built.
    """
    kernel_name, attend = select_kernel(kernel, torch.device(device))
    with torch.device("meta"):
        model = _assemble(config, config.require_vocab_size(), attend).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        initialize(model, config=config.init, n_layers=config.n_layers, seed=seed)
        if config.encoder is not None:
            initialize(
                model, config=config.encoder.init, n_layers=config.encoder.n_layers, seed=seed, within="encoder."
            )
    log.info("attention kernel: %s", kernel_name)
    return model


def _assemble(config: ModelConfig, vocab_size: int, attend: AttentionKernel) -> Transformer:
    """vocab_size: the decoder's, which an encoder without one of its own shares."""
    encoder = None if config.encoder is None else _assemble(config.encoder, vocab_size, attend)
    vocab_size = config.vocab_size or vocab_size
    frontend = _frontend(config, vocab_size)
    stack = Stack(
        [_block(config, layer, attend) for layer in config.layers],
        nn.Identity() if config.layout == "post" else build_norm(config.norm, config.d_model),
    )
    return Transformer(config, frontend, stack, _head(config, vocab_size), encoder)


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
    if isinstance(chosen, ClassHeadConfig):
        return ClassHead(chosen, width)
    if isinstance(chosen, CtcHeadConfig):
        return CtcHead(chosen, vocab_size, width)
    if not isinstance(chosen, LanguageHeadConfig):
        return NoHead()
    return LanguageHead(
        nn.Parameter(torch.empty(vocab_size, width)),
        soft_cap=config.logit_soft_cap,
        z_loss=config.z_loss,
        bias=chosen.bias,
        transform=None if chosen.transform is None else Transform(width, chosen.transform, config.norm),
        scale=width**-0.5 if chosen.scale_input else 1.0,
    )


def _block(config: ModelConfig, layer: LayerConfig, attend: AttentionKernel) -> Block:
    return Block(
        layout=config.layout,
        mixer_norm=build_norm(config.norm, config.d_model),
        mixer=build_mixer(layer.mixer, config.d_model, config.norm, attend),
        ffn_norm=None if config.layout == "parallel" else build_norm(config.norm, config.d_model),
        cross_norm=None if layer.cross is None else build_norm(config.norm, config.d_model),
        cross=_cross(config, layer, attend),
        ffn=build_ffn(layer.ffn, config.d_model),
        dropout=config.dropout,
    )


def _cross(config: ModelConfig, layer: LayerConfig, attend: AttentionKernel) -> CrossAttention | None:
    if layer.cross is None or config.encoder is None:
        return None
    return CrossAttention(layer.cross, config.d_model, config.norm, attend, config.encoder.d_model)
