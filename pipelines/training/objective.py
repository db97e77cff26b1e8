"""Which objective suits which model, and what a token of a row costs under it."""

from __future__ import annotations

from conf.refusal import NO_VALUE, Refusal
from model.config import ModelConfig
from model.costs import forward_flops, train_flops_per_token

NEEDS = {
    "next_token": "a causal model",
    "masked_token": "an encoder (model.causal=false)",
    "span_denoising": "an encoder-decoder",
    "text_infilling": "an encoder-decoder",
}
REMEDIES = {
    "a causal model": "objective=next_token",
    "an encoder (model.causal=false)": "objective=masked_token",
    "an encoder-decoder": "objective=span_denoising or objective=text_infilling",
}
PRESETS = {
    "a causal model": "model=gpt2-124m",
    "an encoder (model.causal=false)": "model=bert-base",
    "an encoder-decoder": "model=t5-small",
}


def check_suits(kind: str, config: ModelConfig) -> None:
    """Whether an objective trains such a model: an encoder is not asked for the next token, which it sees.

    Raises Refusal, of a model that reads no text too.
    """
    if other := reads_other_than_text(config):
        raise Refusal(
            "model",
            NO_VALUE,
            f"{other}, and the rows that are trained on here are text",
            "choose a model of text: model=gpt2-124m, or model=bert-base objective=masked_token, or model=t5-small "
            "objective=span_denoising",
        )
    needs = NEEDS[kind]
    is_one = "an encoder (model.causal=false)" if not config.causal else "a causal model"
    if config.encoder is not None:
        is_one = "an encoder-decoder"
    if needs != is_one:
        raise Refusal(
            "objective.kind",
            kind,
            f"it trains {needs}, and this model is {is_one}",
            f"set {REMEDIES[is_one]}, or choose a model that is {needs}, such as {PRESETS[needs]}",
        )


def reads_other_than_text(config: ModelConfig) -> str:
    """Why a model cannot be trained on rows of text: images, sound, two towers, a head without tokens.
    Empty for a language model."""
    for where, part in (("model", config), ("model.encoder", config.encoder)):
        if part is not None and not part.frontend.uses_vocabulary:
            return f"{where}.frontend.kind={part.frontend.kind} reads no text"
    if config.grids or config.position.kind == "grid":
        return "model.position.kind=grid is of texts with the codes of an image behind them"
    if config.tower is not None:
        return "model.tower compares two models, one of which reads no text"
    if config.head.kind != "language":
        return f"model.head.kind={config.head.kind} predicts no tokens"
    return ""


def flops_per_token(
    config: ModelConfig, widths: tuple[int, int] | None, seq_len: int, mean_piece_tokens: float | None = None
) -> float:
    """Forward and backward FLOPs for each token of a row.

    widths: tokens of a row that encoder and decoder read, over which a denoising objective shares it out.
    """
    if widths is None:
        return train_flops_per_token(config, seq_len, mean_piece_tokens)
    encoder_len, decoder_len = widths
    return 3 * forward_flops(config, rows=1, seq_len=decoder_len, encoder_len=encoder_len) / seq_len
