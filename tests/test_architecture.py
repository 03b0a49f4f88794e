"""The house keeps its own rules: rooms in one order, doors in one place, files and functions of a readable size."""

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path

import pytest

import peft_perta

ROOMS = [  # lower rooms first; a room imports from lower rooms alone
    "errors",
    "data",
    "model",
    "gradients",
    "evaluation",
    "adapters",
    "perta",
    "influence",
    "training",
    "html_report",
    "comparison",
    "job",
    "cli",
]
PACKAGE = Path(peft_perta.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOM_FILES = [path for path in FILES if path.parent != PACKAGE]
IMPORTED_WHEN_RUN = {
    "__init__.py",
    "cli/__init__.py",
}  # the public names, and the commands: importing torch takes seconds
TALLEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS, MOST_ENTRIES = 350, 60, 7, 15


def every(files: list[Path]):
    """Turn a check of one file into a test of all: thousands of tests of a millisecond each would take a minute."""

    def test_of(check):
        def test():
            faults = []
            for path in files:
                try:
                    check(path)
                except AssertionError as error:
                    faults.append(f"{path.relative_to(PACKAGE)}: {error}")
            assert not faults, "\n".join(faults)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return test_of


every_file, every_room_file = every(FILES), every(ROOM_FILES)


def own_imports(tree: ast.AST, path: Path) -> list[tuple[tuple[str, ...], str]]:
    """(module inside the package, name) of every import of our own code under ``tree``."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                names = inside[: len(inside) - node.level + 1] + names
            elif names[:1] == ("peft_perta",):
                names = names[1:]
            else:
                continue
            found += [(names, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [
                (tuple(alias.name.split(".")[1:]), "")
                for alias in node.names
                if alias.name.split(".")[0] == "peft_perta"
            ]
    return found


@functools.cache
def exported(room: str) -> set[str]:
    for node in ast.parse((PACKAGE / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


# Doors


@every_room_file
def test_a_room_imports_from_lower_rooms_alone(path):
    room = path.relative_to(PACKAGE).parts[0]
    lower = {*ROOMS[: ROOMS.index(room)], room}
    higher = {names[0] for names, _ in own_imports(ast.parse(path.read_text()), path) if names} - lower
    assert not higher, f"{room} imports from {sorted(higher)}, which stand above it"


@every_room_file
def test_another_room_is_entered_by_its_door(path):
    """What others need of a room stands in its ``__init__``, in ``__all__``; no file reaches past it."""
    room = path.relative_to(PACKAGE).parts[0]
    for names, name in own_imports(ast.parse(path.read_text()), path):
        if not names:
            assert name == "__version__", f"{path.name} imports {name} from the package itself"
        elif names[0] not in (room, "errors"):
            assert len(names) == 1, f"{path.name} reaches into {'.'.join(names)}; import from {names[0]}"
            assert name in exported(names[0]), f"{name} is not in {names[0]}.__all__"


@pytest.mark.parametrize("room", ROOMS[1:])
def test_an_underscore_tells_what_only_the_room_uses(room):
    used = set()
    door = PACKAGE / room / "__init__.py"
    for names, name in own_imports(ast.parse(door.read_text()), door):
        used.add(names[1] if len(names) > 1 else name)
    if room == "cli":
        return  # its files are commands, which no room imports
    for file in (PACKAGE / room).glob("*.py"):
        if file.name != "__init__.py":
            assert (file.stem in used) != file.stem.startswith("_"), f"{room}/{file.name}"


@every_file
def test_no_import_inside_a_function(path):
    if str(path.relative_to(PACKAGE)) in IMPORTED_WHEN_RUN:
        return
    for node in functions(ast.parse(path.read_text())):
        assert not own_imports(node, path), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("room", ROOMS[1:])
def test_the_files_of_a_room_form_no_circle(room):
    folder = PACKAGE / room

    def module(path: Path) -> tuple[str, ...]:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    modules = {module(path): path for path in folder.rglob("*.py")}
    edges = {}
    for name, path in modules.items():
        wanted = set()
        for names, what in own_imports(ast.parse(path.read_text()), path):
            if names[:1] == (room,):
                wanted |= {names, (*names, what)} & set(modules)
        edges[name] = wanted - {name}
    while edges:
        leaves = {name for name, imports in edges.items() if not imports & set(edges)}
        assert leaves, f"a circle among {sorted('.'.join(name) for name in edges)}"
        edges = {name: imports for name, imports in edges.items() if name not in leaves}


# Sizes


@every(FILES)
def test_a_text_file_is_utf8_in_every_locale(path):
    """``read_text()`` alone takes the encoding of the user's locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if name in ("read_text", "write_text"):
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"line {node.lineno}"


def test_a_dozen_entries():
    entries = [path for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")]
    assert len(entries) <= MOST_ENTRIES, sorted(path.name for path in entries)


@every_file
def test_a_file_is_one_room(path):
    assert len(path.read_text().splitlines()) <= TALLEST_FILE


@every_file
def test_a_function_fits_on_a_screen_and_takes_what_it_needs(path):
    public = {*peft_perta.__all__}
    for node in functions(ast.parse(path.read_text())):
        length = node.end_lineno - node.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{path.name}:{node.lineno} {node.name} has {length} lines"
        taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        taken = [name for name in taken if name not in ("self", "cls")]
        if node.name not in public:
            assert len(taken) <= MOST_PARAMETERS, f"{path.name}:{node.lineno} {node.name} takes {len(taken)} parameters"


# Words


@every_file
def test_what_others_see_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} says nothing of itself"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("name", peft_perta.__all__)
def test_a_public_docstring_names_each_argument(name):
    thing = getattr(peft_perta, name)
    if isinstance(thing, dict):
        return
    text = inspect.getdoc(thing)
    assert text, name
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    if dataclasses.is_dataclass(thing):
        arguments = [field.name for field in dataclasses.fields(thing)]
    else:
        arguments = [
            parameter.name
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    for argument in arguments:
        assert re.search(rf"^\s*(\w+, )*{argument}\b[^:\n]*:", text, re.MULTILINE), (
            f"{name} does not explain {argument}"
        )


def test_the_rooms_say_what_they_may_import():
    for room in ROOMS[1:]:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert re.search(r"^Imports from: ", text, re.MULTILINE), room


def test_the_page_on_the_architecture_is_the_codes():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+)`", page, re.MULTILINE)
    assert [row.rstrip("/").removesuffix(".py") for row in rows][: len(ROOMS)] == ROOMS


# The public names


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
