"""Notebooks: validated execution of one through papermill, and renewal of the committed ones.

Every parameter is checked before a kernel starts. A notebook that fails keeps its output, error included, in
``<run>.failed.ipynb`` and leaves no result.
"""

import atexit
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from nondecoupling.study import folders
from nondecoupling.study.fingerprint import NOTEBOOKS, code_hashes, kind_of, notebook_of
from nondecoupling.study.plan import DRAWS, SUMMARIES
from nondecoupling.study.study import Study, nearest
from nondecoupling.workflow.graph import Part
from nondecoupling.workflow.kernels import own_sockets, warm_kernels

MEMORY_ADVICE = "use JOBS=1, or lower sft.rows_per_pass, rl.rows_per_pass or evaluation.batch_size (SET=...)"
# How kernels start, in a kernel specification of our own: without a warning about TCP that every kernel prints, and one
# of bitsandbytes about 4-bit weights, which are not used here. Importing torch, transformers and trl makes 600,000
# objects that stay: looking for garbage among them after every 700 new ones, which is the default, takes a fifth of the
# import's time, and once more at the end another second.
JUPYTER_PATH = Path(__file__).parent / "jupyter"


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuse parameters that ``notebook`` does not have or that are of another type than its default."""
    from papermill import inspect_notebook

    declared = inspect_notebook(str(notebook))
    for name, value in parameters.items():
        if name not in declared:
            raise ValueError(f"{notebook.name} has no parameter '{name}'{nearest(name, list(declared))}.")
        kind = declared[name]["inferred_type_name"].partition("[")[0]
        if kind not in ("None", type(value).__name__):
            raise ValueError(f"{notebook.name}: parameter '{name}' is {value!r}, but must be of type {kind}.")


def parameters_of(part: Part, options: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the notebook that makes ``part``: the study's ``options``, and which run and seed it is."""
    run = {} if part.name in (*SUMMARIES, "data") else {"run": part.name}
    return options | run | ({} if part.seed is None else {"seed": part.seed})


def require_same_code(root: Path, part: Part, notebook: Path) -> None:
    """RuntimeError where the code that makes ``part`` is no more what it was when make looked what is out of date.

    What was made of other code would pass for a result of today's as soon as an edit is taken back.
    """
    if (root / part.settings).exists():
        known, now = folders.read_json(root / part.settings)["code"], code_hashes(notebook)
        changed = [name for name, found in sorted(now.items()) if known.get(name) != found]
        if changed:
            raise RuntimeError(
                f"{', '.join(changed)} changed while the study was made; make begins with what is there now"
            )


def execute(study: Study, part: Part, options: dict[str, Any]) -> Path:
    """Execute the notebook that makes ``part`` with ``options``, publish both, and return the file that now exists.

    Raises ValueError before a kernel starts for bad parameters, RuntimeError naming the kept notebook if a cell fails,
    and where code is edited meanwhile.
    """
    root, notebook = folders.study_folder(study), notebook_of(kind_of(study, part.name))
    parameters = parameters_of(part, options)
    require_same_code(root, part, notebook)
    # Without it papermill's validator starts two seconds sooner, and no field of a notebook is an IRI to be checked.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    check_parameters(notebook, parameters)

    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    place = root / part.place
    working, failed = (place.with_name(f"{place.name}.{end}.ipynb") for end in ("partial", "failed"))
    working.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    drawn = {path: path.stat().st_mtime_ns for path in figures_of(root, part.name)}
    os.environ[folders.EXECUTED] = "1"
    try:
        with own_sockets() as sockets:
            execute_notebook(
                str(notebook),
                str(working),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                coalesce_streams=True,  # what a cell prints is one output
                cwd=str(NOTEBOOKS),
                config=sockets,
            )
    except (PapermillExecutionError, RuntimeError) as error:
        os.replace(working, failed)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, PapermillExecutionError):
            reason = f"{error.ename}: {error.evalue}"
        elif isinstance(error, DeadKernelError):
            reason = f"its kernel died, most likely for want of memory; {MEMORY_ADVICE}"
        else:
            reason = f"its kernel did not start ({error}); the same command tries again"
        raise RuntimeError(f"{notebook.name} failed: {reason}\n  see {failed}") from None
    finally:
        del os.environ[folders.EXECUTED]
    failed.unlink(missing_ok=True)
    require_same_code(root, part, notebook)
    for path, when in drawn.items():  # there was nothing to draw this time
        if path.stat().st_mtime_ns == when:
            path.unlink()
    if part.name in SUMMARIES:
        os.replace(working, root / str(part.notebook))
    else:
        folders.publish(partial, working)
    return root / part.target


