"""Hydra ⇄ typed, frozen settings: the one place where YAML and command-line overrides become dataclasses.

    settings = compose(["experiment=demo", "optim.lr=3e-4"])
    settings.optim.lr                       # 0.0003

Hydra picks the files (groups under `conf`), the dataclasses decide what may stand in them: a key that no dataclass has, or
a value of another type, is a Refusal that names the nearest right one.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from conf.refusal import NO_VALUE, Refusal, Shown
from conf.typed import field_types, from_plain
from pipelines.engine.secrets import refuse_secrets
from pipelines.settings import hydra_private
from pipelines.settings.derive import Settings
from pipelines.settings.overrides import CONF_DIR, chosen_fields, fields_by_kind, hydra_overrides
from pipelines.settings.schema import SET_ELSEWHERE

SENTINELS = 100  # as many as T5 has
T = TypeVar("T")
_EXECUTION: Any = {"execution": True}


def compose(overrides: Sequence[str]) -> Settings:
    """Settings from overrides. Raises Refusal for a mistake in them, naming the nearest right word."""
    settings = typed(plain(overrides))
    is_here = settings.starts_from is not None and os.path.isdir(os.path.expanduser(settings.starts_from))
    if is_here and (start := settings.open_start()) is not None:
        # A folder that is not here may be where the command is sent to; `build` says so if it is needed here.
        start.check_model(settings.model, chosen_fields(overrides))
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


def multirun(words: Sequence[str], trial: Callable[[Any], T]) -> list[T]:
    """What `trial` answered to each composed point of a sweep, in order, through Hydra's launcher.

    Not through `hydra.main`: it throws away what the trials returned, and of a worker that was lost it makes a
    traceback and an exit.
    """
    quiet = (
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.sweep.subdir=trials",
    )
    # Hydra's own output, which has all overrides, is not needed later: it is in a private folder, removed afterwards. Every
    # machine can make such a folder, so a sweep needs no shared one.
    with tempfile.TemporaryDirectory(prefix="athanor-sweep-") as notes:
        folders = [f"hydra.{mode}.dir='{notes}'" for mode in ("run", "sweep")]
        return hydra_private.launch([*quiet, *folders, *words], trial, CONF_DIR)


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
