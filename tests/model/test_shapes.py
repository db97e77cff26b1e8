"""The glossary of axes holds for the whole room."""

import ast
import re
from pathlib import Path

from model.shapes import AXES

ROOM = Path(__file__).parents[2] / "model"
SUFFIX = re.compile(r"^[a-z][a-z0-9_]*_([A-Z0-9]+)$")
CONSTANT = re.compile(r"^_?[A-Z][A-Z0-9_]*$")


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return arguments | variables | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_shape_suffix_is_spelled_with_letters_of_the_glossary() -> None:
    suffixes = {
        (path.name, name): match[1]
        for path in ROOM.rglob("*.py")
        for name in names_in(path)
        if not CONSTANT.match(name) and (match := SUFFIX.match(name)) and name not in {"lora_A", "lora_B"}
    }
    assert len(suffixes) > 50
    unknown = {where: suffix for where, suffix in suffixes.items() if not set(suffix) <= {*AXES, "1"}}
    assert not unknown


def test_every_letter_of_the_glossary_is_used() -> None:
    used = "".join(match[1] for path in ROOM.rglob("*.py") for n in names_in(path) if (match := SUFFIX.match(n)))
    assert set(AXES) <= set(used)
