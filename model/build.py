"""From a configuration to a model."""

import logging

import torch
from torch import nn

from model.architectures import Transformer
from model.block import Block
from model.config import LayerConfig, ModelConfig
from model.ffn import build_ffn
from model.frontends import Embedding, TokenFrontend
from model.heads import LanguageHead
from model.init import initialize
from model.kernels.attention import AttentionKernel, select_kernel
from model.kernels.selective_scan import FUSED
from model.mixers.build import build_mixer
from model.mixers.mamba import MambaConfig
from model.norm import build_norm
from model.position import LearnedPositionConfig, LearnedPositions
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
        model = _assemble(config, attend).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        initialize(model, config=config.init, n_layers=config.n_layers, seed=seed)
    log.info("attention kernel: %s", kernel_name)
    if any(isinstance(layer.mixer, MambaConfig) for layer in config.layers):
        log.info("selective scan: %s", "mamba-ssm" if FUSED is not None else "chunked, mamba-ssm is not installed")
    return model


def _assemble(config: ModelConfig, attend: AttentionKernel) -> Transformer:
    vocab_size, width = config.require_vocab_size(), config.d_model
    learned = isinstance(config.position, LearnedPositionConfig)
    positions = LearnedPositions(config.max_seq_len, width) if learned else None
    frontend = TokenFrontend(Embedding(vocab_size, width), positions, config.dropout)
    stack = Stack(
        [_block(config, layer, attend) for layer in config.layers],
        nn.Identity() if config.layout == "post" else build_norm(config.norm, width),
    )
    tied = frontend.tokens.weight if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, width))
    head = LanguageHead(tied, soft_cap=config.logit_soft_cap, z_loss=config.z_loss)
    return Transformer(config, frontend, stack, head)


def _block(config: ModelConfig, layer: LayerConfig, attend: AttentionKernel) -> Block:
    ffn = build_ffn(layer.ffn, config.d_model)
    one_norm = config.layout == "parallel" or ffn is None
    return Block(
        layout=config.layout,
        mixer_norm=build_norm(config.norm, config.d_model),
        mixer=build_mixer(layer.mixer, config.d_model, config.norm, attend),
        ffn_norm=None if one_norm else build_norm(config.norm, config.d_model),
        ffn=ffn,
        dropout=config.dropout,
    )
