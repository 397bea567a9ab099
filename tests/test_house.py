"""The house of CONTRIBUTING.md: every module has a row, and imports from its own or one above."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [
    re.findall(r"`([^`]+)`", line.split("|")[1])
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    if line.startswith("| `")
]
MODULES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for path in (ROOT / "mdn").rglob("*.py")
}


def row_of(module):
    """Return the number of a module's row: of its own, or of the folder that it is in."""
    for i, entries in enumerate(ROWS):
        for entry in entries:
            if module == entry or (entry.endswith("/") and module.startswith(entry)):
                return i
    return None


def imported(tree, whole):
    """Yield the modules of mdn that a module imports; `whole`: in its functions too."""
    hidden = set()
    for node in ast.walk(tree):
        typing = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        if typing or (isinstance(node, ast.FunctionDef) and not whole):
            hidden |= {*ast.walk(node)}
    for node in ast.walk(tree):
        if node in hidden or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        source = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        names = [source + alias.name for alias in node.names]
        for name in [*names, source.rstrip(".")]:
            path = name.replace(".", "/")
            for found in (f"{path}.py", f"{path}/__init__.py"):
                if found in MODULES and found != "mdn/__init__.py":
                    yield found


def test_every_module_has_a_row():
    assert len(MODULES) > 100
    assert {module for module in MODULES if row_of(module) is None} == {"mdn/__init__.py"}
    for entries in ROWS:
        for entry in entries:
            assert (ROOT / entry).exists(), entry


def test_imports_point_one_way():
    for module, tree in MODULES.items():
        if module != "mdn/__init__.py":
            for other in imported(tree, whole=True):
                assert row_of(other) <= row_of(module), f"{module} imports {other}, from below"


def test_what_must_be_light_waits_for_no_tensorflow():
    """Where an answer is due in a second, nothing that is imported at once imports TensorFlow."""
    heavy = {"tensorflow", "tensorflow_probability", "tf_keras"}
    roots = {
        module
        for module, tree in MODULES.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
        if name.split(".")[0] in heavy
    }
    assert "mdn/model.py" in roots
    light = ("cli/main", "cli/train", "config", "listing", "runs", "evaluation", "selection")
    seen, waiting = set(), [f"mdn/{name}.py" for name in light]
    while waiting:
        module = waiting.pop()
        assert module not in roots, f"{module} imports TensorFlow"
        seen.add(module)
        waiting += {*imported(MODULES[module], whole=False)} - seen


def test_nothing_runs_code_that_it_reads():
    """No built-in that runs text, no module that unpickles, no layer that holds a function."""
    modules = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
    calls = {"eval", "exec", "compile", "read_pickle", "enable_unsafe_deserialization"}
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {name.split(".")[0] for name in names} & modules, module
            elif isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in calls, module
                assert getattr(node.func, "attr", "") not in calls - {"compile"}, module
                given = {word.arg: getattr(word.value, "value", True) for word in node.keywords}
                assert not given.get("allow_pickle"), module
                assert given.get("safe_mode", True), module
            elif isinstance(node, ast.Attribute):
                assert node.attr != "Lambda", module
