"""What a message tells a person to type works: every override and command in the source's messages is typed here.

The strings are read out of the source, with `⟨expression⟩` where an f-string fills something in. A key that no settings
class knows, a value that these refuse, an option that a verb does not have fail; so does a placeholder that the tables
below do not know, so a new message is typed from its first day.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import io
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from omegaconf import OmegaConf

from cluster.submit import KINDS
from conf.refusal import Refusal
from conf.registry import registry_of
from conf.typed import field_types
from data.tokenizers.training import TokenizerSettings, train_tokenizer
from pipelines.__main__ import VERBS, _parse
from pipelines.engine.backends.ray_backend import _in_lasting_thread
from pipelines.settings.compose import compose, plain, resolved, typed
from pipelines.settings.derive import Settings
from pipelines.settings.overrides import CONF_DIR, options, points_of, types_at
from pipelines.verbs.commands import cluster_settings
from tests.conftest import ROOT

NO_MESSAGES = ("pipelines/console/charts.py", "pipelines/engine/secrets.py")
"""HTML, and patterns of secrets."""
KEYS = {
    "setting": ("pretrain.init_from", "finetune.init_from"),
    "self.setting": ("pretrain.init_from", "finetune.init_from"),
    "self._key('on_divergence')": ("pretrain.on_divergence", "finetune.train.on_divergence"),
    "self._key('on_non_finite')": ("pretrain.on_non_finite", "finetune.train.on_non_finite"),
    "self._key('schedule')": ("schedule", "finetune.train.schedule"),
    "self._key('clip_norm')": ("pretrain.clip_norm", "finetune.train.clip_norm"),
    "batch": ("pretrain.global_batch_tokens", "finetune.train.global_batch_tokens"),
    "corpus_key(step)": ("corpus", "sources.web"),
    "step": ("finetune",),
    "change": ("optim.lr", "finetune.train.optim.lr"),
    "PATHS": ("finetune.data.paths",),
    "where": ("model", "model.encoder"),
}
"""What a placeholder in a key stands for."""
ECHOED = {"key", "above[0]", "where.lstrip('.')", "where", "group", "path", "kind", "name", "config", "setting.theirs"}
"""Placeholders of keys that a person has typed, or whose names come from other people's files."""
PLACED = {"global_batch_tokens": "pretrain", "micro_batch_rows": "pretrain"}
"""Settings that a message calls by their own name and `Settings.check_sizes` gives their place."""
FILLED = {"same": "experiment=demo", "shlex.join(overrides)": "experiment=demo"}
"""Placeholders in commands; all others are one word."""
CONTEXTS = (
    ("experiment=demo",),
    ("experiment=gpt2-124m",),
    ("experiment=gpt2-124m", "model=t5-small"),
    ("experiment=gpt2-124m", "model=moe-small"),
    ("experiment=gpt2-124m", "model=bert-base"),
    ("experiment=gpt2-124m", "model=clip-base"),
    ("experiment=gpt2-124m", "objective=span_denoising"),
)
"""Configurations one of which a value has to suit."""
ELSEWHERE = re.compile(
    r"config\.json has|errors='replace'|new_cache\(|save_pretrained\(|tokenize|return_tensors|max_new_tokens|skip_special"
    r"|kubectl|namespace\(messages|message\['role'\]|metadata=\{|log_mel\(|def value_|ATHANOR|mixture weight|rank=⟨"
)
"""In strings that speak of Python, other programs or fields of other people's files."""

_PART = r"(?:⟨[^⟩]*⟩|\w)"
_OVERRIDE = re.compile(
    rf"(?<![\w.⟩/@:-])(?P<key>{_PART}(?:{_PART}|[./](?=[\w⟨]))*)="
    r"(?P<value>\[[^\]]*\]|\{[^}]*\}|(?:⟨[^⟩]*⟩|[^\s;,:()'\"`⟨=]|:(?=//))+(?:\([^)]*\))?)"
)
_COMMAND = re.compile(r"athanor (?P<verb>[a-z]+|⟨[^⟩]*⟩) (?P<rest>(?:[^`.\n;,)]|\.(?=\w)|⟨[^⟩]*⟩)*)")


class Line(NamedTuple):
    """A string of the source: where, its text, the class around it, and whether a call quotes it for a shell."""

    where: str
    text: str
    cls: str
    quoted: bool


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else _filled(typing.cast(Any, part).value)
            for part in node.values
        )
    return None


def _filled(expression: ast.expr) -> str:
    """A placeholder; the name itself where it is that of a field (`conf.refusal.field`)."""
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) in ("field", "key"):
        (name,) = expression.args
        if isinstance(name, ast.Constant):
            return str(name.value)
    return f"⟨{ast.unparse(expression)}⟩"


