"""A study: a profile, what the user changed in it (``DATA=``, ``MODEL=``, ``SET=``), and the plan that follows."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from nondecoupling.study.inputs import data_files, model_files
from nondecoupling.study.plan import Run, plan
from nondecoupling.study.profile import Profile

PROFILES = Path(__file__).parents[1] / "profiles"
MOST_SEEDS = 1000
# Settings that name a folder of the user's, and which of its files are read.
FOLDERS: dict[str, Callable[[Path], list[Path]]] = {
    "data.folder": lambda folder: list(data_files(folder).values()),
    "model.folder": model_files,
}


@dataclass(frozen=True)
class Study:
    """A profile as it will be run, its plan, the settings that the user chose, and the study's folder name."""

    name: str
    profile: Profile
    runs: tuple[Run, ...]
    chosen: frozenset[str] = frozenset()

    def run(self, name: str) -> Run:
        """The plan's entry for ``name``; ValueError names the nearest run if there is none."""
        names = [run.name for run in self.runs]
        if name not in names:
            raise ValueError(f"The plan of '{self.name}' has no run '{name}'{nearest(name, names)}.")
        return self.runs[names.index(name)]

    def runs_of(self, *groups: str) -> list[Run]:
        """The plan's entries of some groups, parents before children."""
        return [run for run in self.runs if run.group in groups or run.also in groups]

    def settings_of(self, run: Run) -> Profile:
        """The profile with what ``run`` changes.

        A run of which only the ends count is measured there, unless the user asked for a number of points.
        """
        ends = {} if run.curve or "evaluation.points" in self.chosen else {"evaluation.points": 2}
        return with_overrides(self.profile, run.changes | ends)

    def base_of(self, run: Run) -> Run:
        """The base that the policy of ``run`` goes back to."""
        while run.stage != "base":
            run = self.run(str(run.parent))
        return run


def study_of(name: str, profile: Profile, chosen: Collection[str] = ()) -> Study:
    """The study of ``profile`` with its plan; ValueError, before anything runs, where a run's settings cannot be."""
    if profile.rl.reward == "proxy":
        raise ValueError(
            "rl.reward=proxy needs a reward model, which only the controls rl-proxy and sft-rl-proxy have; run "
            "make controls."
        )
    study = Study(name, profile, tuple(plan(profile)), frozenset(chosen))
    for run in study.runs:
        study.settings_of(run)
    return study


def nearest(name: str, candidates: list[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest candidate, else the list of candidates."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (there is {', '.join(candidates)})"


def load_profile(name: str) -> Profile:
    """The profile in ``profiles/<name>.yaml``; ValueError names its first fault, or the nearest profile."""
    available = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in available:
        raise ValueError(f"There is no profile '{name}'{nearest(name, available)}.")
    path = PROFILES / f"{name}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no valid YAML: {' '.join(str(error).split())}") from None
    return validated(tree, where=path.name)


def load_study(
    profile: str = "nano", data: str = "", model: str = "", overrides: dict[str, Any] | None = None
) -> Study:
    """Load profile ``profile`` and apply the user's changes.

    ``data`` is a folder with a corpus's files, ``model`` one with a causal LM; empty keeps the profile's own.
    ``overrides`` maps dotted keys to values, e.g. ``{"rl.beta": 0.25}``. Each change becomes part of the study's name,
    and so does a short digest of all changes with the files that are read: different studies never share one.

    Raises ValueError with one sentence that names the key, what is wrong with it, and the nearest valid name.
    """
    loaded = load_profile(profile)
    changes = dict(overrides or {})
    changes |= {key: folder for key, folder in (("data.folder", data), ("model.folder", model)) if folder}
    if not changes:
        return study_of(loaded.name, loaded)
    settings = with_overrides(loaded, changes).model_dump()  # with 1 and 1.0 made alike
    changes = {key: settings[key.partition(".")[0]][key.partition(".")[2]] for key in changes}
    named = [
        slug(f"{key}={json.dumps(changes[key])}") for key in sorted(overrides or {}) if not key.endswith(".folder")
    ]
    folders = {key: changes[key] for key in FOLDERS if changes.get(key)}
    for key, folder in folders.items():
        if not Path(folder).is_dir():
            raise ValueError(f"{key}: '{folder}' is not a folder; give the path of an existing one.")
        changes[key] = str(Path(folder).resolve())
    contents = {key: digest_of(FOLDERS[key](Path(folder))) for key, folder in folders.items()}
    digest = hashlib.sha256(json.dumps(changes | contents, sort_keys=True).encode()).hexdigest()[:6]
    if len(named) > 3:  # the digest tells studies apart; the name is for reading
        named = [f"{len(named)}_settings"]
    names = [loaded.name, *(slug(Path(folder).resolve().name) for folder in folders.values()), *named]
    return study_of(f"{'-'.join(names)[:120]}-{digest}", with_overrides(loaded, changes), changes)


def inputs_of(profile: Profile) -> dict[str, str]:
    """A digest of each file that a study of ``profile`` reads from folders of the user's, by its path."""
    folders = {"data.folder": profile.data.folder, "model.folder": profile.model.folder}
    files = [path for key, folder in folders.items() if folder for path in FOLDERS[key](Path(folder))]
    return {str(path): digest_of([path]) for path in files}


def digest_of(files: Iterable[Path]) -> str:
    """A digest of some files, wherever they are: name, size, first and last mebibyte of each."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as content:
            digest.update(content.read(2**20))
            content.seek(max(0, size - 2**20))
            digest.update(content.read())
    return digest.hexdigest()


def slug(text: str) -> str:
    """``text`` as part of a folder name that make accepts in a rule."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")


