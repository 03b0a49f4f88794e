"""One direction: a module imports only from the rooms to its left; and the public names are there."""

import ast
from pathlib import Path

import pytest

import peft_perta

ROOMS = [  # from left to right
    "errors",
    "memory",
    "config",
    "data",
    "losses",
    "layers",
    "stack",
    "borrow",
    "targets",
    "edit",
    "statistics",
    "moments",
    "granularities",
    "directions",
    "factorize",
    "allocation",
    "fits",
    "processes",
    "checkpoint",
    "plan",
    "gradients",
    "weightings",
    "report",
    "card",
    "output",
    "adapter",
    "loading",
    "metrics",
    "logs",
    "strength",
    "evaluation",
    "suites",
    "general",
    "attacks",
    "calibration",
    "divergence",
    "picture",
    "fuse",
    "merge",
    "verification",
    "methods",
    "training",
    "page",
    "evidence",
    "demo",
    "comparison",
    "cli",
    "__init__",
    "__main__",
]
PACKAGE = Path(peft_perta.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST, path: Path) -> set[str]:
    """The rooms of our own package that the code under ``tree`` imports from."""
    rooms = set()
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".") if node.module else []
            if node.level:
                names = [*inside[: len(inside) - node.level + 1], *names]
            elif names[:1] == ["peft_perta"]:
                names = names[1:]
            else:
                continue
            rooms |= {names[0]} if names else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "peft_perta":
                    rooms.add(".".join(alias.name.split(".")[1:2]) or "__init__")
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_left(path):
    room = room_of(path)
    assert room in ROOMS, f"{room} has no place in the order; give it one"
    left = set(ROOMS[: ROOMS.index(room)])
    tree = ast.parse(path.read_text())
    found = imported_rooms(tree, path) - {room, "__version__"}
    assert found <= left, f"{room} imports from its right: {sorted(found - left)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_imports_from_the_package(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assert not imported_rooms(node, path), f"{path.name}:{node.lineno}"


def test_siblings_in_a_folder_form_no_cycle():
    for folder in (path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()):
        edges = {
            file.stem: {
                node.module.split(".")[0]
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
            }
            for file in folder.glob("*.py")
        }
        while edges:
            leaves = {name for name, imports in edges.items() if not imports & set(edges)}
            assert leaves, f"{folder.name}: a cycle among {sorted(edges)}"
            edges = {name: imports for name, imports in edges.items() if name not in leaves}


def test_every_public_name_is_there():
    assert len(set(peft_perta.__all__)) == len(peft_perta.__all__)
    for name in peft_perta.__all__:
        assert getattr(peft_perta, name).__doc__ or isinstance(getattr(peft_perta, name), dict)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("DataError", ValueError),
        ("AdapterError", ValueError),
        ("UnsupportedLayerError", TypeError),
        ("NumericalError", ArithmeticError),
        ("OutputError", OSError),
    ],
)
def test_an_error_is_also_the_builtin_that_a_caller_would_catch(name, builtin):
    error = getattr(peft_perta, name)
    assert issubclass(error, peft_perta.PerTAError)
    assert issubclass(error, builtin)
