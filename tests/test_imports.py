"""Imports point one way, and none in a circle; folders that are to work without torch do. Read from the sources."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("data", "export", "hw")  # m3vit/NAME is a link to NAME
HEAVY = {"torch", "torchvision", "timm", "torchjd", "lightning", "lightning_fabric"}
# CONTRIBUTING.md: a room may import those before it, and what is in none of them.
ORDER = (
    {"kinds"},
    {"tasks"},
    {"label_sets"},
    {"plugins"},
    {"data", "hw"},
    {"models"},
    {"training", "evaluation", "run_folder", "profiling"},
    {"export"},
    {"report"},
    {"commands", "cli", "demo", "__main__"},
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
PACKAGES_AS_PREDICTORS = ("m3vit.evaluation.artefacts", "m3vit.export.runtime.package")
WITH_TORCH = {f"m3vit.data.{name}" for name in ("augment", "loading", "network_input")}
WITH_TORCH |= {f"m3vit.hw.sim.{name}" for name in ("emulator", "linear", "attention", "threads")}


def _names(nodes: Iterator[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: not its functions, nor what is for type checkers."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not for_types:
            yield node
            yield from _at_import(node)


@cache
def _sources() -> dict[str, ast.Module]:
    found = {}
    for folder in ("m3vit", *LINKED):
        for path in (ROOT / folder).rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[0] == "m3vit" and parts[1] in LINKED:  # a Python that follows links
                continue
            parts = parts if parts[0] == "m3vit" else ["m3vit", *parts]
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


@cache
def _any() -> dict[str, set[str]]:
    """Return what each module imports, within functions or not."""
    return {name: _names(ast.walk(tree)) for name, tree in _sources().items()}


@cache
def _eager() -> dict[str, set[str]]:
    """Return what importing each module imports."""
    return {name: _names(_at_import(tree)) for name, tree in _sources().items()}


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def _needs(name: str) -> set[str]:
    """Return the modules of ours that importing this one imports: those it names, and the packages around them."""
    named = {one for one in _eager()[name] if one in _sources()}
    around = {".".join(one.split(".")[:depth]) for one in named for depth in range(1, one.count(".") + 1)}
    return named | around


def test_imports_point_one_way() -> None:
    """Those within functions are for what is only sometimes needed: a kind's meter, an HLS project that is scored."""
    for name, imported in _eager().items():
        for other in imported & set(_sources()):
            if (name, other) != PACKAGES_AS_PREDICTORS:
                assert RANKS.get(_room(other), -1) <= RANKS.get(_room(name), -1), f"{name} imports {other}"


def test_no_import_ends_where_it_began() -> None:
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " > ".join([*path, name])
        if name not in done:
            for other in sorted({one for one in _eager()[name] if one in _sources()}):
                if not name.startswith(f"{other}."):  # a part of it
                    follow(other, (*path, name))
            done.add(name)

    for name in _sources():
        follow(name, ())


def test_what_is_to_work_without_torch_imports_none() -> None:
    """Within functions either, where running a package or a board is concerned; a kind's methods may."""

    def reached(name: str, seen: set[str]) -> Iterator[str]:
        if name not in seen:
            seen.add(name)
            for other in _eager()[name]:
                if other.split(".")[0] in HEAVY:
                    yield f"{name} imports {other}"
            for other in _needs(name):
                yield from reached(other, seen)

    free = ("kinds", "tasks", "label_sets", "plugins", "data", "hw", "commands", "cli", "images", "normalisation")
    for name in set(_sources()) - WITH_TORCH:
        runs_packages = name.startswith("m3vit.export.runtime")
        if runs_packages or _room(name) in free:
            assert not (found := list(reached(name, set()))), (name, found)
        if runs_packages or _room(name) == "hw":
            assert not {one.split(".")[0] for one in _any()[name]} & HEAVY, name
