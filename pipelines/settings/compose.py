"""Hydra ⇄ typed, frozen settings: the one place where YAML and command-line overrides become dataclasses.

    settings = compose(["experiment=demo", "optim.lr=3e-4"])
    settings.optim.lr                       # 0.0003

Hydra picks the files (groups under `conf`), the dataclasses decide what may stand in them: a key that no dataclass has, or
a value of another type, is a Refusal that names the nearest right one. Fields marked `{"execution": True}` say
where or how fast and never what is made; `engine/fingerprint.py` leaves them out of every digest.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from conf.refusal import NO_VALUE, Refusal, Shown
from conf.typed import field_types, from_plain
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.rows.shards import ShardSettings
from data.tasks.settings import NextTokenSettings, ObjectiveChoice, check_sentinels
from data.text.corpus import CorpusSettings
from data.tokenizers.sentencepiece import tokenizer_files
from data.tokenizers.training import TokenizerSettings
from model.config import ModelConfig
from pipelines.engine.secrets import COMMAND, refuse_secrets
from pipelines.engine.store.lineage import origin
from pipelines.engine.store.manifest import provenance
from pipelines.settings.overrides import CONF_DIR, chosen_fields, fields_by_kind, hydra_overrides
from pipelines.stages.evaluate import EvaluateSettings
from pipelines.stages.export import ExportSettings
from pipelines.stages.finetune import FinetuneSettings
from pipelines.stages.launch import ComputeSettings
from pipelines.stages.report import ReportSettings
from pipelines.stages.start import Start
from pipelines.stages.train import TrainingSettings, Tuning
from pipelines.training.objective import check_suits
from pipelines.training.rates import derived
from pipelines.training.settings import (
    AdamWSettings,
    BatchPlan,
    MuonSettings,
    ScheduleSettings,
    TrackingSettings,
    TrainSettings,
    ZeroSettings,
)

SENTINELS = 100  # as many as T5 has
T = TypeVar("T")
_EXECUTION: Any = {"execution": True}


@dataclass(frozen=True, kw_only=True)
class PretrainGroup(TrainSettings):
    """What stands under `pretrain`: a training run, and what it begins with."""

    init_from: str | None = field(default=None, metadata={"execution": True, "path": True})
    """A Hugging Face folder of weights; null starts anew. Its files' content enters digests, not where it lies."""

    def run(self, **elsewhere: Any) -> TrainSettings:
        """The training run alone, with what other groups say of it."""
        own = {f.name: getattr(self, f.name) for f in fields(TrainSettings)}
        return TrainSettings(**{**own, **elsewhere})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One experiment, whole. Every field is one top-level key of the composed configuration."""

    experiment: str = field(metadata=_EXECUTION)
    """Name of the experiment, for people."""
    store: str = field(default="runs", metadata={"execution": True, "path": True})
    """Folder or s3:// prefix of the artifacts."""
    seed: int = 0
    """What `pretrain.seed` and `order.seed` are unless they are set themselves."""
    compute: ComputeSettings = field(default_factory=ComputeSettings, metadata=_EXECUTION)
    """Where the work runs."""
    corpus: CorpusSettings
    """The text, where there is one source."""
    sources: dict[str, CorpusSettings] = field(default_factory=dict)
    """Several named corpora instead of `corpus`; `mixture.phases` says how much of each, and when."""
    tokenizer: TokenizerSettings
    """The vocabulary and how it is learned."""
    shards: ShardSettings
    """How rows are cut."""
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    """How much of each source, and when."""
    order: OrderSettings = field(default_factory=OrderSettings)
    """The shuffle."""
    model: ModelConfig
    """The architecture."""
    objective: ObjectiveChoice = field(default_factory=NextTokenSettings)
    """What pretraining asks of a row; the tokenizer gets the pieces it hides with."""
    pretrain: PretrainGroup
    """The pretraining run."""
    optim: AdamWSettings | MuonSettings
    """The optimizer of pretraining."""
    schedule: ScheduleSettings
    """The learning rate's course in pretraining."""
    zero: ZeroSettings = field(metadata=_EXECUTION)
    """What training ranks share out."""
    finetune: FinetuneSettings | None
    """Fine-tuning on conversations; null: none."""
    evaluate: EvaluateSettings
    """What is scored, and how."""
    export: ExportSettings = field(default_factory=ExportSettings)
    """What is exported."""
    report: ReportSettings = field(default_factory=ReportSettings)
    """What stands above the report."""
    tracking: TrackingSettings = field(metadata=_EXECUTION)
    """Weights & Biases."""

    def corpora(self) -> dict[str, CorpusSettings]:
        """Corpus settings by step name: `corpus` alone, or `corpus-NAME` for each of `sources`; none where only weights
        from outside are fine-tuned and no text is named, which then are not evaluated."""
        if not self.sources:
            if self.corpus.kind == "files" and not self.corpus.paths and self.start is not None and not self.pretrains:
                return {} if self.start.tokenizer else {"corpus": self.corpus}
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

    @cached_property
    def start(self) -> Start | None:
        """That folder, looked at. Raises Refusal."""
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
        folder = Path(os.path.expanduser(self.starts_from)).absolute()
        ours = origin(folder)
        if ours is None:
            return Start.open(setting, self.starts_from)
        brings = bool(tokenizer_files(ours.model))
        words = None if brings else ours.tokenizer(setting)
        return Start.open(setting, str(ours.model), trained_with=words, checksums=ours.checksums)

    def resolved_model(self) -> ModelConfig:
        """The model with what others decide filled in: a folder to start from, or the tokenizer's vocabulary and the
        rows' length."""
        if self.start is not None:
            self.start.check_vocabulary(self.tokenizer.vocab_size)
            return self.start.model(self.model, self.shards.seq_len)
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


