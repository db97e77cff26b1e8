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
    rows, tokens, heads, _ = q_BTHP.shape
    q_BYUHP, k_BYUHP, v_BYUHC = (_chunks(t) for t in (q_BTHP, k_BTHP, v_BTHC))
    visible_UU = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q_BTHP.device).tril(0 if itself else -1)
    visible_BYUU = visible_UU[None, None]
    ending_BYU1 = entering_BYU1 = goes_on_BY = None
    if documents_BT is not None:
        padded = -(-tokens // CHUNK) * CHUNK - tokens
        number_BYU = torch.cat((documents_BT, documents_BT[:, -1:].expand(-1, padded)), 1).unflatten(1, (-1, CHUNK))
        last_BY = number_BYU[:, :, -1]
        entering_BY = torch.cat((number_BYU[:, :1, 0], last_BY[:, :-1]), dim=1)
        visible_BYUU = visible_BYUU & (number_BYU[..., :, None] == number_BYU[..., None, :])
        ending_BYU1 = (number_BYU == last_BY[..., None])[..., None, None]
        entering_BYU1 = (number_BYU == entering_BY[..., None])[..., None, None]
        goes_on_BY = last_BY == entering_BY
    scores_BYHUU = torch.einsum("byuhp,bywhp->byhuw", q_BYUHP, k_BYUHP) * visible_BYUU[:, :, None]
    out_BYUHC = torch.einsum("byhuw,bywhc->byuhc", scores_BYHUU, v_BYUHC)
    left_BYUHP = k_BYUHP if ending_BYU1 is None else k_BYUHP * ending_BYU1
    added_BYHPC = torch.einsum("byuhp,byuhc->byhpc", left_BYUHP, v_BYUHC)
    if state_BHPC is None:
        state_BHPC = torch.zeros_like(added_BYHPC[:, 0])
    entering = []
    for chunk in range(added_BYHPC.shape[1]):
        entering.append(state_BHPC)
        if goes_on_BY is not None:
            state_BHPC = state_BHPC * goes_on_BY[:, chunk, None, None, None]
        state_BHPC = state_BHPC + added_BYHPC[:, chunk]
    asking_BYUHP = q_BYUHP if entering_BYU1 is None else q_BYUHP * entering_BYU1
    out_BYUHC = out_BYUHC + torch.einsum("byuhp,byhpc->byuhc", asking_BYUHP, torch.stack(entering, dim=1))
    return out_BYUHC.reshape(rows, -1, heads, v_BTHC.shape[-1])[:, :tokens], state_BHPC


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
    """x_BYUHC, with zeros behind the end."""
    padded = -x_BTHC.shape[1] % CHUNK
    return torch.nn.functional.pad(x_BTHC, (0, 0, 0, 0, 0, padded)).unflatten(1, (-1, CHUNK))
