"""Tokenizers of other models: tokenizer.json beside weights from outside, through Hugging Face's `tokenizers`.

    HuggingFaceTokenizer.read(folder)         # what `Tokenizer.load` gives for such a folder

Which piece does what is read from the folder, in this order: tokenizer_config.json, special_tokens_map.json, the ids of
config.json and generation_config.json, what tokenizer.json puts around a text, and the two usual names of a mask and of
padding. Nothing hangs on the family of the model.

A control piece is never made from text, although some vocabularies (T5's) hold its spelling: in memory each is renamed to
a stand-in between two noncharacters of Unicode (U+FDD0, U+FDD1), which every text loses first (they become U+FFFD).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.refusal import NO_VALUE, Refusal
from data.tokenizers.base import SURROGATES, TEMPLATE_FILE, Spans, Tokenizer, half_a_pair

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has the cores it was given, and ranks fork

import tokenizers

TOKENIZER_FILE, CONFIG_FILE, MAP_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
IDS_FILES = ("generation_config.json", "config.json")
VOCABULARY_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""What tokenizer.json was converted from: of no use here, kept for programs that read nothing else."""
FILES = (TOKENIZER_FILE, CONFIG_FILE, MAP_FILE, "added_tokens.json", TEMPLATE_FILE, *VOCABULARY_FILES)

BEGINS, ENDS = ("bos_token", "cls_token"), ("eos_token", "sep_token")
ROLES = (*BEGINS, *ENDS, "pad_token", "unk_token", "mask_token")
USUAL_NAMES = {"mask_token": ("[MASK]", "<mask>"), "pad_token": ("[PAD]", "<pad>")}

STAND_IN = "\ufdd0{}\ufdd1"
TEXT_ONLY = str.maketrans("\ufdd0\ufdd1", "\ufffd\ufffd")