def compose(overrides: Sequence[str]) -> Settings:
    """Settings from overrides. Raises Refusal for a mistake in them, naming the nearest right word."""
    settings = typed(plain(overrides))
    if settings.starts_from is not None and os.path.isdir(os.path.expanduser(settings.starts_from)) and settings.start:
        # A folder that is not here may be where the command is sent to; `build` says so if it is needed here.
        settings.start.check_model(settings.model, chosen_fields(overrides))
    return settings


def plain(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration as a plain dict, before types."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    words = hydra_overrides(overrides, Settings)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            config = hydra_compose(config_name="config", overrides=words)
        return resolved(config, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _refused(error) from error


def resolved(config: Any, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """What Hydra composed as a plain dict. Raises OmegaConf's errors for a value that is missing or refers to nothing.

    Where an override chooses another kind (`model.position.kind=none`), what a file says of the kind before goes with it;
    `overrides`: of the trial that Hydra runs, unless they are given.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    keys = {
        word.lstrip("+").partition("=")[0]
        for word in (HydraConfig.get().overrides.task if overrides is None else overrides)
    }
    for key in sorted(keys):
        place, _, last = key.rpartition(".")
        if last == "kind" and isinstance(section := value_at(plain, place), dict):
            own, others = fields_by_kind(Settings, place.split("."), str(section.get("kind")))
            for name in others - own:
                if f"{place}.{name}" not in keys and not any(k.startswith(f"{place}.{name}.") for k in keys):
                    section.pop(name, None)
    return plain


def value_at(plain: Any, path: str) -> Any:
    """Value at a dotted path of nested mappings, or None."""
    for name in path.split("."):
        plain = plain.get(name) if isinstance(plain, Mapping) else None
    return plain


def typed(config: Mapping[str, Any]) -> Settings:
    """A plain configuration as Settings: unknown keys, wrong types and settings in two places are errors."""
    for path, instead in SET_ELSEWHERE.items():
        *above, key = path.split(".")
        section = value_at(config, ".".join(above))
        if isinstance(section, Mapping) and key in section:
            raise Refusal(path, section[key], "it holds for every step", f"set {instead} instead")
    refuse_secrets(config, "the configuration")
    return from_plain(Settings, config, where="")


_EVERYWHERE = {
    "zero": "zero=0|1|2|3",
    "tracking": "tracking.KEY",
    "device": "compute.device",
    "threads": "compute.cpus_per_rank",
}
"""Of a training run: what `Settings._everywhere` sets."""

SET_ELSEWHERE = {
    "pretrain.objective": "objective.KEY or objective=NAME",
    "pretrain.optim": "optim.KEY or optim=NAME",
    "pretrain.schedule": "schedule.KEY or schedule=NAME",
    "evaluate.tracking": _EVERYWHERE["tracking"],
    **{f"{train}.{key}": instead for train in ("pretrain", "finetune.train") for key, instead in _EVERYWHERE.items()},
}
"""Keys that a dataclass has and a person may not set there, and what to set instead."""


def multirun(words: Sequence[str], trial: Callable[[Any], T]) -> list[T]:
    """What `trial` answered to each composed point of a sweep, in order, through Hydra's launcher.

    Not through `hydra.main`: it throws away what the trials returned, and of a worker that was lost it makes a
    traceback and an exit.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    quiet = (
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.sweep.subdir=trials",
    )
    # Our conf/hydra/launcher/ray.yaml takes the name of the plugin's schema on purpose: it fills in that schema.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated against ConfigStore schema")
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("athanor", create_config_search_path(str(CONF_DIR)))
    try:
        # Hydra's own output, which has all overrides, is not needed later: it is in a private folder, removed
        # afterwards. Every machine can make such a folder, so a sweep needs no shared one.
        with tempfile.TemporaryDirectory(prefix="athanor-sweep-") as notes:
            folders = [f"hydra.{mode}.dir='{notes}'" for mode in ("run", "sweep")]
            batches = hydra.multirun(config_name="config", task_function=trial, overrides=[*quiet, *folders, *words])
    finally:
        GlobalHydra.instance().clear()
    return [job.return_value for batch in batches for job in batch]


def section(cls: type[T], file: str, values: Mapping[str, str]) -> T:
    """One file of `conf` with overrides on top, as its class; for settings that are not part of an experiment.

    What is text in the class is taken as it is typed (`memory=3000`, `time_limit=30:00`); `null` is null where null may be.
    """
    import yaml

    config = yaml.safe_load((CONF_DIR / f"{file}.yaml").read_text(encoding="utf-8"))
    for key, text in values.items():
        *above, last = key.split(".") if key.partition(".")[0] in config else [key.partition(".")[0]]
        place = config
        for name in above:  # secrets.WANDB_API_KEY
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise Refusal(key, Shown(text), f"{'.'.join(above)} holds no settings of its own", f"set {above[0]}=…")
        place[last] = _as_typed(cls, key, text)
    return from_plain(cls, config, where="")


def _as_typed(cls: Any, key: str, text: str) -> Any:
    """The value of an override of a flat settings class, whose text needs no quotes."""
    import yaml

    hint = field_types(cls).get(key.partition(".")[0])
    arms = get_args(hint)
    if "." in key:
        hint = arms[1] if get_origin(hint) is dict else None
    if text in ("null", "~") and NoneType in arms:
        return None
    if (str in (hint, *arms) and get_origin(hint) not in (dict, tuple)) and text[:1] not in ("'", '"'):
        return text
    holds_text = hint is str or str in arms
    try:
        return yaml.load(text, yaml.BaseLoader) if holds_text else yaml.safe_load(text)
    except yaml.YAMLError as error:
        what = "NAME: VALUE pairs in braces" if get_origin(hint) is dict else "a list in brackets"
        raise Refusal(
            key, Shown(text), "it cannot be read", f"write {what if holds_text else 'a plain value'}"
        ) from error


def _refused(error: Exception) -> Refusal:
    """Hydra's message without its stack of causes."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if lines and (match := re.match(r"Interpolation key '(.+)' not found", lines[0])):
        at = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "a setting")
        return Refusal(
            at,
            Shown(f"${{{match[1]}}}"),
            f"it refers to the setting {match[1]}, and there is none",
            f"name one that there is, or write '\\${{{match[1]}}}' in quotes where these signs are meant as they stand",
        )
    return Refusal("overrides", NO_VALUE, " ".join(lines[:3]) or type(error).__name__)
