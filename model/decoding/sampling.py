"""Choosing the next token from logits: what is allowed, what is kept, which one is drawn.

Options have the meaning they have in transformers, and are applied in its order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from conf.refusal import NO_VALUE, Refusal

Bias = tuple[tuple[int, ...], float]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    max_new_tokens: at most this many for each prompt. min_new_tokens: no stop id before there are this many.
    temperature: 0 takes the likeliest token.
    top_k: choose among the k likeliest; top_p: among the likeliest that together reach this probability (Holtzman et
    al. 2020); min_p: among those at least this fraction as likely as the likeliest (Nguyen et al. 2024); typical_p: among
    those whose surprise is nearest the expected one, up to this probability (Meister et al. 2022).
    repetition_penalty: logits of tokens that stand in the text already are divided by it, or multiplied where negative
    (CTRL, Keskar et al. 2019); 1 is none. no_repeat_ngram_size: no n tokens in a row come twice.
    within: (first, end): only these entries of the vocabulary are chosen, such as the codes of an image after a text.
    bias: ((tokens, offset), …): added to the logit of the last token wherever the others stand before it; -inf forbids.
    seed: with a prompt's place in the list, decides its draws; what else is in the batch does not.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    within: tuple[int, int] | None = None
    bias: tuple[Bias, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise Refusal("max_new_tokens", self.max_new_tokens, "ask for at least one token")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise Refusal(
                "min_new_tokens", self.min_new_tokens, f"it lies between 0 and max_new_tokens {self.max_new_tokens}"
            )
        if self.temperature < 0:
            raise Refusal("temperature", self.temperature, "use 0 for the likeliest token, or above 0 to sample")
        if self.top_k is not None and self.top_k < 1:
            raise Refusal("top_k", self.top_k, "keep at least one candidate, or null for all")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise Refusal(f"{name}", value, "it is a probability above 0 and at most 1, or null for all")
        if self.repetition_penalty <= 0:
            raise Refusal("repetition_penalty", self.repetition_penalty, "1 is none, above 1 avoids repetition")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            raise Refusal("no_repeat_ngram_size", self.no_repeat_ngram_size, "at least 1, or null for any")
        if self.within is not None and not 0 <= self.within[0] < self.within[1]:
            raise Refusal("within", self.within, "the first entry that may be chosen, and the one after the last")
        if any(not tokens for tokens, _ in self.bias):
            raise Refusal(
                "model",
                NO_VALUE,
                "bias has an entry without tokens: the last one is what the offset is added to",
                "name it",
            )

    @property
    def reads_text(self) -> bool:
        """Whether more than the logits decide about the choice, such as the tokens so far."""
        return bool(
            self.min_new_tokens
            or self.repetition_penalty != 1
            or self.no_repeat_ngram_size is not None
            or self.within is not None
            or self.bias
        )


def allowed(
    logits_BV: torch.Tensor,
    texts: Sequence[Sequence[int]],
    new_tokens: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int] = (),
) -> torch.Tensor:
    """Logits (or log-probabilities) with what the text so far forbids at -inf, or biased.

    texts: the tokens of every row, its prompt included; new_tokens: how many of them are new.
    """
    logits_BV = logits_BV.clone()
    if sampling.within is not None:
        first, end = sampling.within
        logits_BV[:, :first], logits_BV[:, end:] = float("-inf"), float("-inf")
    for row, text in enumerate(texts):
        logits_V = logits_BV[row]
        for (*before, last), offset in sampling.bias:
            if not before or list(text[-len(before) :]) == before:
                logits_V[last] += offset
        if sampling.repetition_penalty != 1 and text:
            seen = torch.tensor(sorted(set(text)), device=logits_V.device)
            value = logits_V[seen]
            logits_V[seen] = torch.where(
                value < 0, value * sampling.repetition_penalty, value / sampling.repetition_penalty
            )
        if sampling.no_repeat_ngram_size is not None:
            logits_V[_completing(text, sampling.no_repeat_ngram_size)] = float("-inf")
        if new_tokens[row] < sampling.min_new_tokens:
            logits_V[list(stop_ids)] = float("-inf")
    return logits_BV


def choose(logits_BV: torch.Tensor, sampling: Sampling, draws_B: torch.Tensor) -> torch.Tensor:
    """int64 tokens [B]: for each row the one whose share of the kept probability its uniform draw falls in."""
    if sampling.temperature == 0:
        return logits_BV.float().argmax(-1)  # in bf16 it takes four times as long
    kept_BV, candidates_BV = kept(logits_BV, sampling)
    cumulative_BV = kept_BV.softmax(-1).double().cumsum(-1)
    place_B1 = torch.searchsorted(cumulative_BV, draws_B[:, None] * cumulative_BV[:, -1:], right=True)
    place_B1 = place_B1.clamp(max=kept_BV.shape[-1] - 1)
    return (place_B1 if candidates_BV is None else candidates_BV.gather(1, place_B1))[:, 0]


def kept(logits_BV: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits at the sampling's temperature, -inf where it drops a token, and which token each column is.

    Columns are candidates from the likeliest down, or the whole vocabulary in its order (then the second is None).
    """
    logits_BV = logits_BV.float() / sampling.temperature
    filters = (sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p)
    if all(value is None for value in filters):
        return logits_BV, None
    vocab_size = logits_BV.shape[-1]
    count = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
    logits_BV, candidates_BV = logits_BV.topk(count, dim=-1)
    if sampling.top_p is not None:
        p_BV = logits_BV.softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV  # the likeliest stays even when it alone exceeds top_p
        logits_BV = logits_BV.masked_fill(before_BV >= sampling.top_p, float("-inf"))
    if sampling.min_p is not None:
        p_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(p_BV < sampling.min_p * p_BV[:, :1], float("-inf"))
    if sampling.typical_p is not None and sampling.typical_p < 1:
        logits_BV = _typical(logits_BV, sampling.typical_p)
    return logits_BV, candidates_BV


def _typical(logits_BV: torch.Tensor, mass: float) -> torch.Tensor:
    """Without the tokens whose surprise is far from the entropy, beyond those that reach `mass` together."""
    log_p_BV = logits_BV.log_softmax(-1)
    p_BV = log_p_BV.exp()
    entropy_B1 = -(p_BV * log_p_BV).nansum(-1, keepdim=True)
    distance_BV, order_BV = (-log_p_BV - entropy_B1).abs().sort(-1)
    reached_BV = p_BV.gather(1, order_BV).cumsum(-1)
    last_B1 = (reached_BV < mass).sum(-1, keepdim=True).clamp(max=reached_BV.shape[-1] - 1)
    dropped_BV = (distance_BV > distance_BV.gather(1, last_B1)).scatter(
        1, order_BV, distance_BV > distance_BV.gather(1, last_B1)
    )
    return logits_BV.masked_fill(dropped_BV, float("-inf"))


def _completing(text: Sequence[int], size: int) -> list[int]:
    """Tokens that would end a run of `size` tokens that stands in the text already."""
    beginning = list(text[len(text) - size + 1 :])
    places = range(len(text) - size + 1)
    return [text[at + size - 1] for at in places if list(text[at : at + size - 1]) == beginning]
