"""What a model costs, in closed form from its configuration: parameters, FLOPs, bytes.

FLOPs count matrix multiplications, a multiply and an add each; norms, activations and softmax are left out as usual.
"""

from typing import NamedTuple

from model.config import ModelConfig
from model.loss import chunk_tokens
from model.position import LearnedPositionConfig

FLOP_FORMULA = (
    "forward FLOPs = 2·(matrix parameters + D·V)·tokens + 4·L·H·C·(query-key pairs the mask lets through); "
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
    norms = 0 if config.layout == "post" else _norm_parameters(config, config.d_model)
    head = 0 if config.tie_embeddings else table
    total = table + positions + config.n_layers * _block_parameters(config) + norms + head
    return ParameterCounts(total=total, active=total, embedding=table + positions)


def forward_flops(
    config: ModelConfig, *, rows: int, seq_len: int, mean_document_tokens: float | None = None, masked: bool = True
) -> int:
    """FLOPs of one forward pass over `rows` rows, logits included.

    mean_document_tokens: packed rows of documents this long, which see less than a whole row. masked: count only the
    query-key pairs the causal mask lets through; false counts all of them, as PaLM's MFU and FlopCounterMode do.
    """
    pairs = attended_pairs(seq_len, mean_document_tokens) if masked else float(seq_len * seq_len)
    matrices = config.n_layers * _block_matrices(config) + config.d_model * config.require_vocab_size()
    attention = 4 * config.n_layers * config.mixer.n_heads * config.head_dim * pairs
    return round(rows * (2 * matrices * seq_len + attention))


def train_flops_per_token(config: ModelConfig, seq_len: int, mean_document_tokens: float | None = None) -> float:
    """Forward and backward FLOPs for each token of a row: three times forward (FLOP_FORMULA)."""
    return 3 * forward_flops(config, rows=1, seq_len=seq_len, mean_document_tokens=mean_document_tokens) / seq_len


def attended_pairs(seq_len: int, mean_document_tokens: float | None = None) -> float:
    """Query-key pairs of one row under the causal mask, with documents of equal length if a length is given."""
    document = seq_len if mean_document_tokens is None else min(mean_document_tokens, seq_len)
    return seq_len * (document + 1) / 2


def kv_cache_bytes(config: ModelConfig, *, rows: int, tokens: int, dtype_bytes: int) -> int:
    """Keys and values of `rows` rows of `tokens` tokens in all layers."""
    return 2 * config.n_layers * rows * tokens * config.mixer.kv_heads * config.head_dim * dtype_bytes


def activation_bytes(
    config: ModelConfig, micro_batch_rows: int, seq_len: int, dtype_bytes: int, recompute: bool = False
) -> int:
    """Bytes that one micro-batch holds at the end of its forward pass, when most is held.

    What each block keeps for its backward pass (with `recompute` its input, and one block's at a time), the loss's
    gradients, which the forward pass already makes, and one chunk of logits. Norms are taken as fused; the composite
    RMSNorm that PyTorch runs on CPUs keeps 4 bytes more for each of its elements, and 4 again in bf16.
    """
    tokens = micro_batch_rows * seq_len
    kept = config.n_layers * _block_activations(config, dtype_bytes)
    if recompute:
        kept = _block_activations(config, dtype_bytes) + config.n_layers * config.d_model * dtype_bytes
    head = 3 * config.d_model * dtype_bytes  # input and output of the last norm, and the gradient of the latter
    vocab_size = config.require_vocab_size()
    logits = min(tokens, chunk_tokens(vocab_size)) * vocab_size * (8 + 2 * dtype_bytes)
    return tokens * (kept + head) + 4 * vocab_size * config.d_model + logits


def _norm_parameters(config: ModelConfig, width: int) -> int:
    return width * (2 if config.norm.bias else 1)


def _block_matrices(config: ModelConfig) -> int:
    """Weights of one block that a token is multiplied with."""
    mixer, width = config.mixer, config.d_model
    heads, kv_heads = mixer.n_heads * config.head_dim, mixer.kv_heads * config.head_dim
    return width * (2 * heads + 2 * kv_heads) + (3 if config.ffn.gated else 2) * width * config.ffn.d_ff


def _block_parameters(config: ModelConfig) -> int:
    mixer, width = config.mixer, config.d_model
    heads, kv_heads = mixer.n_heads * config.head_dim, mixer.kv_heads * config.head_dim
    norms = (1 if config.layout == "parallel" else 2) * _norm_parameters(config, width)
    norms += 2 * _norm_parameters(config, config.head_dim) if mixer.qk_norm else 0
    biases = (heads + 2 * kv_heads if mixer.qkv_bias else 0) + (width if mixer.out_bias else 0)
    if config.ffn.bias:
        biases += (2 if config.ffn.gated else 1) * config.ffn.d_ff + width
    return _block_matrices(config) + norms + biases


def _block_activations(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of one token kept by one block: norm inputs and outputs, q k v and the attention output, ffn hidden."""
    mixer, width = config.mixer, config.d_model
    heads, kv_heads = mixer.n_heads * config.head_dim, mixer.kv_heads * config.head_dim
    hidden = (4 if config.ffn.gated else 2) * config.ffn.d_ff
    norms = 2 if config.layout == "parallel" else 4
    projected = (3 if mixer.qk_norm else 2) * heads + (3 if mixer.qk_norm else 2) * kv_heads
    return dtype_bytes * (norms * width + projected + hidden) + 4 * mixer.n_heads
