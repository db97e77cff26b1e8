"""Every setting says what it means, in --help and on the reference page."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.submit import ClusterSettings
from conf.described import described
from conf.typed import arms, field_types
from pipelines.settings.derive import Settings
from pipelines.verbs.help import reference

ROOT = Path(__file__).parents[1]


def settings_classes(hint: Any, seen: set[type]) -> Iterator[type]:
    """Every dataclass that settings of this type hold."""
    for arm in (*(each for each in arms(hint) if each is not hint), *typing.get_args(hint)):
        yield from settings_classes(arm, seen)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in seen:
        seen.add(hint)
        yield hint
        for inner in field_types(hint).values():
            yield from settings_classes(inner, seen)


def test_every_field_of_every_setting_says_what_it_means() -> None:
    seen: set[type] = set()
    classes = [*settings_classes(Settings, seen), *settings_classes(ClusterSettings, seen)]
    assert len(classes) > 50
    silent = {
        f"{cls.__module__}.{cls.__name__}.{name}"
        for cls in classes
        for name in field_types(cls)
        if name not in described(cls)
    }
    assert not silent


def test_the_reference_page_is_that_of_these_settings() -> None:
    assert (ROOT / "docs/reference.md").read_text() == reference(), "python -m pipelines.verbs.help > docs/reference.md"