def _strings(node: ast.AST, file: str, cls: str = "", quoted: bool = False) -> Iterator[Line]:
    if isinstance(node, ast.ClassDef):
        cls = node.name
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id.endswith("SCRIPT") for t in node.targets):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("shlex."):
        quoted = True
    if (text := _text(node)) is not None:
        yield Line(f"{file}:{getattr(node, 'lineno', 0)}", text, cls, quoted)
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from _strings(child, file, cls, quoted)


@functools.cache
def lines() -> tuple[Line, ...]:
    """Every string of the rooms that a person may come to read."""
    found: list[Line] = []
    for room in ("data", "model", "pipelines", "cluster"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if (file := path.relative_to(ROOT).as_posix()) not in NO_MESSAGES:
                found += _strings(ast.parse(path.read_text(encoding="utf-8")), file)
    return tuple(line for line in found if not ELSEWHERE.search(line.text))


@functools.cache
def _places() -> dict[str, str]:
    """The shortest dotted place of each settings class, by its name."""
    places: dict[str, str] = {}
    queue: list[tuple[Any, str]] = [(Settings, "")]
    while queue:
        hint, place = queue.pop(0)
        if (registry := registry_of(hint)) is not None:
            queue += [(kind, place) for kind in registry.classes()]
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if hint.__name__ in places:
                continue
            places[hint.__name__] = place
            for base in hint.__mro__[1:]:
                places.setdefault(base.__name__, place)
            queue += [(inner, f"{place}.{name}".lstrip(".")) for name, inner in field_types(hint).items()]
        elif typing.get_origin(hint) is dict:
            queue.append((typing.get_args(hint)[1], f"{place}.web"))
        else:
            queue += [(arm, place) for arm in typing.get_args(hint) if not isinstance(arm, str)]
    return places


def _known(key: str) -> bool:
    return bool(types_at(Settings, key.split("."))) or (CONF_DIR / key).is_dir()


def _full(key: str, line: Line) -> list[str]:
    """The keys that a message's key stands for: as it is, or as `from_plain` places what a class says of its fields."""
    for placeholder, names in KEYS.items():
        if f"⟨{placeholder}⟩" in key:
            return [key.replace(f"⟨{placeholder}⟩", name) for name in names]
    if key in PLACED:
        return [f"{PLACED[key]}.{key}"]
    place = _places().get(line.cls)
    if place and not _known(key):
        parts, root = place.split("."), key.split(".")[0]
        above = parts[: parts.index(root)] if root in parts else parts
        placed = ".".join([*above, key])
        return [placed if _known(placed) else f"model.{key}"]  # what a part says of its model, in `check`
    return [key if _known(key) or not line.where.startswith("model/") else f"model.{key}"]


def _in_cluster(key: str) -> list[str]:
    return [kind for kind, cls in KINDS.items() if key.split(".")[0] in field_types(typing.cast(Any, cls))]


@functools.cache
def _base(context: tuple[str, ...]) -> Any:
    return OmegaConf.create(plain(context))


@functools.cache
def _composes(key: str, value: str) -> str:
    """Empty where one of the configurations takes the override, else what the first said."""
    complaints = []
    for context in CONTEXTS:
        # As `compose` does it, without its half of a second a time for reading the files.
        config = copy.deepcopy(_base(context))
        try:
            OmegaConf.update(config, key, yaml.safe_load(value), merge=True, force_add=True)
            typed(resolved(config, [f"{key}={value}"]))
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            complaints.append(str(error))
        else:
            return ""
    return complaints[0]


def _is_open(value: str) -> bool:
    """Whether a value is only named: a placeholder, DIR, NAME, …"""
    return bool(re.search(r"⟨|…|\.\.\.|[A-Z]{3}|\|", value))


def typed_as(line: Line, key: str, value: str) -> str:
    """What is wrong with an override of a message; empty where it works."""
    if (
        "⟨name⟩" in key
        or key == "at_most"
        or key.isupper()
        or key.strip("⟨⟩") in ECHOED
        or re.fullmatch(r"⟨[^⟩]*(key|name|path|word)[^⟩]*⟩", key)
    ):
        return ""
    if line.where.startswith(("cluster/", "pipelines/travel", "pipelines/verbs")) or "cluster=" in line.text:
        if key == "cluster":
            return "" if _is_open(value) or value in KINDS else "no such cluster"
        kinds = _in_cluster(key)
        if kinds and not _is_open(value):
            try:
                for kind in kinds:
                    cluster_settings([f"cluster={kind}", f"{key}={value}"])
            except Refusal as error:
                return str(error)
        if kinds:
            return ""
    for full in _full(key, line):
        if not _known(full):
            return f"no settings class knows {full}"
        if _is_open(value):
            continue
        if value.startswith("range("):
            points_of(["experiment=demo", f"{full}={value}"], Settings)
        elif (CONF_DIR / full).is_dir():
            if value.strip("'") not in options(full):
                return f"no such {full}"
        elif complaint := _composes(full, value):
            return complaint
    return ""


def overrides_of(line: Line) -> Iterator[tuple[str, str, int]]:
    if " " not in line.text and line.where.startswith("pipelines/settings") and line.text.startswith("hydra"):
        return  # handed to Hydra
    for match in _OVERRIDE.finditer(line.text):
        if re.search(r"(^|\w )has (\S+=\S+,? )*(with )?$", line.text[: match.start()]):
            continue  # `model.pattern has first=4`: an entry is described
        yield match["key"], match["value"].rstrip(".?!") or match["value"], match.start()


def test_every_override_that_a_message_names_can_be_typed() -> None:
    wrong = []
    for line in lines():
        for key, value, _ in overrides_of(line):
            if complaint := typed_as(line, key, value):
                wrong.append(f"{line.where}: {key}={value}: {complaint}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "Set train.total_tokens=5.",
        "Set ⟨a_new_one⟩.lr=1.",
        "Use pretrain.compile=never, or zero=1.",
        "Use optim.lr=-1.",
        "Choose zero=7.",
        "Choose model=gpt5, or leave it.",
        "Set optim.learning_rate=⟨rate⟩.",
        "Use backend=local.",
    ],
)
def test_what_cannot_be_typed_is_found(text: str) -> None:
    line = Line("pipelines/new.py:1", text, "", False)
    assert any(typed_as(line, key, value) for key, value, _ in overrides_of(line))


