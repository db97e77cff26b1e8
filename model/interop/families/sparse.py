"""Longformer (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150), RoBERTa with another attention, and BigBird
(Zaheer et al. 2020, https://arxiv.org/abs/2007.14062), BERT with another."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from model.interop.families.bert import BERT, ROBERTA, bert_weights
from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Setting

_LONGFORMER = "longformer.encoder.layer.{layer}.attention.self"


def _with_one_window(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`attention_window`, neighbours on both sides in each layer, as how far a token sees to one side, itself included."""
    neighbours = theirs.get("attention_window", 512)
    different = set(neighbours) if isinstance(neighbours, list | tuple) else {neighbours}
    if len(different) != 1:
        raise Refusal(
            "config.json",
            NO_VALUE,
            f"it has attention_window={neighbours!r}",
            "Longformer checkpoints with the same window in every layer can be imported",
        )
    return {**theirs, "attention_window": different.pop() // 2 + 1}


LONGFORMER = dataclasses.replace(
    ROBERTA,
    model_type="longformer",
    architecture="LongformerForMaskedLM",
    base_prefix="longformer.",
    weights=(
        *bert_weights("longformer"),
        *pairs(
            {
                f"{_LONGFORMER}.{theirs}_global": f"{OURS}.mixer.global_{ours}"
                for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
            }
        ),
        *(weight for weight in ROBERTA.weights if weight.theirs.startswith("lm_head.")),
    ),
    settings=(*ROBERTA.settings, Setting("attention_window", ("mixer.window",), written="mixer.neighbours")),
    fixed={
        **{path: value for path, value in ROBERTA.fixed.items() if not path.startswith("mixer.")},
        "mixer.kind": "longformer",
    },
    constants={key: ROBERTA.constants[key] for key in ("tie_word_embeddings", "pad_token_id")},
    modernised=_with_one_window,
)

BIGBIRD = dataclasses.replace(
    BERT,
    model_type="big_bird",
    architecture="BigBirdForMaskedLM",
    settings=(
        *(setting for setting in BERT.settings if setting.theirs not in ("max_position_embeddings", "hidden_act")),
        Setting("max_position_embeddings", ("max_seq_len",), 4096),
        Setting("hidden_act", ("ffn.activation", "head.transform"), "gelu_new", ACTIVATION_NAMES),
        Setting("rescale_embeddings", ("frontend.scale_by_sqrt_width",), False),
        Setting("use_bias", ("mixer.qkv_bias",), True),
        Setting("block_size", ("mixer.block",), 64),
        Setting("num_random_blocks", ("mixer.random_blocks",), 3),
    ),
    fixed={
        **{path: value for path, value in BERT.fixed.items() if not path.startswith(("mixer.", "frontend.scale"))},
        "mixer.kind": "bigbird",
        "mixer.drawn_in_eval": False,
    },
    constants={
        "tie_word_embeddings": True,
        "attention_type": "block_sparse",
        "is_decoder": False,
        "add_cross_attention": False,
    },
)
