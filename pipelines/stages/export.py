"""Export: the model as a Hugging Face folder, and the proof that transformers computes the same with it.

Writes model/ (safetensors, config.json, generation_config.json, the tokenizer's files with the chat template, README.md,
SHA256SUMS) and conformance.json (what was compared, and how large the differences were). A difference beyond rounding is
an error, and nothing is published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conf.refusal import Refusal, field
from pipelines.engine.step import Artifact, Context, Inputs
from pipelines.stages.checksums import write_checksums

if TYPE_CHECKING:
    from data.tokenizers.sentencepiece import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is exported, and how much it is compared on."""

    weights: Literal["last", "pretrain", "finetune"] = "last"
    """last: the fine-tuned model where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights on disk. The comparison is made with these weights, in fp32."""
    sample_documents: int = 4
    """Held-out documents that tokens, logits and greedy continuations are compared on."""
    generated_tokens: int = 32
    """Tokens of each greedy continuation that is compared."""

    def __post_init__(self) -> None:
        for name in ("sample_documents", "generated_tokens"):
            if getattr(self, name) < 1:
                raise Refusal(
                    name, getattr(self, name), "without a sample nothing is proven", f"set {field(name)}=1 or more"
                )


def run(settings: ExportSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: corpora, tokenizer, the models by training. Returns the figures of conformance.json.

    Raises Refusal where transformers gives other tokens, logits or continuations.
    """
    source = _source(settings, inputs["model"])
    corpora, tokenizer = [corpus for _, corpus in sorted(inputs["corpus"].items())], inputs.one("tokenizer")
    ctx.call(write_model, settings, source, tokenizer, out_dir / "model")
    report = ctx.call(compare, settings, source, tokenizer, corpora, out_dir / "model")
    if "compared_positions" not in report:
        ctx.log(
            "no Hugging Face class computes this model: exported in this program's own format, without transformers"
        )
    write_checksums(out_dir / "model")
    (out_dir / "conformance.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return {"exported": source.step, **{name: value for name, value in report.items() if not isinstance(value, list)}}


def write_model(settings: ExportSettings, source: Artifact, tokenizer: Artifact, folder: Path) -> None:
    """Write the folder. Runs in a worker: it imports torch."""
    from data.tokenizers.export import export_tokenizer
    from data.tokenizers.sentencepiece import SentencePieceTokenizer, Tokenizer
    from model.interop import has_hf_class, hf_config, load_pretrained, save_pretrained
    from pipelines.inference.weights import DTYPES

    config, state = load_pretrained(source.path / "model")
    pieces = Tokenizer.load(tokenizer.path)
    ids = {"bos_token_id": pieces.bos_id, "eos_token_id": pieces.eos_id, "pad_token_id": pieces.pad_id}
    if not config.causal and (rows_before := config.position.rows_before_first()):
        ids["pad_token_id"] = rows_before - 1  # RoBERTa counts positions from behind this id
    described = json.loads((source.path / "model" / "config.json").read_text(encoding="utf-8"))
    if config.encoder is not None and (begin := described.get("decoder_start_token_id")) is not None:
        ids["decoder_start_token_id"] = begin
    state = {name: tensor.to(DTYPES[settings.precision]) for name, tensor in state.items()}
    save_pretrained(state, config, folder, extra=ids)
    writes = config.causal and config.encoder is None
    if config.causal:
        # A document ends with </s>, a message with <|end|>: generation has to stop at either.
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if writes else {}
        ends = {"eos_token_id": list(dict.fromkeys((pieces.eos_id, pieces.end_id)))}
        _write_json(folder / "generation_config.json", {**ids, **ends, **sampling})
    export_tokenizer(tokenizer.path, folder, max_tokens=config.max_seq_len, left_padded=writes)
    origin = f"from step {source.step} ({source.digest[:16]})"
    if has_hf_class(config):
        name = hf_config(config)["architectures"][0]
        use = (TRANSFORMERS_USE if writes else OTHER_USE.replace("CLASS", name)).replace("BEGINS", _begins(pieces))
        use = use.replace("PROMPTS", SAFE_MESSAGES if isinstance(pieces, SentencePieceTokenizer) else UNSAFE_MESSAGES)
        card = f"# {name} {origin}\n\n{use.replace('ENDS', pieces.piece(pieces.end_id))}"
    else:
        card = f"# A model in this program's own format, {origin}\n\nNo Hugging Face class computes it.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def compare(
    settings: ExportSettings, source: Artifact, tokenizer: Artifact, corpora: list[Artifact], folder: Path
) -> dict[str, Any]:
    """Ours against transformers, in a worker: it imports both."""
    from pipelines.stages.conformance import check_export

    return check_export(
        source.path / "model",
        tokenizer.path,
        [corpus.path / "heldout" for corpus in corpora],
        folder,
        precision=settings.precision,
        sample_documents=settings.sample_documents,
        generated_tokens=settings.generated_tokens,
    )


def _begins(tokenizer: Tokenizer) -> str:
    """For the folder's README: what stands around a text."""
    from data.tokenizers.sentencepiece import SentencePieceTokenizer

    if isinstance(tokenizer, SentencePieceTokenizer):
        return "Texts begin with `<s>`, which the tokenizer adds."
    begin, end = map(tokenizer.piece, (tokenizer.bos_id, tokenizer.eos_id))
    return (
        f"The tokenizer is the one the weights came with. Documents began with `{begin}` here and ended with `{end}`, "
        "whether it adds them or not."
    )


def _source(settings: ExportSettings, models: Mapping[str, Artifact]) -> Artifact:
    if settings.weights == "last":
        return list(models.values())[-1]
    check_source(settings, models)
    return models[settings.weights]


def check_source(settings: ExportSettings, steps: Iterable[str]) -> None:
    """Raise Refusal if these weights do not exist."""
    if settings.weights not in ("last", *steps):
        raise Refusal(
            "export.weights",
            settings.weights,
            "this experiment has no such step",
            "set export.weights=last, or add fine-tuning with finetune=library",
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


TRANSFORMERS_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0], skip_special_tokens=True))
```

BEGINS Messages: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`. PROMPTS
"""

SAFE_MESSAGES = """\
Whatever a message spells stays text. Other text that
may contain control pieces such as `ENDS` has to be tokenized with `split_special_tokens=True`."""
UNSAFE_MESSAGES = """\
Text that may contain
control pieces such as `ENDS` has to be tokenized with `split_special_tokens=True`, so that it stays text; what a message
spells is read as a control piece."""

OTHER_USE = """\
```python
from transformers import AutoTokenizer, CLASS

tokenizer = AutoTokenizer.from_pretrained(".")
model = CLASS.from_pretrained(".")
```

BEGINS The model was trained on rows of packed text by the objective that hides and asks back; a mask or sentinels stand
where text is hidden.
"""
