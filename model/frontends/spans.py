"""Which frames of a row are hidden, and which others one is to be told from: functions of (row, seed) alone.

masked_BT = masked_spans(keys_B, frames_B, frames=499, seed=epoch)
negatives_BTO = distractors(masked_BT, 100, keys_B, seed=epoch)
"""

import torch

from conf.refusal import NO_VALUE, Refusal
from model.noise import uniform

MASKS, OTHERS, CODES = range(1 << 20, (1 << 20) + 3)
"""What draws are for, in the place of a layer's number: no draw is used twice."""


def masked_spans(
    keys_B: torch.Tensor, frames_B: torch.Tensor, *, frames: int, seed: int, share: float = 0.065, span: int = 10
) -> torch.Tensor:
    """bool masked_BT of rows with `frames_B` real frames of `frames`: a share of these, rounded up, begin a span, and spans
    may overlap (wav2vec 2.0, Baevski et al. 2020, https://arxiv.org/abs/2006.11477, section 3.1).

    keys_B: `row_keys` of the rows. No span begins where it would pass the end of its row, if the row is longer than one.
    Raises Refusal for a share that is none, and for spans or rows of a single frame.
    """
    if not 0 < share <= 1 or span < 2 or int(frames_B.min()) < 2:
        raise Refusal(
            "model",
            NO_VALUE,
            (
                f"share is {share}, span {span}, and the shortest row has {int(frames_B.min())} frames: a "
                "part of a row of at least 2 frames begins spans of at least 2"
            ),
            "leave such recordings out, or use 0.065 and 10",
        )
    place_T = torch.arange(frames, device=keys_B.device)
    possible_BT = place_T <= (frames_B - span).clamp(min=0)[:, None]
    draws_BT = uniform(keys_B, seed=seed, layer=MASKS, tokens=frames, draws=1)[..., 0]
    rank_BT = draws_BT.masked_fill(~possible_BT, 2.0).argsort(stable=True).argsort()
    begins_BT = possible_BT & (rank_BT < (share * frames_B).ceil()[:, None])
    begun_BT = begins_BT.long().cumsum(1)
    within_BT = begun_BT > torch.nn.functional.pad(begun_BT, (span, 0))[:, :frames]
    return within_BT & (place_T < frames_B[:, None])


def distractors(masked_BT: torch.Tensor, count: int, keys_B: torch.Tensor, *, seed: int) -> torch.Tensor:
    """int64 negatives_BTO: for each masked frame, `count` places drawn evenly among the other masked ones of its row; 0 for
    other frames. keys_B: `row_keys` of the rows.

    Raises Refusal where fewer than two frames of a row are masked.
    """
    masked_B1 = masked_BT.sum(1, keepdim=True)
    if int(masked_B1.min()) < 2:
        raise Refusal(
            "model",
            NO_VALUE,
            f"{int(masked_B1.min())} frames of a row are masked",
            "one is told from others, so mask at least 2",
        )
    draws_BTO = uniform(keys_B, seed=seed, layer=OTHERS, tokens=masked_BT.shape[1], draws=count)
    drawn_BTO = (draws_BTO * (masked_B1 - 1)[..., None]).long()
    drawn_BTO += drawn_BTO >= masked_BT.long().cumsum(1)[..., None] - 1  # never the frame itself
    places_BT = (~masked_BT).long().argsort(dim=1, stable=True)  # masked ones first
    negatives_BTO = places_BT.gather(1, drawn_BTO.flatten(1).clamp(max=masked_BT.shape[1] - 1)).view_as(drawn_BTO)
    return negatives_BTO * masked_BT[..., None]
