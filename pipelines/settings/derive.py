"""What follows from an experiment's settings: the model and tokenizer that there will be, and what each step is told."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from conf.refusal import NO_VALUE, Refusal, Shown
from data.tasks.settings import check_sentinels
from data.text.corpus import CorpusSettings
from data.tokenizers.sentencepiece import tokenizer_files
from data.tokenizers.training import TokenizerSettings
from model.config import ModelConfig
from pipelines.engine.secrets import COMMAND
from pipelines.engine.store import tags
from pipelines.engine.store.lineage import origin
from pipelines.engine.store.manifest import provenance
from pipelines.engine.store.open import open_store
from pipelines.settings.schema import Schema
from pipelines.stages.evaluate import EvaluateSettings
from pipelines.stages.start import Start
from pipelines.stages.train import TrainingSettings, Tuning
from pipelines.training.objective import check_suits
from pipelines.training.rates import derived
from pipelines.training.settings import (
    BatchPlan,
    TrackingSettings,
    TrainSettings,
)

SENTINELS = 100  # as many as T5 has
T = TypeVar("T")
_EXECUTION: Any = {"execution": True}


_START = "_start"
"""Attribute under which settings keep the folder that they have opened."""


@dataclass(frozen=True, kw_only=True)
class Settings(Schema):
    """One experiment, whole, and what follows."""

    def corpora(self) -> dict[str, CorpusSettings]:
        """Corpus settings by step name: `corpus` alone, or `corpus-NAME` for each of `sources`; none where only weights
        from outside are fine-tuned and no text is named, which then are not evaluated."""
        if not self.sources:
            named = self.corpus.kind != "files" or self.corpus.paths
            start = None if named or self.pretrains else self.open_start()
            if start is not None and start.tokenizer:
                return {}
            return {"corpus": self.corpus}
        return {f"corpus-{name}": source for name, source in self.sources.items()}

    @property
    def pretrains(self) -> bool:
        """Whether there is a pretraining; fine-tuning may begin with a folder of weights instead."""
        return self.finetune is None or self.finetune.init_from is None

    @property
    def starts_from(self) -> str | None:
        """The folder of weights that the first training begins with, if there is one."""
        return self.pretrain.init_from if self.finetune is None else self.finetune.init_from or self.pretrain.init_from

    def open_start(self) -> Start | None:
        """That folder, looked at once. Raises Refusal."""
        if _START not in self.__dict__:
            object.__setattr__(self, _START, self._opened_start())
        opened: Start | None = self.__dict__[_START]
        return opened

    def _opened_start(self) -> Start | None:
        if self.starts_from is None:
            return None
        if not self.pretrains and self.pretrain.init_from is not None:
            raise Refusal(
                "finetune.init_from",
                Shown(self.starts_from),
                f"with pretrain.init_from={self.pretrain.init_from}: fine-tuning begins with what pretraining made, or "
                "with a folder and then nothing is pretrained",
                "set one of the two",
            )
        setting = "pretrain.init_from" if self.pretrains else "finetune.init_from"
        place = self._untagged(self.starts_from)
        ours = origin(Path(os.path.expanduser(place)).absolute())
        if ours is None:
            return Start.open(setting, place)
        brings = bool(tokenizer_files(ours.model))
        words = None if brings else ours.tokenizer(setting)
        return Start.open(setting, str(ours.model), trained_with=words, checksums=ours.checksums)

    def _untagged(self, place: str) -> str:
        """The folder that `tag:NAME` stands for in this store; any other place as it is."""
        if not place.startswith(tags.PREFIX):
            return place
        store = open_store(self.store)
        artifact = tags.find(store, place.removeprefix(tags.PREFIX))
        store.verify(artifact, (), ("model/*",))
        return str(artifact.path)

    def resolved_model(self) -> ModelConfig:
        """The model with what others decide filled in: a folder to start from, or the tokenizer's vocabulary and the
        rows' length."""
        if (start := self.open_start()) is not None:
            start.check_vocabulary(self.tokenizer.vocab_size)
            return start.model(self.model, self.shards.seq_len)
        encoder = self.model.encoder
        if encoder is not None:
            longest, _ = self.objective.widths(self.shards.seq_len) or (0, 0)
            encoder = replace(encoder, max_seq_len=max(encoder.max_seq_len, longest))
        return replace(
            self.model,
            vocab_size=self.model.vocab_size or self.tokenizer.vocab_size,
            max_seq_len=max(self.model.max_seq_len, self.shards.seq_len),
            encoder=encoder,
        )

    def writes_from_left_to_right(self) -> bool:
        """Whether the model is a decoder alone, which has bits per byte and continues texts."""
        model = self.resolved_model()
        return model.causal and model.encoder is None

    def resolved_tokenizer(self) -> TokenizerSettings:
        """The tokenizer with the pieces that the objective hides with. Raises Refusal where sentinels are too few."""
        given, seq_len = self.tokenizer, self.shards.seq_len
        sentinels = given.sentinel_pieces or (SENTINELS if self.objective.sentinels(seq_len) else 0)
        check_sentinels(self.objective, sentinels, seq_len)
        mask = given.mask_piece or self.objective.needs_mask
        try:
            return replace(given, mask_piece=mask, sentinel_pieces=sentinels)
        except Refusal as refusal:  # of what the objective needs beside what is configured
            raise refusal.under("tokenizer") from None

    def pretraining(self) -> TrainingSettings:
        """What the pretrain step is told: the groups that stand beside `pretrain` put in their places.

        Raises Refusal where the objective does not suit the model.
        """
        model = self.resolved_model()
        check_suits(self.objective.kind, model)
        optim = derived(self.optim, model, trained_before=self.pretrain.init_from is not None)
        train = self.pretrain.run(optim=optim, schedule=self.schedule, **self._everywhere())
        return TrainingSettings(
            label="pretrain",
            model=model,
            train=train,
            order=self.order,
            mixture=self.mixture,
            objective=self.objective,
            compute=self.compute,
        )

    def first_training(self) -> tuple[str, TrainSettings]:
        """The first step that trains, and how: pretraining, or fine-tuning of weights from outside."""
        tuning = None if self.pretrains else self.finetuning()
        return ("pretrain", self.pretraining().train) if tuning is None else ("finetune", tuning.train)

    def finetuning(self) -> TrainingSettings | None:
        """What the finetune step is told, or None where there is none."""
        if self.finetune is None:
            return None
        if not self.writes_from_left_to_right():
            raise Refusal(
                "finetune" if self.pretrains else "finetune.init_from",
                NO_VALUE if self.pretrains else Shown(self.starts_from),
                "fine-tuning teaches a causal decoder to answer, and this model is an encoder or has one",
                "set finetune=none, or take the model that pretraining leaves (model/ in its artifact) to your own task",
            )
        model, adapted = self.resolved_model(), self.finetune.lora is not None
        optim = derived(self.finetune.train.optim, model, trained_before=True, adapted=adapted)
        chosen = self.finetune
        return TrainingSettings(
            label="finetune",
            train=replace(chosen.train, optim=optim, **self._everywhere()),
            tuning=Tuning(epochs=chosen.epochs, lora=chosen.lora, freeze=chosen.freeze),
            order=self.order,
            compute=self.compute,
        )

    def evaluating(self) -> EvaluateSettings:
        """What the evaluate step is told."""
        return replace(self.evaluate, tracking=self._tracking())

    def check_sizes(self, steps: Collection[str] = ("pretrain", "finetune", "evaluate")) -> None:
        """Refuse at once what one of these steps would refuse after hours of other work: a batch, or windows of
        evaluation."""
        tuning = self.finetuning() if "finetune" in steps else None
        trainings = {"pretrain": self.pretraining().train} if self.pretrains and "pretrain" in steps else {}
        trainings |= {"finetune.train": tuning.train} if tuning is not None else {}
        for where, train in trainings.items():
            try:
                BatchPlan.derive(train, seq_len=self.shards.seq_len, world_size=self.compute.ranks, largest_rows=1)
            except Refusal as refusal:
                raise refusal.under(where) from None
        if "evaluate" in steps and self.writes_from_left_to_right():
            self.evaluation_windows()

    def evaluation_windows(self) -> tuple[int, int]:
        """Context and stride in tokens of what is scored from left to right. Raises Refusal where they cannot be."""
        return self.evaluate.windows(self.resolved_model().max_seq_len, self.shards.seq_len if self.pretrains else None)

    def _everywhere(self) -> dict[str, Any]:
        """Execution settings that every training step shares."""
        return {
            "zero": self.zero,
            "device": self.compute.device,
            "threads": self.compute.cpus_per_rank,
            "tracking": self._tracking(),
        }

    def _tracking(self) -> TrackingSettings:
        about = {"experiment": self.experiment, "store": self.store}
        if self.tracking.mode != "off":
            about |= {"commit": provenance()["commit"] or "", "command": os.environ.get(COMMAND, "")}
        return replace(
            self.tracking, group=self.tracking.group or self.experiment, about={**about, **self.tracking.about}
        )


def corpus_key(step: str) -> str:
    """What a person calls the settings of a corpus by the name of its step: `corpus`, or `sources.NAME`."""
    return step.replace("corpus-", "sources.", 1)