def test_brackets_without_quotes_are_found() -> None:
    assert unquoted("set corpus.paths=[DIR] or '⟨key⟩=[a]'") == ["corpus.paths=[DIR]"]
    assert unquoted("set ⟨key⟩.paths=[DIR]") == ["⟨key⟩.paths=[DIR]"]


def test_every_command_that_a_message_names_has_its_verb_and_options() -> None:
    found = 0
    for line in lines():
        for match in _COMMAND.finditer(line.text):
            verb, rest = match["verb"], match["rest"]
            if verb.startswith("⟨") or verb == "cannot":
                continue
            assert verb in VERBS, f"{line.where}: athanor {verb}"
            for placeholder, value in FILLED.items():
                rest = rest.replace(f"⟨{placeholder}⟩", value)
            if rest.count("'") % 2:  # the sentence's own comma in it ended the match
                rest = rest.rpartition("'")[0]
            typed_words = shlex.split(re.sub(r"⟨[^⟩]*⟩", "1", rest).replace("…", "").replace(" ...", ""))
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    _parse(verb, typed_words)
                    left = 0
                except SystemExit as exit_:
                    left = int(exit_.code or 0)
            assert left == 0, f"{line.where}: athanor {verb} {rest}: {said.getvalue()}"
            found += 1
    assert found > 10


def test_every_program_that_a_message_names_is_called_with_what_it_takes() -> None:
    for line in lines():
        for program, rest in re.findall(r"(wandb sync|pip install)(.*)", line.text):
            shown = "⟨runs⟩" if program == "wandb sync" else r"-e|-r|⟨|[a-z][\w.-]+"
            assert re.match(rf" ({shown})", rest), f"{line.where}: {program}{rest}"


def unquoted(text: str) -> list[str]:
    """Overrides with signs that a shell reads as a pattern, which stand in no quotes."""
    return re.findall(rf"(?<![\w.'\"⟩⟨/\[]){_PART}(?:{_PART}|\.)*=\[[^\]]*\]", text)


