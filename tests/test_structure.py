"""The rooms of the package: who may import whom, and that importing changes nothing."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from nondecoupling.study.fingerprint import NOTEBOOKS, PACKAGE, code_of

# From which rooms a module of each may import, its own included.
MAY_IMPORT = {
    "study": {"study"},
    "task": {"study", "task"},
    "training": {"study", "task", "training"},
    "analysis": {"study", "task", "analysis"},
    "pages": {"study", "task", "training", "analysis", "pages"},
    "workflow": {"study", "task", "training", "analysis", "pages", "workflow"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(code: str) -> list[str]:
    """Dotted names that ``code`` imports anywhere, as far as the module; relative ones begin with a dot."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_every_module_is_in_a_room():
    assert {path.parent.name for path in MODULES} == set(MAY_IMPORT)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_rooms_before_its_own(path):
    rooms = set()
    for name in imports(path.read_text(encoding="utf-8")):
        assert not name.startswith(".")
        if name.partition(".")[0] == "nondecoupling":
            rooms.add(name.split(".")[1])
    assert rooms <= MAY_IMPORT[path.parent.name]


@pytest.mark.parametrize("code", [*MODULES, *sorted(NOTEBOOKS.glob("*.ipynb"))], ids=lambda path: path.name)
def test_imports_are_written_so_that_fingerprints_find_them(code):
    """`fingerprint.imported_modules` knows the form "from nondecoupling.<room> import"."""
    text = code_of(code) if code.suffix == ".ipynb" else code.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text.replace("\n%", "\n# %"))):
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.startswith("nondecoupling")]
        if isinstance(node, ast.ImportFrom):
            assert node.module != "nondecoupling"


STATE = """
import gc, importlib, json, logging, os, pkgutil, sys, warnings
for name in {others}: importlib.import_module(name)
def state():
    return {{
        "collection": gc.get_threshold(),
        "warnings": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "level": [logging.getLogger(name).level for name in ("", "bitsandbytes", "transformers", "distributed")],
        "hooks": [str(sys.excepthook), str(sys.displayhook), str(warnings.showwarning)],
        "here": os.getcwd(),
    }}
before = state()
import nondecoupling
names = [module.name for module in pkgutil.walk_packages(nondecoupling.__path__, "nondecoupling.")]
for name in names: importlib.import_module(name)
after = state()
print(json.dumps([names, {{key: [before[key], after[key]] for key in before if before[key] != after[key]}}]))
"""


def test_a_recipe_starts_without_what_its_kernel_computes_with():
    code = "import sys, nondecoupling.workflow.__main__; print({'torch', 'pandas', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_importing_the_package_changes_nothing_outside_of_it():
    """Beyond what the libraries do that it imports, which may well change all of these."""
    others = {name for path in MODULES for name in imports(path.read_text("utf-8")) if not name.startswith("nondec")}
    others |= {"torch", "transformers", "trl", "peft", "datasets"}
    others = {name for name in others if importlib.util.find_spec(name.partition(".")[0])}  # not all need be installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", STATE.format(others=sorted(others))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names, changed = json.loads(done.stdout.splitlines()[-1])
    assert {f"nondecoupling.{path.parent.name}.{path.stem}" for path in MODULES if path.stem != "__init__"} <= set(
        names
    )
    assert changed == {}