def with_overrides(profile: Profile, overrides: dict[str, Any]) -> Profile:
    """A copy of ``profile`` with dotted keys replaced; ValueError for unknown keys or bad values."""
    tree = profile.model_dump()
    for key, value in overrides.items():
        section, _, field = key.partition(".")
        names = [f"{name}.{inner}" for name, part in tree.items() if isinstance(part, dict) for inner in part]
        if key not in names:
            raise ValueError(f"The profile has no setting '{key}'{nearest(key, names)}.")
        tree[section][field] = value
    return validated(tree, where="override")


def changed_settings(before: Profile, after: Profile) -> dict[str, Any]:
    """The settings in which ``after`` differs from ``before``, by dotted key."""
    old, new = before.model_dump(), after.model_dump()
    return {
        f"{section}.{key}": value
        for section, settings in new.items()
        if isinstance(settings, dict)
        for key, value in settings.items()
        if value != (old[section] or {}).get(key)
    }


def validated(tree: Any, where: str) -> Profile:
    """``tree`` as a Profile, or ValueError with one sentence about its first fault."""
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """One sentence for the first fault that pydantic found in a profile."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *section, name = map(str, fault["loc"])
        known = Profile.model_fields
        for part in section:  # the annotation of an optional section is a union
            annotation: Any = known[part].annotation
            known = next(iter(get_args(annotation)), annotation).model_fields
        return f"unknown setting '{key}'{nearest(name, list(known))}"
    if fault["type"] == "missing":
        return f"setting '{key}' is missing"
    message = fault["msg"].removeprefix("Value error, ")
    hint = ""
    if isinstance(fault["input"], str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", fault["input"]):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)"
    shown = f"'{key}' is {fault['input']!r}: " if key else ""
    return f"{shown}{message[:1].lower()}{message[1:]}{hint}"


def parse_overrides(text: str) -> dict[str, Any]:
    """``"rl.beta=0.25 sft.steps=100"`` as a dictionary; values are JSON, or plain text where they are not.

    Values with spaces are JSON strings: ``prompt.acceptable="it is" rl.beta=1``.
    """
    overrides: dict[str, Any] = {}
    for item in re.findall(r'(?:"(?:[^"\\]|\\.)*"|[^\s"])+|"', text):
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"Cannot read override '{item}': write section.key=value, for example rl.beta=0.25.")
        if key in overrides:
            raise ValueError(f"SET gives '{key}' twice; give it once.")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def parse_seeds(text: str) -> list[int]:
    """``"0-4"`` or ``"0,3,7"`` (or both, ``"0-2,7"``) as a sorted list of distinct seeds, at most `MOST_SEEDS`."""
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"Cannot read seeds '{text}': write 0-4 or 0,3,7, numbers of at most nine digits.")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(seeds) + last - first >= MOST_SEEDS:
            raise ValueError(f"Seeds '{text}' are more than {MOST_SEEDS}: run a study in parts, results add up.")
        seeds.update(range(first, last + 1))
    return sorted(seeds)
