"""Losses that make a small model compute what a large one does: pure functions of what both computed."""

import torch

from conf.refusal import NO_VALUE, Refusal


def logit_distillation(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, *, temperature: float = 1.0, valid_N: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 Σ over tokens of T² KL(teacher || student), both softened by temperature T (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531); the factor keeps gradients as large at any T.

    valid_N: bool, which tokens count; divide by their number for a mean. No gradient reaches the teacher. Raises
    Refusal for other vocabularies or a temperature that is not positive.
    """
    if student_NV.shape != teacher_NV.shape:
        raise Refusal(
            "model",
            NO_VALUE,
            (
                f"the student's logits are {list(student_NV.shape)}, the teacher's "
                f"{list(teacher_NV.shape)}: both need the same tokens and the same vocabulary"
            ),
            "use the teacher's tokenizer",
        )
    if temperature <= 0:
        raise Refusal(
            "temperature",
            temperature,
            "logits are divided by it",
            "use 1 for none, 2 to 4 to soften",
        )
    student_log_p_NV = (student_NV.float() / temperature).log_softmax(-1)
    teacher_log_p_NV = (teacher_NV.detach().float() / temperature).log_softmax(-1)
    divergence_N = (teacher_log_p_NV.exp() * (teacher_log_p_NV - student_log_p_NV)).sum(-1)
    return temperature**2 * _total(divergence_N, valid_N)


def hidden_distillation(
    student_ND: torch.Tensor,
    teacher_ND: torch.Tensor,
    *,
    kind: str = "mse",
    projection_DD: torch.Tensor | None = None,
    valid_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 Σ over tokens of the distance between hidden states of a layer of each.

    kind: `mse`, the mean square over channels (TinyBERT, Jiao et al. 2020, https://arxiv.org/abs/1909.10351), or
    `cosine`, one minus the cosine (DistilBERT, Sanh et al. 2019, https://arxiv.org/abs/1910.01108).
    projection_DD: [teacher's width, student's width], learned with the student where the widths differ.
    """
    if kind not in ("mse", "cosine"):
        raise Refusal("kind", kind, "hidden states are compared by mse or cosine")
    if projection_DD is not None:
        student_ND = torch.nn.functional.linear(student_ND, projection_DD)
    if student_ND.shape != teacher_ND.shape:
        raise Refusal(
            "model",
            NO_VALUE,
            f"the student's states are {list(student_ND.shape)}, the teacher's {list(teacher_ND.shape)}",
            "give a projection of [teacher's width, student's width]",
        )
    student_ND, teacher_ND = student_ND.float(), teacher_ND.detach().float()
    if kind == "mse":
        return _total((student_ND - teacher_ND).square().mean(-1), valid_N)
    return _total(1 - torch.nn.functional.cosine_similarity(student_ND, teacher_ND, dim=-1), valid_N)


def _total(loss_N: torch.Tensor, valid_N: torch.Tensor | None) -> torch.Tensor:
    return loss_N.sum() if valid_N is None else torch.where(valid_N, loss_N, 0.0).sum()
