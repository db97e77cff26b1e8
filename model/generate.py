"""Continuing prompts token by token, many at once, with a key/value cache."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from model.architectures import Transformer
from model.cache import Cache
from model.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    max_new_tokens: at most this many for each prompt. temperature: 0 takes the likeliest token.
    top_k: choose among the k likeliest; top_p: among the likeliest that together reach this probability (Holtzman et
    al. 2020). seed: with a prompt's place in the list, decides its draws; what else is in the batch does not.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens is {self.max_new_tokens}: ask for at least one token.")
        if self.temperature < 0:
            raise ModelError(f"temperature is {self.temperature}: use 0 for the likeliest token, or above 0 to sample.")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"top_k is {self.top_k}: keep at least one candidate, or null for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}: it is a probability above 0 and at most 1, or null for all.")


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The continuation of every prompt, without the prompt and without the stop id that ended it.

    A row ends at `max_new_tokens`, at the model's `max_seq_len`, at a token of `stop_ids`, or when `stop`, called with
    the row's new tokens so far, returns true (then its last token stays). `on_token(row, token)` is called for every
    token that stays, in order. Raises ModelError for an empty prompt or one that fills the model's context.
    """
    if not prompts:
        return []
    budgets = [_budget(model, prompt, row, sampling) for row, prompt in enumerate(prompts)]
    lengths = [len(prompt) for prompt in prompts]
    draws_BT = _uniform_draws(sampling, len(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(len(prompts), max(length + new for length, new in zip(lengths, budgets, strict=True)))
        logits_BV = _read_prompts(model, prompts, cache)
        rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
        for step in range(max(budgets)):
            next_B = choose(logits_BV, sampling, draws_BT[rows, step].to(logits_BV.device))
            running = []
            for place, (row, token) in enumerate(zip(rows, next_B.tolist(), strict=True)):
                if token in stop_ids:
                    continue
                texts[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if len(texts[row]) < budgets[row] and not (stop is not None and stop(texts[row])):
                    running.append(place)
            if not running:
                break
            if len(running) < len(rows):  # a finished row costs nothing from here on
                cache.reorder(running)
                rows, next_B = [rows[place] for place in running], next_B[running]
            logits_BV = model(next_B[:, None], cache=cache)["logits"][:, 0]
    finally:
        model.train(was_training)
    return texts


def choose(logits_BV: torch.Tensor, sampling: Sampling, draws_B: torch.Tensor) -> torch.Tensor:
    """int64 tokens [B]: for each row the one whose share of the kept probability its uniform draw falls in."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / sampling.temperature
    vocab_size = logits_BV.shape[-1]
    candidates_BV: torch.Tensor | None = None
    if sampling.top_k is not None or sampling.top_p is not None:
        kept = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
        logits_BV, candidates_BV = logits_BV.topk(kept, dim=-1)
    p_BV = logits_BV.softmax(-1)
    if sampling.top_p is not None:
        before_BV = p_BV.cumsum(-1) - p_BV  # the likeliest stays even when it alone exceeds top_p
        p_BV = p_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    cumulative_BV = p_BV.double().cumsum(-1)
    place_B1 = torch.searchsorted(cumulative_BV, draws_B[:, None] * cumulative_BV[:, -1:], right=True)
    place_B1 = place_B1.clamp(max=p_BV.shape[-1] - 1)
    return (place_B1 if candidates_BV is None else candidates_BV.gather(1, place_B1))[:, 0]


def _budget(model: Transformer, prompt: Sequence[int], row: int, sampling: Sampling) -> int:
    if not prompt:
        raise ModelError(f"prompt {row} has no tokens: a model continues something; start it with the <s> token.")
    room = model.config.max_seq_len - len(prompt)
    if room < 1:
        raise ModelError(
            f"prompt {row} has {len(prompt)} tokens: the model's max_seq_len is {model.config.max_seq_len}, which must "
            "leave room for at least one more; shorten the prompt."
        )
    return min(room, sampling.max_new_tokens)


def _read_prompts(model: Transformer, prompts: Sequence[Sequence[int]], cache: Cache) -> torch.Tensor:
    """Fill the cache with all prompts in one pass; the logits [B, V] after the last token of each.

    Short prompts are padded behind their end, where causality hides the padding from every real token; it is not
    remembered, and its slots are overwritten by what is generated.
    """
    lengths = [len(prompt) for prompt in prompts]
    padded = [list(prompt) + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    last_B = torch.tensor(lengths, device=cache.device) - 1
    tokens_BT = torch.tensor(padded, device=cache.device)
    logits_BV: torch.Tensor = model(tokens_BT, cache=cache, lengths=lengths, logits_for=last_B)["logits"][:, 0]
    return logits_BV


def _uniform_draws(sampling: Sampling, rows: int) -> torch.Tensor:
    """fp64 [rows, max_new_tokens] in [0, 1): each row from its own generator."""
    if sampling.temperature == 0:
        return torch.zeros(rows, sampling.max_new_tokens, dtype=torch.float64)
    draws = []
    for row in range(rows):
        key = hashlib.sha256(f"{sampling.seed}/{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
        draws.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(draws)
