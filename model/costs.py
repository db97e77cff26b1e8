"""What a model costs, in closed form from its configuration: parameters, FLOPs, bytes.

FLOPs count matrix multiplications, a multiply and an add each; norms, activations and softmax are left out as usual.
"""

from typing import NamedTuple

from model.config import LayerConfig, ModelConfig
from model.ffn import NoFfnConfig
from model.loss import chunk_tokens
from model.position import LearnedPositionConfig
from model.slots import SlotCosts

FLOP_FORMULA = (
    "forward FLOPs = 2·(matrix parameters + D·V)·tokens + 4·L·H·C·(query-key pairs the mask lets through); "
    "state space and linear attention layers by their recurrences instead; "
    "training = 3 × forward; recomputed activations are not counted"
)


class ParameterCounts(NamedTuple):
    """total: every parameter once, tied ones too. active: those one token's forward pass uses. embedding: tables."""

    total: int
    active: int
    embedding: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Closed-form counts; ModelError while the vocabulary size is unknown."""
    table = config.require_vocab_size() * config.d_model
    positions = config.max_seq_len * config.d_model if isinstance(config.position, LearnedPositionConfig) else 0
    norm = config.norm.parameters(config.d_model)
    norms = (0 if config.layout == "post" else norm) + sum(_norms(config, layer) for layer in config.layers) * norm
    head = 0 if config.tie_embeddings else table
    others = table + positions + norms + head
    slots = _slots(config)
    total = others + sum(slot.parameters for slot in slots)
    active = others + sum(slot.parameters if slot.active is None else slot.active for slot in slots)
    return ParameterCounts(total=total, active=active, embedding=table + positions)


def forward_flops(
    config: ModelConfig, *, rows: int, seq_len: int, mean_document_tokens: float | None = None, masked: bool = True
) -> int:
    """FLOPs of one forward pass over `rows` rows, logits included.

    mean_document_tokens: packed rows of documents this long, which see less than a whole row. masked: count only the
    query-key pairs the causal mask lets through; false counts all of them, as PaLM's MFU and FlopCounterMode do.
    """
    flops = float(2 * config.d_model * config.require_vocab_size() * seq_len)
    for slot in _slots(config):
        pairs = attended_pairs(seq_len, mean_document_tokens, slot.window) if masked else float(seq_len * seq_len)
        flops += (2 * slot.matrices + slot.token_flops) * seq_len + slot.pair_flops * pairs
    return round(rows * flops)


def train_flops_per_token(config: ModelConfig, seq_len: int, mean_document_tokens: float | None = None) -> float:
    """Forward and backward FLOPs for each token of a row: three times forward (FLOP_FORMULA)."""
    return 3 * forward_flops(config, rows=1, seq_len=seq_len, mean_document_tokens=mean_document_tokens) / seq_len


def attended_pairs(seq_len: int, mean_document_tokens: float | None = None, window: int | None = None) -> float:
    """Query-key pairs of one row under the causal mask, with documents of equal length if a length is given.

    window: a query sees itself and the `window - 1` tokens before it.
    """
    document = seq_len if mean_document_tokens is None else min(mean_document_tokens, seq_len)
    if window is None or window >= document:
        return seq_len * (document + 1) / 2
    return seq_len * (window - window * (window - 1) / 2 / document)


def kv_cache_bytes(config: ModelConfig, *, rows: int, tokens: int, dtype_bytes: int) -> int:
    """What `rows` rows of `tokens` tokens leave in all layers: keys and values, or a mixer's state."""
    slots = _slots(config)
    elements = sum(slot.state_per_token * min(tokens, slot.window or tokens) + slot.state for slot in slots)
    return rows * (elements * dtype_bytes + sum(slot.state_bytes for slot in slots))


def activation_bytes(
    config: ModelConfig, micro_batch_rows: int, seq_len: int, dtype_bytes: int, recompute: bool = False
) -> int:
    """Bytes that one micro-batch holds at the end of its forward pass, when most is held.

    What each block keeps for its backward pass (with `recompute` its input, and one block's at a time), the loss's
    gradients, which the forward pass already makes, and one chunk of logits. Norms are taken as fused; the composite
    RMSNorm that PyTorch runs on CPUs keeps 4 bytes more for each of its elements, and 4 again in bf16.
    """
    tokens = micro_batch_rows * seq_len
    blocks = [_block_activations(config, layer, dtype_bytes) for layer in config.layers]
    kept = max(blocks) + config.n_layers * config.d_model * dtype_bytes if recompute else sum(blocks)
    head = 3 * config.d_model * dtype_bytes  # input and output of the last norm, and the gradient of the latter
    vocab_size = config.require_vocab_size()
    logits = min(tokens, chunk_tokens(vocab_size)) * vocab_size * (8 + 2 * dtype_bytes)
    return tokens * (kept + head) + 4 * vocab_size * config.d_model + logits


def _slots(config: ModelConfig) -> list[SlotCosts]:
    """The costs of every slot of every layer."""
    width, norm = config.d_model, config.norm
    return [costs for layer in config.layers for costs in (layer.mixer.costs(width, norm), layer.ffn.costs(width))]


def _norms(config: ModelConfig, layer: LayerConfig) -> int:
    """Norms of one block."""
    return 1 if config.layout == "parallel" or isinstance(layer.ffn, NoFfnConfig) else 2


def _block_activations(config: ModelConfig, layer: LayerConfig, dtype_bytes: int) -> int:
    """Bytes of one token kept by one block: norm inputs and outputs, and what its slots keep."""
    slots = (layer.mixer.costs(config.d_model, config.norm), layer.ffn.costs(config.d_model))
    elements = 2 * _norms(config, layer) * config.d_model + sum(slot.kept_elements for slot in slots)
    return dtype_bytes * elements + sum(slot.kept_bytes for slot in slots)
