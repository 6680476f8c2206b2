"""The three lists of packages agree: pyproject.toml, requirements.lock, environment.yml."""

import re
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
