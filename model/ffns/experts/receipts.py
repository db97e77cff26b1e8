"""What routing did, in counts that add up: over micro-batches, over ranks, whatever was computed twice.

A forward pass with targets returns the counts of each layer of experts beside the loss. Recomputation in the backward
pass returns its own, which nobody adds.
"""

import math
from collections.abc import Callable, Mapping

import torch

from model.slots import Record

TOKENS, LOAD, KEPT = "routed_tokens", "expert_load", "expert_kept"


def routing_counts(records: list[Record], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"routed_tokens", "expert_load.3": [E], "expert_kept.3": [E] …} of the layers that have experts, else {}."""
    counts: dict[str, torch.Tensor] = {}
    for layer, record in enumerate(records):
        if "load_E" in record:
            counts |= {TOKENS: tokens, f"{LOAD}.{layer}": record["load_E"], f"{KEPT}.{layer}": record["kept_E"]}
    return counts


def with_encoders(heard: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an encoder told of its routing, its layers named `encoder.3`, and what the decoder tells of its own; their
    auxiliary losses added up."""
    both = {}
    for name, told in heard.items():
        kind, _, layer = name.partition(".")
        both[f"{kind}.encoder{'.' if layer else ''}{layer}" if is_count(name) else name] = told
    for name, told in own.items():
        both[name] = told + both[name] if name in both else told
    return both


def is_count(key: str) -> bool:
    """Whether a key of a forward pass's result is one of `routing_counts`."""
    return key.split(".")[0] in (TOKENS, LOAD, KEPT)


def loads(counts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """load_E of every layer that has experts, by its name: `3`, or `encoder.3`."""
    return {key.partition(".")[2]: load_E for key, load_E in counts.items() if key.startswith(f"{LOAD}.")}


def receipts(counts: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """For each layer of experts, as `routing/LAYER/NAME` (LAYER is `3`, or `encoder.3`):

    load_entropy: of the shares of choices, 1 where all experts are wanted equally, 0 where one is.
    drop_rate: choices that did not reach their expert. effective_k: experts that a token reached, on average.
    dead_experts: how many no token wanted.
    """
    rows: dict[str, float] = {}
    for layer, load_E in loads(counts).items():
        choices, kept = float(load_E.sum()), float(counts[f"{KEPT}.{layer}"].sum())
        tokens = float(counts[".".join((TOKENS, *layer.split(".")[:-1]))])
        share_E = load_E.double() / max(choices, 1.0)
        entropy = -float(torch.xlogy(share_E, share_E).sum())
        rows |= {
            f"routing/{layer}/load_entropy": entropy / math.log(len(load_E)) if len(load_E) > 1 else 1.0,
            f"routing/{layer}/drop_rate": 1 - kept / max(choices, 1.0),
            f"routing/{layer}/effective_k": kept / max(tokens, 1.0),
            f"routing/{layer}/dead_experts": int((load_E == 0).sum()),
        }
    return rows


def routing_outputs(
    records: list[Record], documents_BT: torch.Tensor | None, x_BTD: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Counts of what the layers routed, and "auxiliary_B", the sum of their auxiliary losses; {} where no layer has
    experts."""
    if not any(records):
        return {}
    places = x_BTD.shape[0] * x_BTD.shape[1]
    tokens = torch.full((), places, device=x_BTD.device) if documents_BT is None else (documents_BT != 0).sum()
    stats = routing_counts(records, tokens)
    losses = [record["auxiliary_B"] for record in records if "auxiliary_B" in record]
    return {**stats, "auxiliary_B": torch.stack(losses).sum(0)} if losses else stats


def auxiliary_outputs(
    loss_sum: torch.Tensor, stats: dict[str, torch.Tensor], row_targets: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Counts of routing, with the auxiliary losses in the gradient of `loss_sum`, not in its value, as the head
    does with its own.

    The losses are means over the tokens of a row, an encoder's over its own; a row weighs as many targets as it has. So
    they are a sum like Σ NLL: divided by the targets of all micro-batches and ranks it is the same whichever way rows
    are shared out.
    """
    counts = {name: tensor for name, tensor in stats.items() if name != "auxiliary_B"}
    if "auxiliary_B" not in stats:
        return counts
    auxiliary = (stats["auxiliary_B"] * row_targets()).sum()
    return {**counts, "loss_sum": loss_sum + (auxiliary - auxiliary.detach()), "aux_loss_sum": auxiliary.detach()}
