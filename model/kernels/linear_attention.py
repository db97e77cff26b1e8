"""Attention without softmax: Σ_s (q_t · k_s) v_s over features of queries and keys, in time and memory linear in tokens.

    S_t = S_(t-1) + k_t v_tᵀ          out_t = S_tᵀ q_t

A chunk of tokens at a time: within it by two products around a triangular mask, and from all chunks before it through
the state S. A document's tokens see none of another's: the state that enters a chunk is for the tokens of the document
that goes on there, and the one that leaves it holds the document that ends it.
"""

import torch

CHUNK = 64  # with 64 features and channels, what a chunk's products and its state cost is about equal


def causal_linear_attention(
    q_BTHP: torch.Tensor,
    k_BTHP: torch.Tensor,
    v_BTHC: torch.Tensor,
    documents_BT: torch.Tensor | None = None,
    state_BHPC: torch.Tensor | None = None,
    *,
    itself: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_BTHC, the state after the last token), fp32 throughout.

    documents_BT: a state that is given belongs to the first of them. itself: whether a token sees itself.
    """
    tokens = q_BTHP.shape[1]
    q_BHYUP, k_BHYUP, v_BHYUC = (_chunks(t) for t in (q_BTHP, k_BTHP, v_BTHC))
    visible_UU = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q_BTHP.device).tril(0 if itself else -1)
    if documents_BT is None:
        scores_BHYUU = (q_BHYUP @ k_BHYUP.mT) * visible_UU
        leaving_BHYUP, asking_BHYUP, goes_on_BY = k_BHYUP, q_BHYUP, None
    else:
        padded = -tokens % CHUNK
        number_BYU = torch.cat((documents_BT, documents_BT[:, -1:].expand(-1, padded)), 1).unflatten(1, (-1, CHUNK))
        last_BY = number_BYU[:, :, -1]
        entering_BY = torch.cat((number_BYU[:, :1, 0], last_BY[:, :-1]), dim=1)
        visible_BYUU = visible_UU & (number_BYU[..., :, None] == number_BYU[..., None, :])
        scores_BHYUU = (q_BHYUP @ k_BHYUP.mT) * visible_BYUU[:, None]
        leaving_BHYUP = k_BHYUP * (number_BYU == last_BY[..., None])[:, None, :, :, None]
        asking_BHYUP = q_BHYUP * (number_BYU == entering_BY[..., None])[:, None, :, :, None]
        goes_on_BY = last_BY == entering_BY
    added_BHYPC = leaving_BHYUP.mT @ v_BHYUC
    if state_BHPC is None:
        state_BHPC = torch.zeros_like(added_BHYPC[:, :, 0])
    entering = []
    for chunk in range(added_BHYPC.shape[2]):
        entering.append(state_BHPC)
        if goes_on_BY is not None:
            state_BHPC = state_BHPC * goes_on_BY[:, chunk, None, None, None]
        state_BHPC = state_BHPC + added_BHYPC[:, :, chunk]
    out_BHYUC = scores_BHYUU @ v_BHYUC + asking_BHYUP @ torch.stack(entering, dim=2)
    return out_BHYUC.flatten(2, 3).transpose(1, 2)[:, :tokens], state_BHPC


def bidirectional_linear_attention(
    q_BTHP: torch.Tensor, k_BTHP: torch.Tensor, v_BTHC: torch.Tensor, documents_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """out_BTHC where each token sees its whole document: what stands before it and itself, and what stands behind it."""
    if documents_BT is None:
        state_BHPC = torch.einsum("bthp,bthc->bhpc", k_BTHP, v_BTHC)
        return torch.einsum("bthp,bhpc->bthc", q_BTHP, state_BHPC)
    before_BTHC, _ = causal_linear_attention(q_BTHP, k_BTHP, v_BTHC, documents_BT)
    q_BTHP, k_BTHP, v_BTHC, documents_BT = (t.flip(1) for t in (q_BTHP, k_BTHP, v_BTHC, documents_BT))
    behind_BTHC, _ = causal_linear_attention(q_BTHP, k_BTHP, v_BTHC, documents_BT, itself=False)
    return before_BTHC + behind_BTHC.flip(1)


def recurrent_linear_attention(
    q_BTHP: torch.Tensor,
    k_BTHP: torch.Tensor,
    v_BTHC: torch.Tensor,
    starts_BT: torch.Tensor | None = None,
    state_BHPC: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token: the oracle, and the form for decoding, where there is only one token."""
    state_BHPC = q_BTHP.new_zeros(()) if state_BHPC is None else state_BHPC
    outputs = []
    for token in range(q_BTHP.shape[1]):
        if starts_BT is not None:
            state_BHPC = state_BHPC * ~starts_BT[:, token, None, None, None]
        state_BHPC = state_BHPC + k_BTHP[:, token, :, :, None] * v_BTHC[:, token, :, None]
        outputs.append((q_BTHP[:, token, :, None] @ state_BHPC)[:, :, 0])
    return torch.stack(outputs, dim=1), state_BHPC


def _chunks(x_BTHC: torch.Tensor) -> torch.Tensor:
    """x_BHYUC, with zeros behind the end."""
    padded_BHTC = torch.nn.functional.pad(x_BTHC.transpose(1, 2), (0, 0, 0, -x_BTHC.shape[1] % CHUNK))
    return padded_BHTC.contiguous().unflatten(2, (-1, CHUNK))
