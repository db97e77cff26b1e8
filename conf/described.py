"""What the fields of settings mean: the string under each field, read from the class's source.

described(ShardSettings)["seq_len"]       # "Tokens of a row: the context that is trained on."
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap


@functools.cache
def described(cls: type) -> dict[str, str]:
    """Field → its docstring in one line, those of base classes included; a field without one is missing."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            found |= _own(base)
    return found


def _own(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }
