"""What a model costs, in closed form from its configuration: parameters, FLOPs, bytes.

FLOPs count matrix multiplications, a multiply and an add each; norms, activations and softmax are left out as usual.
"""

from dataclasses import replace
from typing import NamedTuple

from model.config import LayerConfig, ModelConfig
from model.slots import SlotCosts

FLOP_FORMULA = (
    "forward FLOPs = 2·(matrix parameters + D·V)·tokens + 4·L·H·C·(query-key pairs the mask lets through); "
    "latent attention by 2·(C of keys + C of values) in place of 4·C; "
    "state space and linear attention layers by their recurrences instead; "
    "training = 3 × forward; recomputed activations are not counted"
)


MANY_TOKENS = 1 << 17
"""Of one forward pass; by then `head_bytes` has reached its maximum."""


class ParameterCounts(NamedTuple):
    """total: every parameter once, tied ones too. active: those one token's forward pass uses. embedding: tables."""

    total: int
    active: int
    embedding: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Closed-form counts, an encoder's included; Refusal while the vocabulary size is unknown."""
    vocab_size, width = config.require_vocab_size(), config.d_model
    embedding = config.frontend.parameters(vocab_size, width, config.norm)
    embedding += config.position.parameters(config.n_positions, width, config.attention_heads)
    norm = config.norm.parameters(width)
    norms = (0 if config.layout == "post" else norm) + sum(_norms(config, layer) for layer in config.layers) * norm
    head = config.head.costs(vocab_size, width, config.norm).parameters
    others = embedding + norms + head - len(config.tied_weights) * vocab_size * width
    slots = _slots(config)
    total = others + sum(slot.parameters for slot in slots)
    active = others + sum(slot.parameters if slot.active is None else slot.active for slot in slots)
    if config.encoder is not None:
        encoder = parameter_counts(_encoder(config.encoder, vocab_size))
        total, active, embedding = total + encoder.total, active + encoder.active, embedding + encoder.embedding
        shared = config.encoder.tie_embeddings and config.encoder.frontend.uses_vocabulary
        embedding -= vocab_size * width if shared else 0
    if config.tower is not None:
        tower = parameter_counts(config.tower)
        total, active, embedding = total + tower.total, active + tower.active, embedding + tower.embedding
    return ParameterCounts(total=total, active=active, embedding=embedding)


def forward_flops(
    config: ModelConfig,
    *,
    rows: int,
    seq_len: int,
    mean_document_tokens: float | None = None,
    masked: bool = True,
    encoder_len: int | None = None,
) -> int:
    """FLOPs of one forward pass over `rows` rows, logits included, and its encoder's or other tower's where it has one.

    encoder_len: tokens of a row that the encoder (or a tower whose rows differ) reads; null is as many as the decoder's.
    mean_document_tokens: packed rows of documents this long, which see less than a whole row; where a pattern decides,
    the fewer of its pairs in a whole row and all within documents, which is more than both together let through.
    masked: count only the query-key pairs the mask lets through; false counts all of them, as PaLM's MFU and
    FlopCounterMode do.
    """
    vocab_size, memory_len = config.require_vocab_size(), seq_len if encoder_len is None else encoder_len
    head = config.head.costs(vocab_size, config.d_model, config.norm)
    flops = 2.0 * head.matrices * seq_len + head.row_flops + config.frontend.flops(seq_len, config.d_model)
    share = 1.0 if mean_document_tokens is None or not masked else min(1.0, mean_document_tokens / seq_len)
    for slot in _slots(config):
        pairs = float(seq_len * seq_len)
        if masked:
            pairs = attended_pairs(seq_len, mean_document_tokens, slot.window, causal=config.causal)
            pairs = pairs if slot.pattern is None else min(pairs, slot.pattern.pairs(seq_len))
        flops += (2 * slot.matrices + slot.token_flops) * seq_len + slot.pair_flops * pairs
        flops += 2 * slot.memory_matrices * memory_len + slot.memory_pair_flops * seq_len * memory_len * share
    if config.encoder is not None:
        encoder = _encoder(config.encoder, vocab_size)
        document = None if mean_document_tokens is None else mean_document_tokens * memory_len / seq_len
        flops += forward_flops(encoder, rows=1, seq_len=memory_len, mean_document_tokens=document, masked=masked)
    if config.tower is not None:
        tokens = config.tower.frontend.tokens or memory_len
        flops += forward_flops(config.tower, rows=1, seq_len=tokens, masked=masked)
    return round(rows * flops)


def train_flops_per_token(config: ModelConfig, seq_len: int, mean_document_tokens: float | None = None) -> float:
    """Forward and backward FLOPs for each token of a row: three times forward (FLOP_FORMULA)."""
    return 3 * forward_flops(config, rows=1, seq_len=seq_len, mean_document_tokens=mean_document_tokens) / seq_len


