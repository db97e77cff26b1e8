"""The house in numbers: files, functions, docstrings, the longest import chain, type switches, quoted step names.

    python benchmarks/structure.py [ROOT]

Switches are `isinstance(x, …Config | …Settings)` outside the file that defines the class. An import counts if it is executed
at import time or inside a function; names that only annotations need (under TYPE_CHECKING) do not.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import statistics
import sys
from pathlib import Path

ROOMS = ("pipelines", "model", "data", "conf", "cluster")
STEPS = (
    "start",
    "corpus",
    "tokenizer",
    "shards",
    "instructions",
    "pretrain",
    "finetune",
    "evaluate",
    "export",
    "report",
)


def main(root: Path) -> dict[str, object]:
    """Every figure by name."""
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8")) for room in ROOMS for path in (root / room).rglob("*.py")
    }
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None)
    lines = {path: len(path.read_text(encoding="utf-8").split("\n")) for path in trees}
    public = [node for node in definitions(trees) if not node.name.startswith("_")]
    return {
        "files": len(trees),
        "lines": sum(lines.values()),
        "longest file": max((count, str(path.relative_to(root))) for path, count in lines.items()),
        "functions": len(functions),
        "function lines, median and 90th percentile": (statistics.median(lengths), lengths[len(lengths) * 9 // 10]),
        "public things with a docstring": round(
            sum(ast.get_docstring(node) is not None for node in public) / len(public), 3
        ),
        "longest import chain": longest_chain(trees, root),
        "switches": switches(trees),
        "files that quote a step's name": quoting(trees, root),
    }


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def definitions(trees: dict[Path, ast.Module]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of modules and of classes."""
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for tree in trees.values():
        for node in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
            found += [n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return found


def imports(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports when it runs."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    found: set[str] = set()
    for node in ast.walk(ast.Module(body=body, type_ignores=[])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def longest_chain(trees: dict[Path, ast.Module], root: Path) -> list[str]:
    """The longest path of modules that import one another."""
    module_of = {".".join(path.relative_to(root).with_suffix("").parts): path for path in trees}
    edges = {
        path: {module_of[name] for name in imports(tree) if name in module_of} - {path} for path, tree in trees.items()
    }

    @functools.cache
    def chain(path: Path) -> tuple[Path, ...]:
        return (path, *max((chain(other) for other in edges[path]), key=len, default=()))

    return [str(path.relative_to(root)) for path in max(map(chain, trees), key=len)]


def switches(trees: dict[Path, ast.Module]) -> int:
    """`isinstance` against settings classes of other files."""
    count = 0
    for tree in trees.values():
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2:
                named = re.findall(r"\w+(?:Config|Settings)\b", ast.unparse(node.args[1]))
                count += bool(set(named) - own)
    return count


def quoting(trees: dict[Path, ast.Module], root: Path) -> dict[str, int]:
    """For each step the number of files with its name as a string."""
    texts = {
        path: {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        for path, tree in trees.items()
    }
    return {step: sum(step in strings for strings in texts.values()) for step in STEPS}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()), indent=1))
