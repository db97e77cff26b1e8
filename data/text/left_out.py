"""What a corpus leaves out and why, one line a reason: for the console, the card, and a refusal where nothing is left.

left_out(card)      # {"documents too short (filters.min_characters = 32)": 180, "copies of other documents": 45}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from data.text.sources import CONVERSATIONS, READABLE, REASONS
from data.text.text_stream import OF_A_CORPUS

EXCLUDED = "files that `exclude` names"

LEAKS = ("near_duplicate_of_held_out", "contains_held_out", "inside_held_out")
"""Reasons for dropping a document that shares text with held-out ones."""

_DOCUMENTS = {
    "empty": "empty documents",
    "too_short": "documents too short (filters.min_characters = {filters[min_characters]})",
    "too_long": "documents too long (filters.max_characters = {filters[max_characters]})",
    "control_characters": "documents with control characters, as binary files have "
    "(filters.max_control_fraction = {filters[max_control_fraction]})",
    "undecodable": "documents that are not UTF-8 (filters.max_replaced_fraction = {filters[max_replaced_fraction]}); "
    "recode them, as with iconv -f latin1 -t utf-8",
    "repeated_lines": "documents that repeat their lines "
    "(filters.max_repeated_line_fraction = {filters[max_repeated_line_fraction]})",
    "long_lines": "documents of long lines (filters.max_mean_line_characters = {filters[max_mean_line_characters]})",
    "few_letters": "documents with few letters (filters.min_letter_fraction = {filters[min_letter_fraction]})",
    "exact_duplicate": "copies of other documents",
    "near_duplicate": "near-copies of other documents (dedup.threshold = {dedup[threshold]})",
    "near_duplicate_of_held_out": "near-copies of held-out documents (dedup.threshold = {dedup[threshold]})",
    "contains_held_out": "documents that contain a held-out one (held_out.max_overlap = {held_out[max_overlap]})",
    "inside_held_out": "documents that are mostly held-out text (held_out.max_overlap = {held_out[max_overlap]})",
}

_CONVERSATIONS = {
    "conversations_repeated": "repeats of other conversations",
    "conversations_with_held_out_answer": "conversations whose answer is held out",
    "conversations_too_long": "conversations too long (finetune.data.max_characters)",
    "conversation_too_long": "conversations longer than a row, shards.seq_len (finetune.too_long=truncate cuts them)",
    "conversation_without_target": "conversations whose row ends before an answer begins",
    "conversations_beyond_most": "conversations beyond finetune.data.max_conversations",
    "documents_not_python": "documents that are no whole Python file",
    "functions_without_docstring_or_body": "functions without a docstring or without a body",
    "functions_not_separable": "functions that no conversation can be made of",
}


def left_out(card: Mapping[str, Any]) -> dict[str, int]:
    """Reasons and counts, of documents, lines and files, from a corpus's card (data/text/corpus.py)."""
    lines = {
        _DOCUMENTS.get(reason, f"documents: {reason.replace('_', ' ')}").format(**card["settings"]): times
        for reason, times in Counter(card["dropped"]).most_common()
    }
    return lines | _from_files(card["repaired"], card["malformed"], card["skipped_files"])


def conversations_left_out(counts: Mapping[str, Any]) -> dict[str, int]:
    """The same of conversations, from what `build_instructions` and `pack_conversations` counted."""
    lines = {description: counts[reason] for reason, description in _CONVERSATIONS.items() if counts.get(reason)}
    if refused := counts.get("conversations_refused"):
        lines[f"conversations that the chat template refuses, the first: {counts['refused'][0]}"] = refused
    return lines | _from_files(counts, counts["malformed"], counts["skipped_files"], CONVERSATIONS)


def _from_files(
    counts: Mapping[str, int], malformed: Sequence[str], skipped_files: Mapping[str, int], readable: str = READABLE
) -> dict[str, int]:
    """What reading files and listing folders left out."""
    lines, skipped = {}, Counter(skipped_files)
    if counts.get("malformed_lines"):
        lines[f"malformed lines or rows, the first: {malformed[0]}"] = counts["malformed_lines"]
    if counts.get("null_rows"):
        lines["rows without a text"] = counts["null_rows"]
    for reason in (*REASONS, EXCLUDED):
        if times := skipped.pop(reason, 0):
            lines[reason] = times
    if skipped:
        shown = ", ".join(f"{suffix} {times:,}" for suffix, times in skipped.most_common(8))
        lines[f"files of other kinds ({shown}{', …' if len(skipped) > 8 else ''}); readable are {readable}"] = (
            skipped.total()
        )
    return lines


def nothing_left(card: Mapping[str, Any], *, train: int, held_out: int, cuttable: bool) -> Refusal:
    """What to say of a corpus with nothing to train or to evaluate on: reasons and remedy. cuttable: some are text files."""
    dropped, read = Counter(card["dropped"]), card["documents_read"]
    reasons = "; ".join(f"{times:,} {reason}" for reason, times in left_out(card).items())
    if read == 0:
        details = f" (left out: {reasons})" if reasons else "; an empty file has none"
        return Refusal("corpus", NO_VALUE, f"empty, as its files hold no document{details}", "name files with text")
    if read == sum(times for reason, times in dropped.items() if reason not in LEAKS and "duplicate" not in reason):
        return Refusal(
            "corpus",
            NO_VALUE,
            f"empty, as none of its {read:,} document(s) passes the filters: {reasons}",
            "name files with text in `paths`, or loosen the `filters` named here, of corpus or of sources.NAME",
        )
    leaks = sum(dropped[reason] for reason in LEAKS)
    if leaks >= max(1, dropped.total() - leaks):
        remedy = (
            "they share that text with held-out documents; where it is a notice that all have, take it out of the files, or "
            "loosen the setting named here (null switches held_out.max_overlap off), of corpus or of sources.NAME"
        )
    else:
        remedy = "give more text" + (
            f", or cut files into more documents with a smaller max_document_characters of {OF_A_CORPUS}"
            if cuttable
            else ""
        )
    return Refusal(
        "corpus",
        NO_VALUE,
        f"of {read:,} document(s) {train} would be left to train on and {held_out} to evaluate on, and each needs at least "
        f"1; left out: {reasons or 'none'}",
        remedy,
    )
