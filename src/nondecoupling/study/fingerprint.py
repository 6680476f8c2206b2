"""What the result of a run depends on besides its parents: its settings and the code that it uses.

One fingerprint serves make's rules, checkpoints and the workers of a cluster. It goes by content, because times say too
much: git gives every file that it checks out a new one.
"""

import ast
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from nondecoupling.study.folders import REPOSITORY
from nondecoupling.study.plan import SUMMARIES
from nondecoupling.study.study import Study

NOTEBOOKS = REPOSITORY / "notebooks"
PACKAGE = Path(__file__).parents[1]
# Rooms whose code decides a stage's result, and a summary's. What `study` says is in the settings, what a stage's
# notebook takes from `analysis` it only shows, and pages and workflow show and carry.
OF_A_STAGE, OF_A_SUMMARY = ("task", "training"), ("analysis",)
NOTEBOOK_OF = {
    "data": "01_data",
    "base": "02_base",
    "sft": "03_sft",
    "rl": "04_rl",
    "claims": "05_claims",
    "theory": "07_predictions",
    "controls": "08_controls",
    "reward_model": "09_learnt_reward",
    "joint": "10_joint",
    "gradients": "11_gradients",
    "geometry": "12_geometry",
    "labels": "13_four_answers",
}
# Sections of the profile that decide a result, besides its parents.
SECTIONS_OF = {
    "data": ["data"],
    "base": ["data", "prompt", "model", "pretrain", "evaluation"],
    "sft": ["data", "prompt", "model", "adaptation", "sft", "evaluation"],
    "reward_model": ["data", "prompt", "model", "adaptation", "reward_model", "evaluation"],
    "rl": ["data", "prompt", "model", "adaptation", "rl", "evaluation"],
    "joint": ["data", "prompt", "model", "adaptation", "rl", "joint", "evaluation"],
    "gradients": ["data", "prompt", "model", "adaptation", "rl", "gradients", "evaluation"],
    "theory": ["data", "rl"],
    "controls": ["data", "sft", "rl"],
    "geometry": ["data", "sft", "rl"],
    "labels": ["data", "rl"],
    "claims": ["data", "rl"],
}


def kind_of(study: Study, part: str) -> str:
    """The stage of a run, or the summary's own name; ValueError names the nearest run if there is no such part."""
    return part if part in SUMMARIES else study.run(part).stage


def notebook_of(kind: str) -> Path:
    """The notebook that makes results of this kind."""
    return NOTEBOOKS / f"{NOTEBOOK_OF[kind]}.ipynb"


def fingerprint(study: Study, part: str, code: dict[str, str] | None = None) -> dict[str, Any]:
    """``settings`` and ``code`` that decide the result of a run or a summary. ``code`` may be given, where known."""
    kind = kind_of(study, part)
    profile = study.profile if part in SUMMARIES else study.settings_of(study.run(part))
    settings = {section: profile.model_dump()[section] for section in SECTIONS_OF[kind]}
    if "rl" in settings:
        settings["rl"]["grpo_beta"] = profile.rl.grpo_beta  # its formula is code that no file below is of
    return {"settings": settings, "code": code_hashes(notebook_of(kind)) if code is None else code}


def code_hashes(notebook: Path) -> dict[str, str]:
    """sha256 of the code that makes a result, by file name: that of ``notebook`` and of the modules it uses."""
    rooms = OF_A_SUMMARY if notebook.stem in [NOTEBOOK_OF[summary] for summary in SUMMARIES] else OF_A_STAGE
    texts = {notebook.name: code_of(notebook)}
    texts |= {
        path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8")
        for path in used_modules(texts[notebook.name], rooms)
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def code_of(notebook: Path) -> str:
    """The code of ``notebook``: what decides its results, unlike its prose and the outputs it is committed with."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def used_modules(code: str, rooms: tuple[str, ...]) -> list[Path]:
    """Source files of some ``rooms`` that ``code`` imports, directly or through others."""
    waiting, found = set(imported_modules(code, rooms)), set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting |= imported_modules((PACKAGE / name).read_text(encoding="utf-8"), rooms)
    return sorted(PACKAGE / name for name in found)


@cache
def imported_modules(code: str, rooms: tuple[str, ...]) -> frozenset[str]:
    """The source files of some ``rooms``, such as "task/corpus.py", that ``code`` itself imports.

    Lines of IPython's own (%) are skipped.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", code, flags=re.MULTILINE))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nondecoupling."):
            _, room, *module = str(node.module).split(".")
            if room in rooms:
                modules.update(f"{room}/{name}.py" for name in module or [alias.name for alias in node.names])
    return frozenset(modules)
