"""The files of the library as parsed modules: their definitions and their imports."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "primechat"

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """A file of primechat: its dotted name below `primechat` and its text."""

    name: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def definitions(self) -> list[tuple[Definition, ast.AST]]:
        """Functions and classes with what they stand in."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        pairs = (
            (child, parent)
            for parent in ast.walk(self.tree)
            for child in ast.iter_child_nodes(parent)
        )
        return [(child, parent) for child, parent in pairs if isinstance(child, kinds)]

    @cached_property
    def imports(self) -> list[tuple[str, int, str]]:
        """What is imported anywhere: (dotted name, line, when), when is `start`, `lazy` or `typing`."""
        found: list[tuple[str, int, str]] = []
        here = ("primechat." + self.name).split(".")
        package = here if self.is_package else here[:-1]

        def visit(node: ast.AST, when: str) -> None:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                for child in node.body:
                    visit(child, "typing")
                for child in node.orelse:
                    visit(child, when)
                return
            if isinstance(node, ast.Import):
                found.extend((alias.name, node.lineno, when) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*start, *([node.module] if node.module else [])])
                found.extend((f"{base}.{alias.name}", node.lineno, when) for alias in node.names)
            elif (
                isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
            ):
                if ast.unparse(node.func).endswith(("import_module", "__import__")):
                    found.append((str(node.args[0].value), node.lineno, when))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                when = "lazy" if when == "start" else when
            for child in ast.iter_child_nodes(node):
                visit(child, when)

        visit(self.tree, "start")
        return found


def read_house() -> list[Module]:
    modules = []
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return modules
