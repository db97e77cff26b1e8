"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), RoBERTa (Liu et al. 2019,
https://arxiv.org/abs/1907.11692) and DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108), with their heads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Family, Setting, Weight

_ENCODER = {
    "causal": False,
    "encoder": None,
    "tie_embeddings": True,
    "layout": "post",
    "pattern": (),
    "norm.kind": "layer",
    "norm.bias": True,
    "frontend.kind": "tokens",
    "frontend.norm": True,
    "frontend.scale_by_sqrt_width": False,
    "position.kind": "learned",
    "mixer.kind": "attention",
    "mixer.qkv_bias": True,
    "mixer.out_bias": True,
    "mixer.n_kv_heads": None,
    "mixer.head_dim": None,
    "mixer.qk_norm": False,
    "mixer.window": None,
    "mixer.scaled": True,
    "ffn.kind": "dense",
    "ffn.gated": False,
    "ffn.bias": True,
    "logit_soft_cap": None,
}
_LANGUAGE = {"head.kind": "language", "head.bias": True, "head.scale_input": False}
_OLDER_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_CLASSES = Setting("num_labels", ("head.classes",), 2)


def _with_num_labels(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`num_labels` said by itself, where only names of the labels are stored."""
    return {"num_labels": len(theirs["id2label"]), **theirs} if theirs.get("id2label") else theirs


def bert_weights(base: str) -> tuple[Weight, ...]:
    """The key map of BERT's tower, whose tensors begin with `base`."""
    layer = f"{base}.encoder.layer.{{layer}}"
    return (
        Weight(f"{base}.embeddings.word_embeddings.weight", ("frontend.tokens.weight",)),
        Weight(f"{base}.embeddings.position_embeddings.weight", ("frontend.positions.weight",)),
        Weight(f"{base}.embeddings.token_type_embeddings.weight", ("frontend.types.weight",)),
        *pairs(
            {
                f"{base}.embeddings.LayerNorm": "frontend.norm",
                f"{layer}.attention.self.query": f"{OURS}.mixer.q",
                f"{layer}.attention.self.key": f"{OURS}.mixer.k",
                f"{layer}.attention.self.value": f"{OURS}.mixer.v",
                f"{layer}.attention.output.dense": f"{OURS}.mixer.out",
                f"{layer}.attention.output.LayerNorm": f"{OURS}.mixer_norm",
                f"{layer}.intermediate.dense": f"{OURS}.ffn.up",
                f"{layer}.output.dense": f"{OURS}.ffn.down",
                f"{layer}.output.LayerNorm": f"{OURS}.ffn_norm",
            }
        ),
    )


_BERT_SETTINGS = (
    Setting("vocab_size", ("vocab_size",), 30522),
    Setting("hidden_size", ("d_model",), 768),
    Setting("num_hidden_layers", ("n_layers",), 12),
    Setting("num_attention_heads", ("mixer.n_heads",), 12),
    Setting("intermediate_size", ("ffn.d_ff",), 3072),
    Setting("hidden_dropout_prob", ("dropout",), 0.1),
    Setting("type_vocab_size", ("frontend.token_types",), 2),
    Setting("layer_norm_eps", ("norm.eps",), 1e-12),
)

BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    base_prefix="bert.",
    weights=(
        *bert_weights("bert"),
        *pairs(
            {
                "cls.predictions.transform.dense": "head.transform.dense",
                "cls.predictions.transform.LayerNorm": "head.transform.norm",
            }
        ),
        Weight("cls.predictions.decoder.weight", ("head.weight",)),
        Weight("cls.predictions.bias", ("head.bias",)),
    ),
    settings=(
        *_BERT_SETTINGS,
        Setting("max_position_embeddings", ("max_seq_len",), 512),
        Setting("hidden_act", ("ffn.activation", "head.transform"), "gelu", ACTIVATION_NAMES),
    ),
    fixed={**_ENCODER, **_LANGUAGE, "position.offset": 0},
    required=("frontend.token_types",),
    constants={
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    only_written={"attention_probs_dropout_prob": 0.0},
    ignored=(r"^cls\.seq_relationship\.", r"\.pooler\.", r"embeddings\.position_ids$"),
    renamed=_OLDER_NAMES,
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    token_ids={"pad_token_id": 0},
)
_BERT_BODY = dataclasses.replace(
    BERT,
    settings=(
        *_BERT_SETTINGS,
        Setting("max_position_embeddings", ("max_seq_len",), 512),
        Setting("hidden_act", ("ffn.activation",), "gelu", ACTIVATION_NAMES),
    ),
    copies={},
    ignored=(r"^cls\.", r"\.pooler\.", r"embeddings\.position_ids$"),
    modernised=_with_num_labels,
)

ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    base_prefix="roberta.",
    weights=(
        *bert_weights("roberta"),
        *pairs({"lm_head.dense": "head.transform.dense", "lm_head.layer_norm": "head.transform.norm"}),
        Weight("lm_head.decoder.weight", ("head.weight",)),
        Weight("lm_head.bias", ("head.bias",)),
    ),
    settings=(
        *_BERT_SETTINGS,
        Setting("max_position_embeddings", ("max_seq_len",), 512, added=2),
        Setting("hidden_act", ("ffn.activation",), "gelu", ACTIVATION_NAMES),
    ),
    fixed={**_ENCODER, **_LANGUAGE, "head.transform": "gelu", "position.offset": 2},
    constants={**BERT.constants, "pad_token_id": 1},  # positions are counted from the row after the padding's
    ignored=(r"\.pooler\.", r"embeddings\.position_ids$"),
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    token_ids={"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
)
_ROBERTA_BODY = dataclasses.replace(
    ROBERTA, copies={}, ignored=(r"^lm_head\.", *ROBERTA.ignored), modernised=_with_num_labels
)

_DISTILBERT = "distilbert.transformer.layer.{layer}"
_DISTILBERT_WEIGHTS = (
    Weight("distilbert.embeddings.word_embeddings.weight", ("frontend.tokens.weight",)),
    Weight("distilbert.embeddings.position_embeddings.weight", ("frontend.positions.weight",)),
    *pairs(
        {
            "distilbert.embeddings.LayerNorm": "frontend.norm",
            f"{_DISTILBERT}.attention.q_lin": f"{OURS}.mixer.q",
            f"{_DISTILBERT}.attention.k_lin": f"{OURS}.mixer.k",
            f"{_DISTILBERT}.attention.v_lin": f"{OURS}.mixer.v",
            f"{_DISTILBERT}.attention.out_lin": f"{OURS}.mixer.out",
            f"{_DISTILBERT}.sa_layer_norm": f"{OURS}.mixer_norm",
            f"{_DISTILBERT}.ffn.lin1": f"{OURS}.ffn.up",
            f"{_DISTILBERT}.ffn.lin2": f"{OURS}.ffn.down",
            f"{_DISTILBERT}.output_layer_norm": f"{OURS}.ffn_norm",
        }
    ),
)
_DISTILBERT_SETTINGS = (
    Setting("vocab_size", ("vocab_size",), 30522),
    Setting("dim", ("d_model",), 768),
    Setting("n_layers", ("n_layers",), 6),
    Setting("n_heads", ("mixer.n_heads",), 12),
    Setting("hidden_dim", ("ffn.d_ff",), 3072),
    Setting("dropout", ("dropout",), 0.1),
    Setting("max_position_embeddings", ("max_seq_len",), 512),
)

DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertForMaskedLM",
    base_prefix="distilbert.",
    weights=(
        *_DISTILBERT_WEIGHTS,
        *pairs({"vocab_transform": "head.transform.dense", "vocab_layer_norm": "head.transform.norm"}),
        Weight("vocab_projector.weight", ("head.weight",)),
        Weight("vocab_projector.bias", ("head.bias",)),
    ),
    settings=(
        *_DISTILBERT_SETTINGS,
        Setting("activation", ("ffn.activation", "head.transform"), "gelu", ACTIVATION_NAMES),
    ),
    fixed={**_ENCODER, **_LANGUAGE, "norm.eps": 1e-12, "frontend.token_types": 0, "position.offset": 0},
    constants={"tie_word_embeddings": True, "sinusoidal_pos_embds": False},
    only_written={"attention_dropout": 0.0},
    ignored=(r"embeddings\.position_ids$",),
    renamed=_OLDER_NAMES,
    token_ids={"pad_token_id": 0},
)
_DISTILBERT_BODY = dataclasses.replace(
    DISTILBERT,
    settings=(*_DISTILBERT_SETTINGS, Setting("activation", ("ffn.activation",), "gelu", ACTIVATION_NAMES)),
    ignored=(*DISTILBERT.ignored, r"^vocab_"),
    modernised=_with_num_labels,
)