PLAIN_TEMPLATE = """\
{{- BOS -}}
{%- for message in messages -%}
  {{- message['role'] | capitalize ~ ':' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- ' ' ~ message['content'] ~ EOS -}}{%- endgeneration -%}{{- '\\n\\n' -}}
  {%- else -%}
    {{- ' ' ~ message['content'] ~ '\\n\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
"""For a folder without a chat template: a model that was never tuned has no pieces for roles, and gets no new ones. The
roles are text, so a message can imitate them; a chat_template.jinja in the folder is used instead of this."""


class HuggingFaceTokenizer(Tokenizer):
    """tokenizer.json as it stands, but for what it puts around texts: that is the packing's work here.

    bos_id: `bos_token`, or a `cls_token`; a model without either was trained on texts that only follow one another's end, so
    its documents begin with `eos_id`, as GPT-2's do. eos_id: `eos_token`, or a `sep_token`. pad_id: `eos_id` where there is
    none. Texts may come back changed (lower case, no line breaks): that is how the model reads. text_pieces: special pieces
    that are the only spelling of a character (a `!` that pads): they are text, and their ids serve all the same.
    """

    keeps_text = False

    def __init__(
        self,
        definition: str,
        special: Mapping[str, str],
        chat_template: str | None,
        template_origin: str = TEMPLATE_FILE,
    ) -> None:
        """definition: content of tokenizer.json. special: the piece of each of ROLES, and more special pieces."""
        self._made_from = (definition, dict(special), chat_template, template_origin)
        content = json.loads(definition)
        added = _added(content, special)
        all_ids = {piece["content"]: int(piece["id"]) for piece in added}
        self.text_pieces = _only_spellings(content, added)
        added = [piece for piece in added if piece["content"] not in self.text_pieces]
        self.control_ids = {piece["content"]: int(piece["id"]) for piece in added if piece["special"]}
        self._stand_in = {number: STAND_IN.format(number) for number in self.control_ids.values()}
        _rename(content, added, {piece: self._stand_in[number] for piece, number in self.control_ids.items()})
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.template_names = {role: piece for role, piece in special.items() if role.endswith("_token")}
        self._check_ids()

        ids = {role: all_ids[piece] for role, piece in self.template_names.items()}
        begin, end = (next((ids[role] for role in roles if role in ids), None) for roles in (BEGINS, ENDS))
        if end is None:
            raise Refusal(
                CONFIG_FILE,
                NO_VALUE,
                "does not say which piece ends a text",
                'name it there, as in "eos_token": "</s>"',
            )
        self.eos_id = end
        self.bos_id = end if begin is None else begin
        self.pad_id = ids.get("pad_token", end)
        self.unk_id = ids.get("unk_token")
        self.mask_piece = mask if (mask := special.get("mask_token")) in self.control_ids else None
        self.brings_template = chat_template is not None
        self.template_origin = template_origin if self.brings_template else None
        first, last = (json.dumps(self.piece(number)) for number in (self.bos_id, self.eos_id))
        self.chat_template = chat_template or PLAIN_TEMPLATE.replace("BOS", first).replace("EOS", last)

    @classmethod
    def read(cls, folder: Path) -> HuggingFaceTokenizer:
        """Raises Refusal where tokenizer.json does not load or no piece ends a text."""
        try:
            definition = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
            config, named = _json(folder / CONFIG_FILE), _json(folder / MAP_FILE)
            special = dict(_special(json.loads(definition), config, named, config_ids(folder)))
            return cls(definition, special, *_template(folder, config))
        except Refusal as refusal:  # of one of these files
            raise Refusal(folder / refusal.where, refusal.value, refusal.rule, refusal.remedy) from refusal
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise Refusal(
                folder, NO_VALUE, f"holds no tokenizer that can be read: {TOKENIZER_FILE}: {error}"
            ) from error

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[str, dict[str, str], str | None, str]]:
        return type(self), self._made_from

    def _check_ids(self) -> None:
        """`tokenizers` gives new ids to added pieces whose own it does not like."""
        for piece, number in self.control_ids.items():
            if (found := self._tokenizer.token_to_id(self._stand_in[number])) != number:
                raise Refusal(
                    TOKENIZER_FILE, NO_VALUE, f"gives {piece!r} the id {number} and its vocabulary {found}", "repair it"
                )

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [text.translate(TEXT_ONLY) for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)]

    def _decode_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False))

    def piece(self, number: int) -> str:
        """Return a piece as tokenizer.json spells it."""
        return self._control_names.get(int(number)) or str(self._tokenizer.id_to_token(int(number)))

    def characters(self, text: str) -> Spans:
        """As `tokenizers` tells it; what a normalizer drops belongs to no token."""
        return self.encode_parts([text])[1]

    def encode_parts(self, parts: Sequence[str | int]) -> tuple[list[int], Spans]:
        """All in one, as transformers does: what a text begins with may hang on the control piece before it."""
        if any(isinstance(part, str) and SURROGATES.search(part) for part in parts):
            raise half_a_pair()
        spelled = [part.translate(TEXT_ONLY) if isinstance(part, str) else self._stand_in[part] for part in parts]
        found = self._tokenizer.encode("".join(spelled), add_special_tokens=False)
        place: list[int] = []
        at = 0
        for part, text in zip(parts, spelled, strict=True):
            place += range(at, at + len(text)) if isinstance(part, str) else [at] * len(text)
            at += len(text) if isinstance(part, str) else 1
        place_C = np.array([*place, at], dtype=np.int64)
        begin_N, end_N = np.array(found.offsets, dtype=np.int64).reshape(-1, 2).T
        ends_N = np.where(end_N > begin_N, place_C[np.maximum(end_N - 1, 0)] + 1, place_C[begin_N])
        return found.ids, np.stack([place_C[begin_N], ends_N], axis=1)


def config_ids(folder: Path) -> dict[str, int]:
    """What config.json and generation_config.json of a folder say of the ids that texts begin, end and are padded with."""
    said: dict[str, int] = {}
    for name in IDS_FILES:
        for key, value in _json(folder / name).items():
            first = value[0] if isinstance(value, list) and value else value
            if key in ("bos_token_id", "eos_token_id", "pad_token_id") and isinstance(first, int):
                said.setdefault(key, first)
    return said


def read_foreign(folder: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer in tokenizer.json; without that file, what to do about it."""
    if (folder / TOKENIZER_FILE).is_file():
        return HuggingFaceTokenizer.read(folder), ""
    if not any((folder / name).is_file() for name in (*VOCABULARY_FILES, CONFIG_FILE)):
        return None, f"there is no {TOKENIZER_FILE}"
    return None, (
        f'there is no {TOKENIZER_FILE}. transformers makes one of the files there are: python -c "from transformers import '
        f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def _special(
    content: Mapping[str, Any], config: Mapping[str, Any], named: Mapping[str, Any], ids: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """(role, piece), and ("more N", piece) for special pieces that have no role."""
    added = [*content.get("added_tokens", []), *_decoder(config)]
    special = {int(token["id"]): str(token["content"]) for token in added if token["special"]}
    around, spelled = _around(content.get("post_processor") or {}), set(special.values())
    for role in ROLES:
        usual = (name for name in USUAL_NAMES.get(role, ()) if name in spelled)
        said = (
            _content(config.get(role)),
            _content(named.get(role)),
            special.get(ids.get(f"{role}_id", -1)),
            around.get(role),
            _content((content.get("model") or {}).get("unk_token")) if role == "unk_token" else None,
            next(usual, None),
        )
        if piece := next((piece for piece in said if piece), None):
            yield role, piece
    more = [token for key in ("additional_special_tokens", "extra_special_tokens") for token in _more(config.get(key))]
    for number, token in enumerate((*special.values(), *more)):
        yield f"more {number}", token


def _around(processor: Mapping[str, Any]) -> dict[str, str]:
    """The special pieces that tokenizer.json puts first and last, where it puts both, as BERT's and RoBERTa's."""
    for step in processor.get("processors", [processor]):
        if "cls" in step and "sep" in step:
            return {"cls_token": step["cls"][0], "sep_token": step["sep"][0]}
        single = [item.get("SpecialToken", {}).get("id") for item in step.get("single") or ()]
        if len(single) > 2 and single[0] and single[-1]:
            return {"cls_token": single[0], "sep_token": single[-1]}
    return {}


def _added(content: Mapping[str, Any], special: Mapping[str, str]) -> list[dict[str, Any]]:
    """The added pieces of tokenizer.json by rising id, with those that only the other files call special."""
    pieces = set(special.values())
    added = {
        token["content"]: {**token, "special": token["special"] or token["content"] in pieces}
        for token in content.get("added_tokens", [])
    }
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece: at for at, (piece, _) in enumerate(vocabulary)}
    for piece in pieces - added.keys():
        if piece not in ids:
            raise Refusal(
                TOKENIZER_FILE, NO_VALUE, f"lacks the special piece {piece!r}", "save the tokenizer again with it"
            )
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added[piece] = {"id": ids[piece], "content": piece, **flags, "special": True}
    return sorted(added.values(), key=lambda token: int(token["id"]))


def _only_spellings(content: Mapping[str, Any], added: list[dict[str, Any]]) -> tuple[str, ...]:
    """The special pieces of one character that the vocabulary holds: renamed, no text could be spelled with it."""
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    known = vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    return tuple(p["content"] for p in added if p["special"] and len(p["content"]) == 1 and p["content"] in known)


def _rename(content: dict[str, Any], added: list[dict[str, Any]], names: Mapping[str, str]) -> None:
    """Control pieces to their stand-ins, everywhere in a tokenizer.json; nothing around texts, and no chance."""
    model = content["model"]
    content["added_tokens"] = [{**token, "content": names.get(token["content"], token["content"])} for token in added]
    content.update(post_processor=None, truncation=None, padding=None)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    if "dropout" in model:
        model["dropout"] = None


def _template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The folder's chat template, and where it is: its own file, or in tokenizer_config.json, where it may be one of
    several."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8"), str(folder / TEMPLATE_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise Refusal(
            CONFIG_FILE, NO_VALUE, f"its chat_template is {str(template)[:40]!r} and has to be a text, in Jinja"
        )
    return template, f"chat_template in {folder / CONFIG_FILE}"


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A special piece as these files write it: a string, or a record with `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _more(tokens: Any) -> list[str]:
    listed = tokens.values() if isinstance(tokens, Mapping) else tokens or ()
    return [piece for token in listed if (piece := _content(token))]


def _decoder(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"id": int(number), **token} for number, token in (config.get("added_tokens_decoder") or {}).items()]
