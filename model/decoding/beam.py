"""Beam search (Graves 2012; Wu et al. 2016, https://arxiv.org/abs/1609.08144): the tokens of transformers' `generate`.

It knows two things of a model: a function from the last tokens to the next logits, and a cache whose rows can be
reordered. So it serves decoders, encoder-decoders and recurrent states alike.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from conf.refusal import Refusal
from model.architecture import Transformer
from model.decoding.generate import budget, read_prompts
from model.decoding.joined import arranged_products
from model.decoding.packed import Packing
from model.decoding.sampling import Sampling, allowed
from model.frontends.base import Source


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """Beam search."""

    beams: int = 4
    """Continuations that are followed at a time."""
    length_penalty: float = 1.0
    """A finished text's log-probability is divided by its length to this power; 0 leaves it."""
    early_stopping: bool | Literal["never"] = False
    """true: end as soon as `beams` texts are finished; false: when no running one could beat the worst of them at its
    present length; never: when none could at any length, by the bound transformers uses."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise Refusal("beams", self.beams, "follow at least one continuation")
        if self.early_stopping not in (True, False, "never"):
            raise Refusal("early_stopping", self.early_stopping, "it is true, false or never")


@dataclass(frozen=True)
class Hypothesis:
    """A finished text's new tokens, without the stop id that ended it, and its penalised log-probability."""

    tokens: list[int]
    score: float


class Reorderable(Protocol):
    """What beam search asks of a cache."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was; rows may be dropped or repeated."""


@torch.inference_mode()
def beam_generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    beam: BeamConfig,
    *,
    stop_ids: Collection[int] = (),
    sources: Sequence[Source] | None = None,
) -> list[list[Hypothesis]]:
    """For every prompt its best continuations, `beams` at most, the best first; `sources` as `generate` takes them.

    Of `sampling` count the lengths and whatever depends on the text so far; nothing is drawn.
    """
    if not prompts:
        return []
    budgets = [budget(model, prompt, row, sampling.max_new_tokens) for row, prompt in enumerate(prompts)]
    was_training = model.training
    model.eval()
    try:
        with arranged_products(model, Packing(len(prompts) * beam.beams, max(budgets))):
            cache, logits_BV = read_prompts(model, prompts, budgets, sources=sources)
            return search(
                lambda last_B: model(last_B[:, None], cache=cache)["logits"][:, 0],
                cache,
                logits_BV,
                beam,
                budgets=budgets,
                stop_ids=stop_ids,
                sampling=sampling,
                prompts=prompts,
            )
    finally:
        model.train(was_training)


@dataclass
class _Item:
    """One prompt's search."""

    number: int
    running: list[tuple[float, list[int]]]
    finished: list[Hypothesis] = field(default_factory=list)


def search(
    next_logits: Callable[[torch.Tensor], torch.Tensor],
    cache: Reorderable,
    logits_BV: torch.Tensor,
    beam: BeamConfig,
    *,
    budgets: Sequence[int],
    stop_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[list[Hypothesis]]:
    """The best continuations of every row of a batch whose first part has been read.

    next_logits: int64 tokens [rows] -> logits [rows, V], continuing what the cache remembers. logits_BV: what follows
    the first part. budgets: how many tokens each row may get. prompts: its tokens, for penalties that read the text.
    """
    log_p_BV = logits_BV.float().log_softmax(-1)
    items = [_Item(number, [(0.0, [])]) for number in range(len(budgets))]
    done: dict[int, list[Hypothesis]] = {}
    while True:
        if sampling is not None and sampling.reads_text:
            before = prompts or [[]] * len(budgets)
            texts = [[*before[item.number], *tokens] for item in items for _, tokens in item.running]
            new = [len(tokens) for item in items for _, tokens in item.running]
            log_p_BV = allowed(log_p_BV, texts, new, sampling, stop_ids)
        rows: list[int] = []
        start, remaining = 0, []
        for item in items:
            end = start + len(item.running)
            beams = _extend(item, log_p_BV[start:end], beam, budgets[item.number], stop_ids)
            if beams:
                rows += [start + came_from for came_from in beams]
                remaining.append(item)
            else:
                done[item.number] = item.finished
            start = end
        items = remaining
        if not items:
            return [done[number] for number in range(len(budgets))]
        cache.reorder(rows)
        last = [tokens[-1] for item in items for _, tokens in item.running]
        log_p_BV = next_logits(torch.tensor(last, device=log_p_BV.device)).float().log_softmax(-1)


def _extend(
    item: _Item, log_p_BV: torch.Tensor, beam: BeamConfig, budget_tokens: int, stop_ids: Collection[int]
) -> list[int]:
    """Let one prompt's beams grow by a token: which beam each new one came from, none once the search is over."""
    scores_B = torch.tensor([score for score, _ in item.running], device=log_p_BV.device)
    totals_N = (log_p_BV + scores_B[:, None]).flatten()
    # As many as leave `beams` to go on with, whichever of them end here.
    wanted = min(max(2, 1 + len(stop_ids)) * beam.beams, totals_N.numel())
    best, places = totals_N.topk(wanted)
    length = len(item.running[0][1]) + 1
    running: list[tuple[float, list[int]]] = []
    came_from: list[int] = []
    for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
        source, token = divmod(place, log_p_BV.shape[-1])
        tokens = item.running[source][1]
        if token in stop_ids or length == budget_tokens:
            if rank < beam.beams and total > float("-inf"):
                text = tokens if token in stop_ids else [*tokens, token]
                item.finished.append(Hypothesis(text, total / length**beam.length_penalty))
        elif len(running) < beam.beams:
            running.append((total, [*tokens, token]))
            came_from.append(source)
    item.finished = sorted(item.finished, key=lambda text: -text.score)[: beam.beams]
    if not running or _settled(item.finished, running[0][0], length, beam, budget_tokens):
        return []
    item.running = running
    return came_from


def _settled(finished: list[Hypothesis], best: float, length: int, beam: BeamConfig, budget_tokens: int) -> bool:
    """Whether the finished texts are final: enough of them, and none running that is expected to do better."""
    if len(finished) < beam.beams:
        return False
    if beam.early_stopping is True:
        return True
    longest = budget_tokens if beam.early_stopping == "never" and beam.length_penalty > 0 else length
    return best / longest**beam.length_penalty <= finished[-1].score