def _with_heads(
    body: Family, name: str, body_weights: tuple[Weight, ...], fixed: Mapping[str, Any], classifier: Mapping[str, str]
) -> tuple[Family, ...]:
    """The classes of one kin that classify rows, classify tokens and extract spans."""
    classifies = {"head.kind": "classifier", "head.pool": "first"}
    return (
        dataclasses.replace(
            body,
            architecture=f"{name}ForSequenceClassification",
            weights=(*body_weights, *pairs(classifier)),
            settings=(*body.settings, _CLASSES),
            fixed={**fixed, **classifies, "head.hidden": "relu" if name == "DistilBert" else "tanh"},
            ignored=tuple(rule for rule in body.ignored if "pooler" not in rule or name != "Bert"),
        ),
        dataclasses.replace(
            body,
            architecture=f"{name}ForTokenClassification",
            weights=(*body_weights, *pairs({"classifier": "head.out"})),
            settings=(*body.settings, _CLASSES),
            fixed={**fixed, "head.kind": "token_classifier"},
        ),
        dataclasses.replace(
            body,
            architecture=f"{name}ForQuestionAnswering",
            weights=(*body_weights, *pairs({"qa_outputs": "head.out"})),
            fixed={**fixed, "head.kind": "span"},
        ),
    )


BERT_KIN = (
    DISTILBERT,
    *_with_heads(
        _DISTILBERT_BODY,
        "DistilBert",
        _DISTILBERT_WEIGHTS,
        {**_ENCODER, "norm.eps": 1e-12, "frontend.token_types": 0, "position.offset": 0},
        {"pre_classifier": "head.hidden", "classifier": "head.out"},
    ),
    ROBERTA,
    *_with_heads(
        _ROBERTA_BODY,
        "Roberta",
        bert_weights("roberta"),
        {**_ENCODER, "position.offset": 2},
        {"classifier.dense": "head.hidden", "classifier.out_proj": "head.out"},
    ),
    BERT,
    *_with_heads(
        _BERT_BODY,
        "Bert",
        bert_weights("bert"),
        {**_ENCODER, "position.offset": 0},
        {"bert.pooler.dense": "head.hidden", "classifier": "head.out"},
    ),
)
