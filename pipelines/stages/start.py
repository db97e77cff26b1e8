"""Start: a folder of weights from outside, checked and taken into the store, for training to begin with.

    start = Start.open("pretrain.init_from", "weights/gpt2")      # looks at config.json and which files there are
    start.config                                                  # the ModelConfig that the folder describes

What the folder holds enters digests by its bytes and never by where it lies. The artifact has the folder's own safetensors
and config.json in model/, where a pretrained model's lie too: fine-tuning and evaluation take the one for the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.refusal import Refusal
from conf.typed import to_plain
from data.tokenizers.huggingface import HuggingFaceTokenizer, config_ids
from data.tokenizers.sentencepiece import Tokenizer, tokenizer_files
from model.config import ModelConfig
from model.interop import checkpoint_files, config_from_hf, has_hf_class, hf_config, read_config
from pipelines.engine.step import Context, Inputs
from pipelines.stages.checksums import check_checksums, check_published
from pipelines.training.objective import reads_other_than_text

TRAINING_ONLY = ("dropout", "z_loss")
"""Fields of a model that are no part of what its weights compute: what the settings say of them holds."""


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """Where the folder lies, and whether its tokenizer is used: where and how, never what."""

    folder: str = field(metadata={"execution": True})
    """Where the weights lie."""
    brings_tokenizer: bool = field(default=False, metadata={"execution": True})
    """Whether the folder's tokenizer is used."""
    checksums: dict[str, str] = field(default_factory=dict, metadata={"execution": True})
    """{file: sha256} of an artifact of ours, as its manifest has them: what differs is refused."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A folder of weights, as far as it can be told without reading them.

    setting: what names it, for messages. tokenizer: its tokenizer's files, none where there is no tokenizer.
    """

    setting: str
    folder: Path
    config: ModelConfig
    weights: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    tokenizer_folder: Path
    """Folder of those files: `folder`, or, for one of our artifacts, its tokenizer step's."""
    checksums: dict[str, str] = field(default_factory=dict)
    """sha256 of `weights`, from the manifest of one of our artifacts; else empty."""
    config_ids: dict[str, int] = field(default_factory=dict)
    """See `data.tokenizers.huggingface.config_ids`; none for a tokenizer that this program made."""

    @classmethod
    def open(
        cls, setting: str, folder: str, *, trained_with: Path | None = None, checksums: Mapping[str, str] | None = None
    ) -> Start:
        """trained_with: the tokenizer's folder, if not `folder`. checksums: sha256 of the folder's files, from a manifest.
        Raises Refusal for a folder that cannot start a training."""
        path = Path(os.path.expanduser(folder)).absolute()
        if not path.is_dir():
            remedy = "give a Hugging Face checkpoint on this disk, with config.json and safetensors"
            raise Refusal(setting, folder, "no such folder", remedy)
        config, weights = read_config(path), tuple(checkpoint_files(path))
        if other := reads_other_than_text(config):
            rule = f"{other}, and the rows that are trained on here are text"
            raise Refusal(setting, folder, rule, "give a checkpoint of a language model")
        tokenizer_folder = trained_with or path
        files = tuple(tokenizer_files(tokenizer_folder))
        if not files:
            return cls(
                setting=setting,
                folder=path,
                config=config,
                weights=weights,
                tokenizer=(),
                tokenizer_folder=tokenizer_folder,
                checksums=dict(checksums or {}),
            )
        try:
            tokenizer = Tokenizer.load(tokenizer_folder)
        except Refusal as refusal:
            raise Refusal(f"{setting}: {refusal.where}", refusal.value, refusal.rule, refusal.remedy) from refusal
        if tokenizer.vocab_size > config.require_vocab_size():
            surplus = _surplus(tokenizer, config)
            raise Refusal(
                setting,
                folder,
                f"its tokenizer has {tokenizer.vocab_size:,} pieces and its model vocab_size {config.vocab_size:,}: a model "
                "has a row for each piece at least",
                f"where {surplus} never used, take that out of added_tokens in {tokenizer_folder / 'tokenizer.json'}, and "
                "out of tokenizer_config.json and special_tokens_map.json where they name it; else make the model larger "
                f"with transformers, model.resize_token_embeddings({tokenizer.vocab_size}), or give the tokenizer that "
                "belongs to the weights",
            )
        piece_ids = config_ids(tokenizer_folder) if isinstance(tokenizer, HuggingFaceTokenizer) else {}
        return cls(
            setting=setting,
            folder=path,
            config=config,
            weights=weights,
            tokenizer=files,
            tokenizer_folder=tokenizer_folder,
            checksums=dict(checksums or {}),
            config_ids=piece_ids,
        )

    @property
    def settings(self) -> StartSettings:
        """What the step is told."""
        return StartSettings(folder=str(self.folder), brings_tokenizer=bool(self.tokenizer), checksums=self.checksums)

    def model(self, asked: ModelConfig, seq_len: int) -> ModelConfig:
        """The folder's model with what only training looks at as `asked` has it, for rows of `seq_len`."""
        for stack in (self.config, self.config.encoder):
            longest = None if stack is None else stack.position.longest_row(stack.n_positions)
            if longest is not None and longest < seq_len:
                raise Refusal(
                    "shards.seq_len",
                    seq_len,
                    f"the model of {self.setting}={self.folder} has learned {longest:,} positions and knows none beyond",
                    f"use shards.seq_len={longest}",
                )
        said = {name: getattr(asked, name) for name in TRAINING_ONLY}
        encoder = self.config.encoder
        if encoder is not None:
            encoder = replace(encoder, dropout=asked.dropout, max_seq_len=max(encoder.max_seq_len, seq_len))
        return replace(self.config, **said, encoder=encoder, max_seq_len=max(self.config.max_seq_len, seq_len))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Whether a tokenizer trained here fits the model; it has a multiple of 128 pieces. Raises Refusal."""
        rows = self.config.require_vocab_size()
        if not self.tokenizer and vocab_size != (fitting := rows // 128 * 128):
            raise Refusal(
                "tokenizer.vocab_size",
                vocab_size,
                f"the model of {self.setting}={self.folder} has vocab_size {rows:,} and the folder no tokenizer, so one is "
                "trained here and has to fill the model's vocabulary",
                f"set tokenizer.vocab_size={fitting}, or add the tokenizer that belongs to the weights",
            )

    def check_model(self, given: ModelConfig, chosen: Iterable[str]) -> None:
        """Whether what was chosen by hand is what the folder says; `chosen`: the dotted fields that were.

        Raises Refusal with the first field that differs and both values.
        """
        theirs, ours = to_plain(as_told(self.config, self.config)), to_plain(as_told(given, self.config))
        for path in chosen:
            if {*TRAINING_ONLY, "init"} & set(path.split(".")):
                continue
            here, there = _at(ours, path), _at(theirs, path)
            if here != there:
                raise Refusal(
                    f"model.{path}",
                    here,
                    f"{self.setting}={self.folder} has {there!r}, and a model that starts from weights is what they are",
                    "leave out model=… and model.…, or start from other weights",
                )


def as_told(config: ModelConfig, like: ModelConfig) -> ModelConfig:
    """A model in the words of an imported one, so that what computes the same compares equal."""
    if config.vocab_size is None:
        config = replace(config, vocab_size=like.vocab_size)
    return config_from_hf(hf_config(config)) if has_hf_class(config) else config


def run(settings: StartSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Writes model/. Raises Refusal listing the tensors that are missing, not expected or of another shape."""
    ctx.log(
        f"the tokenizer is that of {settings.folder}; none is trained, whatever tokenizer.* says"
        if settings.brings_tokenizer
        else f"{settings.folder} has no tokenizer: one is trained here, and its pieces begin with embeddings that stood for "
        "others"
    )
    taken = dict(ctx.call(take, settings.folder, out_dir / "model", settings.checksums))
    if new := taken.pop("new_head"):
        ctx.log(f"{settings.folder} has no head for this training: {_listed(new)} begin anew, from seed 0")
    if left := taken.pop("left"):
        ctx.log(f"not needed for this training and left: {_listed(left)}")
    return taken


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def take(folder: str, out_dir: Path, checksums: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Verify checksums, where there are any, and every tensor, then copy the files, or write the model if its head is new.
    Runs in a worker."""
    import json
    import shutil

    from model.interop import load_imported, save_pretrained

    source = Path(folder)
    check_checksums(source)  # present in our own exports
    for file in checkpoint_files(source):
        check_published(file, (checksums or {}).get(file.relative_to(source).as_posix()))
    loaded = load_imported(source, head_seed=0)
    out_dir.mkdir(parents=True)
    if loaded.new_head:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
        save_pretrained(loaded.state, loaded.config, out_dir, extra=ids)
    else:
        for file in checkpoint_files(source):
            shutil.copyfile(file, out_dir / file.name)
    stored = {name: tensor for name, tensor in loaded.state.items() if name not in loaded.config.tied_weights}
    return {
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "tensors": len(stored),
        "new_head": list(loaded.new_head),
        "left": list(loaded.left),
    }


def _surplus(tokenizer: Tokenizer, config: ModelConfig) -> str:
    """Names of the tokenizer's pieces without an embedding row, followed by was or were."""
    rows = config.require_vocab_size()
    names = [repr(tokenizer.piece(number)) for number in range(rows, tokenizer.vocab_size)]
    shown = f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 4 else ", ".join(names)
    return f"{shown} {'was' if len(names) == 1 else 'were'}"


def _at(plain: Any, path: str) -> Any:
    """A value of nested mappings by its dotted path; None where there is none."""
    for name in path.split("."):
        plain = plain.get(name) if isinstance(plain, Mapping) else None
    return plain