def forget(root: Path, summary: str) -> None:
    """Remove what an earlier make wrote about ``summary``, of other seeds or runs than those that are there now."""
    for path in (root / f"{summary}.json", root / f"{summary}.ipynb", *figures_of(root, summary)):
        path.unlink(missing_ok=True)


def figures_of(root: Path, part: str) -> list[Path]:
    """The files of the figures that a part, where it is a summary, has drawn."""
    return [path for name in DRAWS.get(part, ()) for path in (root / "figures").rglob(f"{name}.*")]


# What a shell, a batch system or a launcher may have set, that would change numbers or wait for other processes.
FOREIGN = re.compile(
    r"(ACCELERATE|DEEPSPEED|FSDP|TORCHELASTIC|MASTER|PMI|TRL)_.*|.*RANK|.*WORLD_SIZE|PYTHONSTARTUP|PYTHONOPTIMIZE"
)


def quiet_environment(study: Study, jobs: int) -> None:
    """Make this process's environment, which kernels inherit, the study's own.

    How kernels start, no progress bars in captured output, no configuration of the user's, and a fixed number of
    threads: the embedded model is too small for more than one; others have OMP_NUM_THREADS if the user set it, or share
    the cores that the process may use among ``jobs`` runs. Two runs side by side that each start a thread per core slow
    each other down tenfold.
    """
    for name in [name for name in os.environ if FOREIGN.fullmatch(name)]:
        del os.environ[name]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    if study.profile.pretrains:
        threads = "1"
    os.environ |= {
        "JUPYTER_PATH": str(JUPYTER_PATH),
        "IPYTHONDIR": empty_folder(),
        "JUPYTER_CONFIG_DIR": empty_folder(),
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUTF8": "1",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
        "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled here, and importing the compiler takes a second
    }
    quiet_libraries()


def quiet_libraries() -> None:
    """Nothing from bitsandbytes, which peft imports, about kernels for 4-bit weights, which are not used here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def usable_cores() -> int:
    """How many cores this process may use: a batch system gives a job a part of its node's, and may not enforce it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked_for = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(asked_for)) if asked_for.isdecimal() else allowed


@cache
def empty_folder() -> str:
    """A folder without configuration files, which is there as long as this process."""
    folder = tempfile.mkdtemp(prefix="nondecoupling-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def renew_committed(study: Study) -> None:
    """Re-execute the committed notebooks in place at their default parameters, in a results folder of their own."""
    import nbformat
    from nbclient import NotebookClient

    quiet_environment(study, jobs=1)
    with tempfile.TemporaryDirectory() as folder, warm_kernels():
        os.environ["NONDECOUPLING_RESULTS"] = folder
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            start = time.perf_counter()
            notebook = nbformat.read(path, as_version=4)
            notebook.metadata.pop("widgets", None)  # of the last execution; explore's come anew
            place = {"metadata": {"path": str(NOTEBOOKS)}}
            with own_sockets() as sockets:
                NotebookClient(
                    notebook, kernel_name="python3", resources=place, coalesce_streams=True, config=sockets
                ).execute()
            for cell in notebook.cells:  # times of day and addresses in memory would make every diff long
                cell.metadata.pop("execution", None)
                for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                    if "text/plain" in data:
                        data["text/plain"] = re.sub("0x[0-9a-f]{6,}", "ADDRESS", data["text/plain"])
            nbformat.write(notebook, path)
            print(f"{path.name} · {time.perf_counter() - start:.0f} s", flush=True)