def attended_pairs(
    seq_len: int, mean_document_tokens: float | None = None, window: int | None = None, *, causal: bool = True
) -> float:
    """Query-key pairs of one row that the mask lets through, with documents of equal length if a length is given.

    window: a query sees itself and the `window - 1` tokens before it, and as many after it where it sees those.
    """
    if not causal:  # what is ahead of one token is behind another; only itself a token sees once
        return 2 * attended_pairs(seq_len, mean_document_tokens, window) - seq_len
    document = seq_len if mean_document_tokens is None else min(mean_document_tokens, seq_len)
    if window is None or window >= document:
        return seq_len * (document + 1) / 2
    return seq_len * (window - window * (window - 1) / 2 / document)


def kv_cache_bytes(config: ModelConfig, *, rows: int, tokens: int, dtype_bytes: int, encoder_tokens: int = 0) -> int:
    """What `rows` rows of `tokens` tokens leave in all layers: keys and values, or a mixer's state.

    A window saves time but no bytes: its layers remember every token, so that a cache can be rewound.
    encoder_tokens: of each row, whose keys and values a decoder with an encoder holds too.
    """
    slots = _slots(config)
    elements = sum(slot.state_per_token * tokens + slot.state for slot in slots)
    elements += sum(slot.state_per_memory_token * encoder_tokens for slot in slots)
    return rows * (elements * dtype_bytes + sum(slot.state_bytes for slot in slots))


def activation_bytes(
    config: ModelConfig, micro_batch_rows: int, seq_len: int, dtype_bytes: int, recompute: bool = False
) -> int:
    """Bytes that one micro-batch holds at the end of its forward pass, when most is held.

    What each block keeps for its backward pass (with `recompute` its input, and one block's at a time) and
    `head_bytes`. What a frontend keeps is left out: little
    for tokens and patches, but the convolutions over a waveform keep more than a block does. Norms are taken as fused;
    the composite RMSNorm that PyTorch runs on CPUs keeps 4 bytes more for each of its elements, and 4 again in bf16.
    """
    tokens = micro_batch_rows * seq_len
    blocks = [_block_activations(config, layer, dtype_bytes) for layer in config.layers]
    kept = max(blocks) + config.n_layers * config.d_model * dtype_bytes if recompute else sum(blocks)
    head = 3 * config.d_model * dtype_bytes  # input and output of the last norm, and the gradient of the latter
    vocab_size = config.require_vocab_size()
    held = tokens * (kept + head)
    if config.encoder is not None:
        encoder = _encoder(config.encoder, vocab_size)
        held += activation_bytes(encoder, micro_batch_rows, seq_len, dtype_bytes, recompute)
    if config.tower is not None:
        tokens = config.tower.frontend.tokens or seq_len
        held += activation_bytes(config.tower, micro_batch_rows, tokens, dtype_bytes, recompute)
    return held + head_bytes(config, micro_batch_rows * seq_len, dtype_bytes)


def head_bytes(config: ModelConfig, tokens: int, dtype_bytes: int) -> int:
    """Bytes of the head's loss at its height; beyond some number of tokens they are the same for any."""
    return config.head.loss_bytes(config.require_vocab_size(), config.d_model, tokens, dtype_bytes)


def row_and_once_bytes(config: ModelConfig, seq_len: int, dtype_bytes: int, recompute: bool = False) -> tuple[int, int]:
    """`activation_bytes` of a forward pass as (bytes per row, bytes once per pass of many rows)."""
    row = activation_bytes(config, 1, seq_len, dtype_bytes, recompute) - head_bytes(config, seq_len, dtype_bytes)
    return row, head_bytes(config, MANY_TOKENS, dtype_bytes)


def _slots(config: ModelConfig) -> list[SlotCosts]:
    """The costs of every slot of every layer."""
    return [costs for layer in config.layers for costs in _layer_slots(config, layer)]


def _layer_slots(config: ModelConfig, layer: LayerConfig) -> list[SlotCosts]:
    width, norm = config.d_model, config.norm
    slots = [layer.mixer.costs(width, norm), layer.ffn.costs(width)]
    if layer.cross is not None and config.encoder is not None:
        slots.append(layer.cross.cross_costs(width, config.encoder.d_model, norm))
    return slots


def _encoder(encoder: ModelConfig, vocab_size: int) -> ModelConfig:
    """An encoder by itself, with the vocabulary it shares."""
    return replace(encoder, vocab_size=encoder.vocab_size or vocab_size)


def _norms(config: ModelConfig, layer: LayerConfig) -> int:
    """Norms of one block."""
    ffn_norms = 0 if config.layout == "parallel" or layer.ffn.is_empty else 1
    return 1 + ffn_norms + (0 if layer.cross is None else 1)


def _block_activations(config: ModelConfig, layer: LayerConfig, dtype_bytes: int) -> int:
    """Bytes of one token kept by one block: norm inputs and outputs, and what its slots keep."""
    slots = _layer_slots(config, layer)
    elements = 2 * _norms(config, layer) * config.d_model
    elements += sum(slot.kept_elements + slot.memory_kept_elements for slot in slots)
    return dtype_bytes * elements + sum(slot.kept_bytes for slot in slots)
