"""The picture of the code, held: a part imports only what stands to its left, and nothing imports in a circle."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"emulator"},
    {"reference", "runtime", "tuning", "_intercept"},
    {"ops"},
    {"layers"},
    {"models"},
    {"swap", "_warmup", "_checkpointing", "_inference", "maps"},
    {"hf", "lightning"},
    {"tools"},  # the package itself is empty
    {"testing", "tools._interrupt"},
    {"tools.console", "tools.tables"},
    {"tools.names"},
    {"tools.aot", "tools.demo", "tools.hub"},
    {"tools.verify"},
    {"tools.cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MODULES = sorted((ROOT / "vitkernels").rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Every module that ``file`` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str | None:
    """The part of the picture that ``module`` belongs to; the tools are parts of their own."""
    head, *rest = module.split(".")
    return ".".join(rest[: 2 if rest[:1] == ["tools"] else 1]) or None if head == "vitkernels" else None


def test_every_part_has_its_place():
    assert {part(module_name(f)) for f in MODULES} - {None} == set(LEVEL)


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_imports_point_left(file):
    mine = part(module_name(file))
    if mine is None:
        assert not [m for m in imports(file) if part(m)], "vitkernels/__init__.py imports its parts when they are used"
        return
    for theirs in {part(m) for m in imports(file)} & set(LEVEL):
        assert theirs == mine or LEVEL[theirs] < LEVEL[mine], f"{mine} imports {theirs}"


def test_only_ops_aot_and_the_emulator_import_triton():
    for file in MODULES:
        if any(m == "triton" or m.startswith("triton.") for m in imports(file)):
            assert module_name(file) == "vitkernels.ops._triton" or part(module_name(file)) in (
                "tools.aot",
                "emulator",
            ), file


def test_ops_know_no_modules():
    for file in MODULES:
        if part(module_name(file)) == "ops":
            assert not [m for m in imports(file) if m.startswith("torch.nn")], file


def test_no_circles():
    edges = {module_name(f): imports(f) & {*map(module_name, MODULES)} for f in MODULES}
    # A package's own files may name it: only real edges between files count.
    for a, b in itertools.combinations(sorted(edges), 2):
        related = a.startswith(b + ".") or b.startswith(a + ".")
        assert related or not (b in edges[a] and a in edges[b]), f"{a} and {b} import each other"


def test_nothing_imports_tests():
    files = [f for folder in ("vitkernels", "examples", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    assert any("examples" in f.parts for f in files)
    for file in files:
        assert "tests" not in {m.split(".")[0] for m in imports(file)}, file


def test_library_asserts_nothing_of_users():
    for file in MODULES:
        asserts = [n.lineno for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Assert)]
        # check_op is an assertion by trade.
        assert not asserts or module_name(file) == "vitkernels.testing.compare", f"{file}:{asserts}"
