"""Continuing prompts token by token, many at once, with a cache."""

import hashlib
from collections.abc import Callable, Collection, Sequence

import torch

from conf.refusal import NO_VALUE, Refusal
from model.architecture import Transformer
from model.decoding.cache import Cache
from model.decoding.joined import arranged_products
from model.decoding.packed import Packing
from model.decoding.sampling import Sampling, allowed, choose
from model.frontends.base import Source
from model.inputs import ENCODER

__all__ = ["Sampling", "choose", "generate", "read_prompts", "unpadded"]

SHARED_TOKENS = 64
"""Prompts that begin alike are begun once where that spares at least so many tokens."""


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    static: bool = False,
    sources: Sequence[Source] | None = None,
) -> list[list[int]]:
    """The continuation of every prompt, without the prompt and without the stop id that ended it.

    A row ends at `max_new_tokens`, at the model's `max_seq_len`, at a token of `stop_ids`, or when `stop`, called with
    the row's new tokens so far, returns true (then its last token stays). `on_token(row, token)` is called for every
    token that stays, in order. The same prompt several times is read once and continued by different draws.
    static: every step has the same shapes (see `Cache`), for compiled models and CUDA graphs.
    sources: what the encoder of an encoder-decoder reads for each prompt: tokens, mel frames [A, W], pixels [A, Y, X] or
    samples [W], as its frontend takes them; the prompt is then what its decoder starts from, `decoder_start_token_id` in
    the words of transformers, or for Whisper the tokens of language and task.
    Raises Refusal for an empty prompt or one that fills the model's context, and for sources that cannot be batched.
    """
    if not prompts:
        return []
    budgets = [budget(model, prompt, row, sampling.max_new_tokens) for row, prompt in enumerate(prompts)]
    draws_BT = _uniform_draws(sampling, len(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        packing = Packing() if static else Packing(len(prompts), max(budgets))  # compiled steps read weights as stored
        with arranged_products(model, packing):
            cache, logits_BV = read_prompts(model, prompts, budgets, static=static, sources=sources)
            rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
            for step in range(max(budgets)):
                if sampling.reads_text:
                    whole = [[*prompts[row], *texts[row]] for row in rows]
                    logits_BV = allowed(logits_BV, whole, [step] * len(rows), sampling, stop_ids)
                draws_B = draws_BT[rows, step] if sampling.temperature else draws_BT[0]
                next_B = choose(logits_BV, sampling, draws_B.to(logits_BV.device))
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
                if len(running) < len(rows) and not static:  # a finished row costs nothing from here on
                    cache.reorder(running)
                    rows, next_B = [rows[place] for place in running], next_B[running]
                logits_BV = model(next_B[:, None], cache=cache)["logits"][:, 0]
    finally:
        model.train(was_training)
    return texts


def unpadded(tokens_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> list[list[int]]:
    """The prompts of a padded batch, on whichever side it is padded: tokens whose mask is 1, as `generate` takes them."""
    pairs = zip(tokens_BT, attention_mask_BT, strict=True)
    return [tokens_T[mask_T.bool()].tolist() for tokens_T, mask_T in pairs]


def budget(model: Transformer, prompt: Sequence[int], row: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt. Raises Refusal for an empty one, or one that leaves no room."""
    if not prompt:
        raise Refusal(
            "model", NO_VALUE, f"prompt {row} has no tokens: a model continues something", "start it with the <s> token"
        )
    room = model.config.max_seq_len - len(prompt) - (0 if model.prefix is None else model.prefix.tokens)
    if room < 1:
        raise Refusal(
            "model",
            NO_VALUE,
            (
                f"prompt {row} has {len(prompt)} tokens: the model's max_seq_len is "
                f"{model.config.max_seq_len}, which must leave room for at least one more"
            ),
            "shorten the prompt",
        )
    return min(room, max_new_tokens)


def read_prompts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    *,
    static: bool = False,
    sources: Sequence[Source] | None = None,
) -> tuple[Cache, torch.Tensor]:
    """(a cache that holds every prompt, with room for `budgets[i]` more tokens; the logits [B, V] that follow each).

    Equal prompts are read once, and so is what all begin with. Short prompts are padded behind their end, where
    causality hides the padding from every real token; it is not remembered, and its slots are overwritten by what is
    generated. sources: what the encoder reads for each prompt.
    """
    room = max(len(prompt) + new for prompt, new in zip(prompts, budgets, strict=True))
    pairs = [(tuple(prompt), _same(sources[row]) if sources else ()) for row, prompt in enumerate(prompts)]
    distinct_pairs = list(dict.fromkeys(pairs))
    distinct = [prompt for prompt, _ in distinct_pairs]
    shared = 0 if sources else min(_common_prefix(distinct), min(map(len, distinct)) - 1)
    if shared * (len(distinct) - 1) < SHARED_TOKENS:
        cache = model.new_cache(len(distinct), room, static=static)
        shared = 0
    else:
        cache = model.new_cache(1, room, static=static)
        model(torch.tensor([distinct[0][:shared]], device=cache.device), cache=cache, logits_for="last")
        cache.reorder([0] * len(distinct))
    lengths = [len(prompt) - shared for prompt in distinct]
    padded = [
        [*prompt[shared:], *[0] * (max(lengths) - length)] for prompt, length in zip(distinct, lengths, strict=True)
    ]
    last_B = torch.tensor(lengths, device=cache.device) - 1
    tokens_BT = torch.tensor(padded, device=cache.device)
    read: dict[str, torch.Tensor] = {}
    if sources is not None:
        read = _encoder_inputs(model, [sources[pairs.index(pair)] for pair in distinct_pairs], cache.device)
    logits_BV = model(tokens_BT, cache=cache, lengths=lengths, logits_for=last_B, **read)["logits"][:, 0]
    if len(distinct) < len(prompts):
        places = {pair: place for place, pair in enumerate(distinct_pairs)}
        rows = [places[pair] for pair in pairs]
        cache.reorder(rows)
        logits_BV = logits_BV[rows]
    return cache, logits_BV


def _encoder_inputs(model: Transformer, sources: Sequence[Source], device: torch.device) -> dict[str, torch.Tensor]:
    """What the encoder reads, under the names that the decoder hands on."""
    if model.encoder is None:
        raise Refusal(
            "model",
            NO_VALUE,
            "sources were given, but the model has no encoder to read them",
            "put them into the prompts",
        )
    return {f"{ENCODER}{name}": row for name, row in model.encoder.frontend.batched(sources, device).items()}


def _same(source: Source) -> tuple[int, ...]:
    """Equal for equal texts, and for a tensor given again."""
    return (id(source),) if isinstance(source, torch.Tensor) else tuple(source)


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of them begin with."""
    first, last = min(prompts), max(prompts)  # in lexical order the two that differ earliest
    pairs = enumerate(zip(first, last, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(last)))


def _uniform_draws(sampling: Sampling, rows: int) -> torch.Tensor:
    """fp64 [rows, max_new_tokens] in [0, 1): each row from its own generator; where nothing is drawn, [1, 0]."""
    if sampling.temperature == 0:
        return torch.empty(1, 0, dtype=torch.float64)
    draws = []
    for row in range(rows):
        key = hashlib.sha256(f"{sampling.seed}/{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
        draws.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(draws)
