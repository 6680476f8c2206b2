"""The lists of packages agree: pyproject.toml, requirements.lock, environment.yml, binder/requirements.txt.

The last is enough for what reads committed results and trains nothing.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def test_conda_environment_has_the_pins_of_the_lock():
    locked = pins((REPOSITORY / "requirements.lock").read_text().split())
    (by_pip,) = (
        entry["pip"]
        for entry in yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
        if isinstance(entry, dict)
    )
    conda = pins(by_pip)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = {canonical(name) for name in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert set(conda) == wanted
    assert conda == {name: locked[name] for name in wanted}


def test_lock_pins_every_line_once_and_names_no_host():
    lines = [line for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len(pins(lines)) == len(lines)


BINDER = REPOSITORY / "binder" / "requirements.txt"
READERS = ("06_theory", "00_tour", "05_claims", "07_predictions", "08_controls", "12_geometry", "explore")
# Runs notebooks one after the other in a process that can import what the list brings, and nothing else of this one's:
# the first whole, of the others, which take long, the cells that import.
READ = """
import importlib.abc, json, re, sys
from importlib import metadata
from packaging.requirements import Requirement

def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()

listed, wanted = set(), sys.argv[1].split()
while wanted:
    name = canonical(wanted.pop())
    if name not in listed:
        listed.add(name)
        needs = [Requirement(text) for text in metadata.requires(name) or []]
        wanted += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
brought = {
    module: {canonical(name) for name in names} & (listed | {"nondecoupling"})
    for module, names in metadata.packages_distributions().items()
}

class OnlyWhatIsListed(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        module = fullname.partition(".")[0]
        if module != "nondecoupling" and not brought.get(module, True):
            raise ModuleNotFoundError(f"{module} is not in the list", name=module)

sys.meta_path.insert(0, OnlyWhatIsListed())
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for place, path in enumerate(sys.argv[2:]):
    for cell in json.loads(open(path, encoding="utf-8").read())["cells"]:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        imports = "parameters" in tags or re.search("^(from|import) ", source, re.MULTILINE)
        if cell["cell_type"] == "code" and (place == 0 or imports):
            shell.run_cell(source).raise_error()
    print("read", path)
print("torch" in sys.modules)
"""


def test_what_reads_results_needs_what_binder_installs_and_no_torch(tmp_path):
    binder = pins(BINDER.read_text().split())
    assert binder == {name: pins((REPOSITORY / "requirements.lock").read_text().split())[name] for name in binder}
    paths = [str(REPOSITORY / "notebooks" / f"{name}.ipynb") for name in READERS]
    done = subprocess.run(
        [sys.executable, "-c", READ, " ".join(binder), *paths],
        cwd=REPOSITORY / "notebooks",
        env=os.environ | {"NONDECOUPLING_RESULTS": str(tmp_path), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("read ")] == [f"read {path}" for path in paths]
    assert lines[-1] == "False"