def test_overrides_with_brackets_stand_in_quotes_that_a_shell_takes_away() -> None:
    wrong = [f"{line.where}: {word}" for line in lines() if not line.quoted for word in unquoted(line.text)]
    for path in (*CONF_DIR.rglob("*.yaml"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        shown = re.findall(r"#.*" if path.suffix == ".yaml" else r"^    athanor .*|`athanor [^`]*`", text, re.MULTILINE)
        wrong += [f"{path.name}: {word}" for line in shown for word in unquoted(line)]
    assert not wrong, "\n".join(wrong)


def test_every_dotted_setting_that_a_message_names_is_one() -> None:
    sections = "|".join(name for name in field_types(Settings) if types_at(Settings, [name]) not in ([str], [int]))
    wrong = []
    for line in lines():
        if line.where.startswith("model/") or " " not in line.text:
            continue
        for name in re.findall(
            rf"(?<![\w./⟩'-])((?:{sections})(?:\.[a-z_]+)+)(?![\w/(.])", re.sub("⟨[^⟩]*⟩", "⟨⟩", line.text)
        ):
            if not _known(name) and name.rpartition(".")[2] not in FILES:
                wrong.append(f"{line.where}: {name}")
    assert not wrong, "\n".join(wrong)


FILES = ("json", "jsonl", "safetensors", "html", "md", "yaml", "py", "bin", "model")
"""Endings of names that are no settings."""


def _refusal(*overrides: str) -> str:
    tuned = [] if any(word.startswith("finetune") for word in overrides) else ["finetune=none"]
    try:
        settings = compose(["experiment=demo", *tuned, *overrides])
        settings.check_sizes()
        settings.pretraining()
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "advised"),
    [
        ("model.norm.kind=rms model.norm.bias=true", {"model.norm.kind": "layer"}),
        ("model.mixer.kind=mamba", {"model.position.kind": "none"}),
        (
            "model.position.kind=alibi model.mixer.kind=longformer model.causal=false objective=masked_token",
            {"model.position.kind": "none"},
        ),
        ("model.mixer.kind=longformer model.position.kind=none objective=masked_token", {"model.causal": "false"}),
        (
            "model=t5-small objective=span_denoising model.encoder.head.kind=language",
            {"model.encoder.head.kind": "none"},
        ),
        ("model=t5-small objective=span_denoising model.encoder.norm.bias=true", {"model.encoder.norm.kind": "layer"}),
        ("zero=3 zero.expert_parallel=2 optim=adamw", {"zero.stage": "2", "zero.expert_parallel": "1"}),
        ("zero=2 optim=muon", {"zero.stage": "0", "optim": "adamw"}),
        ("pretrain.global_batch_tokens=1000", {"pretrain.global_batch_tokens": "768"}),
        ("compute.ranks=3", {"pretrain.global_batch_tokens": "1536"}),
        ("finetune.train.global_batch_tokens=1000", {"finetune.train.global_batch_tokens": "768"}),
        ("pretrain.micro_batch_rows=3", {"pretrain.micro_batch_rows": "2"}),
        ("tokenizer.vocab_size=500", {"tokenizer.vocab_size": "512"}),
        ("tokenizer.vocab_size=384 tokenizer.sentinel_pieces=100", {"tokenizer.vocab_size": "512"}),
        ("compute.ranks=0", {"compute.ranks": "1"}),
    ],
)
def test_a_refusal_is_gone_when_what_it_advises_is_typed(overrides: str, advised: dict[str, str]) -> None:
    said = _refusal(*overrides.split())
    remedies = {m["key"]: m["value"].rstrip(".,") for m in _OVERRIDE.finditer(said) if m["key"] in advised}
    for key, value in advised.items():
        assert re.search(rf"(?<![\w.]){re.escape(key)}={value}\b", said), said
        remedies[key] = value
    for key, value in remedies.items():
        assert _refusal(*overrides.split(), f"{key}={value}") == ""


@pytest.mark.parametrize("characters", [130, 384, 700])
@pytest.mark.parametrize("size", [384, 512, 4096])
def test_a_vocabulary_that_does_not_suit_the_text_is_answered_with_one_that_does(
    characters: int, size: int, tmp_path: Path
) -> None:
    texts = ["".join(chr(0x4E00 + i) for i in range(characters)) + "\n"] * 20
    try:
        train_tokenizer(texts, TokenizerSettings(vocab_size=size), tmp_path / "first")
    except Refusal as error:
        [advised] = re.findall(r"[Ss]et tokenizer\.vocab_size=(\d+)", str(error))
        train_tokenizer(texts, TokenizerSettings(vocab_size=int(advised)), tmp_path / "advised")
    else:
        assert characters + 256 < size


def test_a_text_too_small_for_any_vocabulary_is_told_the_smallest_one(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"299 distinct pieces\. The smallest vocabulary is tokenizer\.vocab_size=384"):
        train_tokenizer(["the cat sat on the mat\n"] * 5, TokenizerSettings(vocab_size=384), tmp_path)


def test_a_ray_that_does_not_start_is_no_end() -> None:
    def connect() -> None:
        raise RuntimeError("timed out")

    with pytest.raises(Refusal, match=r"timed out.*compute\.backend=local") as refused:
        _in_lasting_thread(connect)
    [advised] = re.findall(r"compute\.\w+=\w+", str(refused.value))
    assert compose(["experiment=demo", advised]).compute.backend == "local"
