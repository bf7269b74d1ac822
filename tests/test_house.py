"""The rules of the house: a wing imports those below it, nothing imports the commands, there is no cycle, files are short,
and every public function and class says what it does."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a wing may import of dpo_fast. `losses`, `loss_options` and `loss_table` are the objective; None: everything.
OBJECTIVE = {"loss_table", "loss_options", "losses"}
MAY_IMPORT = {
    "loss_table": set(),
    "loss_options": {"loss_table"},
    "losses": {"loss_table", "loss_options"},
    "reference": set(),
    "kernels": {"kernels"},
    "backends": {"backends", "reference", "kernels"} | OBJECTIVE,
    "ops": {"ops", "backends"} | OBJECTIVE,
    "forest": {"forest", "ops", "backends"} | OBJECTIVE,
    "data": {"data", "forest.packing", "forest.trie"},
    "training": {"training", "data", "forest", "ops", "backends", "__init__"} | OBJECTIVE,
}
LONGEST = 300  # lines of a file
# extension.py has the launchers that eager.py documents.
DOCUMENTED_ELSEWHERE = {"backends.extension"}
COMMANDS = {"train", "info", "cli", "demo", "integrations", "loop", "generate", "annotate", "labels"}


def modules():
    """Module name below dpo_fast -> file."""
    found = {}
    for folder, prefix in ((ROOT / "dpo_fast", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = prefix + path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
            found[".".join(parts)] = path
    return found


def imports(name, path, known):
    """Modules of dpo_fast that the file imports, in functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    package = "" if name == "__init__" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".") if package else []
            base = base[: len(base) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else base
            target = ".".join(target)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpo_fast":
            target = node.module[len("dpo_fast.") :]
        elif isinstance(node, ast.Import):
            yield from (a.name[len("dpo_fast.") :] for a in node.names if a.name.startswith("dpo_fast."))
            continue
        else:
            continue
        for alias in node.names:
            inner = f"{target}.{alias.name}" if target else alias.name
            yield inner if inner in known else target or "__init__"


@functools.cache
def graph():
    found = modules()
    return {name: set(imports(name, path, found)) - {name} for name, path in found.items()}


def wing(name):
    return name.split(".")[0]


def test_every_module_has_a_wing():
    assert {wing(name) for name in modules()} <= set(MAY_IMPORT) | COMMANDS | {"__init__"}


def test_wings_import_what_lies_below():
    for name, targets in graph().items():
        allowed = MAY_IMPORT.get(wing(name))
        for target in targets if allowed is not None else ():
            assert wing(target) in allowed or target in allowed, f"{name} imports {target}"


def test_nothing_imports_the_commands():
    for name, targets in graph().items():
        if wing(name) not in COMMANDS:
            assert not {target for target in targets if wing(target) in COMMANDS}, name


def test_no_cycle():
    open_ = {name: {t for t in targets if t != "__init__"} for name, targets in graph().items()}
    while leaves := {name for name, targets in open_.items() if not targets & open_.keys()}:
        open_ = {name: targets for name, targets in open_.items() if name not in leaves}
    assert not open_, f"these import each other: {sorted(open_)}"


def undocumented(tree):
    """The public functions and classes at the top of a module that have no docstring, and "module" where it has none."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return ["module"] * (ast.get_docstring(tree) is None) + [x.name for x in named if ast.get_docstring(x) is None]


def test_every_public_name_has_a_docstring():
    missing = {
        name: undocumented(ast.parse(path.read_text())) for name, path in modules().items() if path.stat().st_size
    }
    assert not {name: found for name, found in missing.items() if found and name not in DOCUMENTED_ELSEWHERE}


def test_files_are_short():
    files = [*modules().values(), *(path for path in (ROOT / "csrc").rglob("*.*") if path.is_file())]
    files += [path for folder in ("tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST}


def named_tests(text):
    """(file, test) of every `file.py::test` in a page; `::test` alone is of the file before it."""
    found, file = [], ""
    for there, name in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text):
        file = there or file
        found.append((file, name))
    return found


def test_the_tests_that_the_docs_name_are_there():
    named = {(page.name, *found) for page in (ROOT / "docs").glob("*.md") for found in named_tests(page.read_text())}
    assert named
    assert not {
        (page, file, name) for page, file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()
    }
    assert named_tests("`test_a.py::test_b`, `::test_c`") == [("test_a.py", "test_b"), ("test_a.py", "test_c")]


def test_a_missing_docstring_would_be_seen():
    tree = ast.parse('def found(): pass\ndef _own(): pass\ndef told():\n    """It tells."""\nclass Bare: pass\n')
    assert undocumented(tree) == ["module", "found", "Bare"]


def test_a_wrong_import_would_be_seen(tmp_path):
    file = tmp_path / "packing.py"
    file.write_text("from ..training.config import DPOConfig\nfrom . import attention\nimport dpo_fast.train\n")
    known = {"training.config", "forest.attention", "train"}
    assert set(imports("forest.packing", file, known)) == {"training.config", "forest.attention", "train"}
