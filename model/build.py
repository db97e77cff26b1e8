"""From a configuration to a model."""

import logging

import torch
from torch import nn

from model.architecture import Transformer
from model.block import Block
from model.config import ModelConfig
from model.init import initialize
from model.kernels.attention import AttentionKernel
from model.kernels.select import Kind, select_kernel
from model.norms.norm import build_norm
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

    kernel: `auto`, or one of `kernels.select.KERNELS`. Raises Refusal for a configuration that cannot be built.
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
    for line in dict.fromkeys(layer.mixer.kernel_line() for layer in config.layers):
        if line is not None:
            log.info("%s", line)
    return model


def _needs(config: ModelConfig) -> set[Kind]:
    """Kinds of mask that this model cannot do without."""
    needs: set[Kind] = {"window"} if config.windows else set()
    if config.position.bias is not None:
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
    frontend = config.frontend.build(config, vocab_size)
    blocks = [_block(config, number, attend) for number in range(config.n_layers)]
    for kind in {type(block.mixer) for block in blocks}:
        for number, mixer in enumerate(block.mixer for block in blocks if type(block.mixer) is kind):
            mixer.number = number
    stack = Stack(blocks, nn.Identity() if config.layout == "post" else build_norm(config.norm, config.d_model))
    head = config.head.build(config, vocab_size)
    distances = config.position.build_distances(config.attention_heads, causal=config.causal)
    return Transformer(config, frontend, stack, head, encoder, distances, tower)


def _block(config: ModelConfig, number: int, attend: AttentionKernel) -> Block:
    layer, width, norm = config.layers[number], config.d_model, config.norm
    ffn = layer.ffn.build(width, number)
    cross = None
    if layer.cross is not None and config.encoder is not None:
        cross = layer.cross.build_cross(width, config.encoder.d_model, norm, attend)
    return Block(
        layout=config.layout,
        mixer_norm=build_norm(norm, width),
        mixer=layer.mixer.build(width, norm, attend),
        ffn_norm=None if config.layout == "parallel" or ffn is None else build_norm(norm, width),
        cross_norm=None if cross is None else build_norm(norm, width),
        cross=cross,
        ffn=ffn,
        dropout=config.dropout,
    )
