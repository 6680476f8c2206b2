"""Profiles: every number of a study, validated before anything runs.

A *profile* is a YAML file in ``profiles/``; a *study* is a profile plus what the user changed (``DATA=``,
``MODEL=``, ``SET=``, see the Makefile). Nothing else in the project reads YAML.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PROFILES = Path(__file__).parent / "profiles"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of a profile: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Where sentences come from: ``folder`` (CoLA-shaped TSV files) if it is given, else ``source``.

    ``expect: cola`` refuses files that are not CoLA 1.1's, byte for byte. ``labels`` are the annotators', or the truth
    (the grammar's verdict), which only the generated corpus knows. The other settings shape the generated corpus.
    """

    source: Literal["generated", "hub"]
    folder: str | None
    expect: Literal["any", "cola"]
    labels: Literal["annotated", "truth"] = "annotated"
    train_size: Count | None = None
    dev_size: Count | None = None
    disagreement: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    seed: int | None = None

    @property
    def generated(self) -> bool:
        """Whether the corpus is the generated one, whose disagreement is known."""
        return self.source == "generated" and self.folder is None

    @model_validator(mode="after")
    def generated_corpus_is_described(self) -> "Data":
        missing = [name for name in ("train_size", "dev_size", "disagreement", "seed") if getattr(self, name) is None]
        if self.source == "generated" and missing:
            raise ValueError(f"the generated corpus needs the setting '{missing[0]}'")
        return self

    @model_validator(mode="after")
    def truth_is_known(self) -> "Data":
        if self.labels == "truth" and not self.generated:
            raise ValueError("labels: truth needs the generated corpus, whose truth is known")
        return self


class Prompt(Section):
    """The question, its two answers, and another wording of them (``{answer}`` stands for the answer)."""

    template: Annotated[str, Field(pattern=r"\{sentence\}")]
    acceptable: Annotated[str, Field(min_length=1)]
    unacceptable: Annotated[str, Field(min_length=1)]
    other_wording: Annotated[str, Field(pattern=r"\{answer\}")]
    max_new_tokens: Count

    @model_validator(mode="after")
    def answers_differ(self) -> "Prompt":
        if self.acceptable.lower() == self.unacceptable.lower():
            raise ValueError("the two answers, acceptable and unacceptable, must differ in more than case")
        return self


class Adaptation(Section):
    """Which weights a stage trains: a LoRA adapter on every linear layer, or all of them."""

    method: Literal["lora", "full"]
    rank: Count
    alpha: Count


class Model(Section):
    """The base model: ``folder`` (a causal LM with a chat template) if it is given, else ``hub``, else pretrained here.

    ``revision`` and ``sha256`` (of the weights) pin what the hub id stands for. ``quantization`` and ``dtype`` say
    how the frozen weights are held; adapters are float32 in any case.
    """

    folder: str | None
    hub: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    quantization: Literal["none", "8bit"]
    dtype: Literal["float32", "bfloat16"]

    @model_validator(mode="after")
    def hub_is_pinned(self) -> "Model":
        if self.hub and not self.revision:
            raise ValueError("a hub id needs the setting 'revision', or a run could not be repeated")
        return self


class Pretrain(Section):
    """The embedded base model: shape, optimisation, and the held-out probe that ends pretraining."""

    vocabulary: Count
    hidden_size: Count
    layers: Count
    head_size: Count
    intermediate_size: Count
    corpus_size: Count
    text_share: Share
    text_weight: Share
    batch_size: Count
    learning_rate: Positive
    max_steps: Count
    probe_size: Count
    probe_every: Count
    probe_target: Share
    seed: int


class Sft(Section):
    """Supervised fine-tuning (trl's SFTTrainer), loss on the response only.

    ``other_wording_share`` of the demonstrations answer in the prompt's other wording.
    """

    steps: Count
    batch_size: Count
    rows_per_pass: Count
    learning_rate: Positive
    warmup_share: Share
    schedule: Literal["constant", "linear", "cosine"]
    other_wording_share: Share

    @model_validator(mode="after")
    def passes_fill_the_batch(self) -> "Sft":
        if self.batch_size % min(self.rows_per_pass, self.batch_size):
            raise ValueError(f"rows_per_pass ({self.rows_per_pass}) must divide batch_size ({self.batch_size})")
        return self


class Rl(Section):
    """Reinforcement learning of E[r] - beta KL(p | start of the stage) by trl's GRPOTrainer or RLOOTrainer.

    ``reward``: +1 for the right label read strictly, robustly or in the prompt's other wording only, -1 otherwise;
    "random" is a coin, whatever the answer; "proxy" is the score of a reward model that learnt from preferences.
    """

    algorithm: Literal["grpo", "rloo"]
    steps: Count
    prompts_per_step: Count
    answers_per_prompt: Annotated[int, Field(ge=2)]
    rows_per_pass: Count
    learning_rate: Positive
    warmup_share: Share
    schedule: Literal["constant", "linear", "cosine"]
    beta: Annotated[float, Field(ge=0)]
    normalisation: Literal["none", "group"]
    reward: Literal["strict", "robust", "other_wording", "random", "proxy"]
    least_rewarded: Share

    @model_validator(mode="after")
    def rloo_divides_by_nothing(self) -> "Rl":
        if self.algorithm == "rloo" and self.normalisation == "group":
            raise ValueError("rloo does not divide by a group's deviation: set normalisation=none or algorithm=grpo")
        return self


class Joint(Section):
    """SFT and RL in one stage, on (1 - weight) x (RL objective) - weight x (SFT loss).

    With ``phases`` 0 every update has both terms. With n phases the stage is n times SFT updates and then RL updates,
    all of a half-phase alike, and ``weight`` is not used. What ``rl`` says about answers and rewards holds here, too.
    """

    steps: Count
    prompts_per_step: Count
    demonstrations_per_step: Count
    learning_rate: Positive
    warmup_share: Share
    schedule: Literal["constant", "linear", "cosine"]
    weight: Share
    phases: Annotated[int, Field(ge=0)]


class Reward(Section):
    """The proxy reward model (trl's RewardTrainer) on pairs of the right and the wrong answer to one question."""

    steps: Count
    pairs_per_step: Count
    learning_rate: Positive
    warmup_share: Share
    schedule: Literal["constant", "linear", "cosine"]


class Evaluation(Section):
    """How policies are measured: finished ones on ``splits``, those in training on ``along_size`` sentences of dev."""

    points: Annotated[int, Field(ge=2)]
    along_size: Count | None
    splits: list[Literal["dev", "dev_out", "train"]]
    train_size: Count
    batch_size: Count
    seed: int

    @model_validator(mode="after")
    def dev_is_measured(self) -> "Evaluation":
        if "dev" not in self.splits:
            raise ValueError("splits must include 'dev', on which claims are judged")
        return self


class Run(Section):
    """One stage of the plan: ``name`` = ``stage`` applied to the policy of ``parent``.

    ``make reproduce`` runs the group "main", ``make theory`` also the group "sweep", ``make study`` also the group
    "controls". ``proxy`` names the run whose reward model pays an RL run with ``rl.reward: proxy``.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+(\.[0-9]+)?)*$")]
    group: Literal["main", "sweep", "controls"] = "main"
    stage: Literal["base", "sft", "rl", "joint", "reward"]
    parent: str
    proxy: str | None = None
    overrides: dict[str, Any] = {}


class Profile(Section):
    """A whole study, as written in ``profiles/<name>.yaml``."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+$")]
    seeds: str
    data: Data
    prompt: Prompt
    model: Model
    adaptation: Adaptation
    pretrain: Pretrain | None = None
    sft: Sft
    rl: Rl
    joint: Joint
    reward: Reward
    evaluation: Evaluation
    runs: list[Run]

    @property
    def pretrains(self) -> bool:
        """Whether the study grows a base model of its own."""
        return not (self.model.folder or self.model.hub)

    @model_validator(mode="after")
    def base_can_be_had(self) -> "Profile":
        if self.pretrains and not self.pretrain:
            raise ValueError("the study has no base model: give model.folder, model.hub or the section 'pretrain'")
        if self.model.quantization == "8bit" and self.adaptation.method == "full":
            raise ValueError(
                "an 8-bit model cannot be trained whole: set adaptation.method=lora or model.quantization=none"
            )
        return self

    @model_validator(mode="after")
    def runs_form_a_graph(self) -> "Profile":
        known = {"data": "data", "base": "base"}  # stage of each run listed so far
        for run in self.runs:
            if run.name in [*known, "theory", "controls", "claims"]:
                raise ValueError(f"run '{run.name}' is listed twice or uses a reserved name")
            if run.parent not in known:
                raise ValueError(f"run '{run.name}' starts from '{run.parent}', which is not listed above it")
            if (run.stage == "base") != (run.parent == "data") or known[run.parent] == "reward":
                raise ValueError(f"run '{run.name}' is a stage '{run.stage}' and cannot start from '{run.parent}'")
            if run.proxy is not None and known.get(run.proxy) != "reward":
                raise ValueError(
                    f"run '{run.name}' has proxy '{run.proxy}', which is no run of stage 'reward' above it"
                )
            known[run.name] = run.stage
        return self


class Study(Section):
    """A profile as it will be run, and the name of its folder under ``results/``."""

    name: str
    profile: Profile

    def run(self, name: str) -> Run:
        """The plan's entry for ``name``; ValueError names the nearest run if there is none."""
        names = [run.name for run in self.profile.runs]
        if name not in names:
            raise ValueError(f"The plan of '{self.name}' has no run '{name}'{nearest(name, names)}.")
        return self.profile.runs[names.index(name)]

    def runs_of(self, group: str) -> list[Run]:
        """The plan's entries of one group, parents before children."""
        return [run for run in self.profile.runs if run.group == group]

    def for_run(self, name: str) -> Profile:
        """The profile with the overrides of run ``name`` applied; that of "data" and "base" has none."""
        return self.profile if name in ("data", "base") else with_overrides(self.profile, self.run(name).overrides)

    def base_of(self, name: str) -> str:
        """The base run that the policy of run ``name`` goes back to."""
        while name != "base" and self.run(name).stage != "base":
            name = self.run(name).parent
        return name


def nearest(name: str, candidates: list[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest candidate, else the list of candidates."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (there is {', '.join(candidates)})"


def load_study(
    profile: str = "nano", data: str = "", model: str = "", overrides: dict[str, Any] | None = None
) -> Study:
    """Load profile ``profile`` and apply the user's changes.

    ``data`` is a folder of CoLA-shaped TSV files, ``model`` a folder with a causal LM; empty keeps the profile's own.
    ``overrides`` maps dotted keys to values, e.g. ``{"rl.beta": 0.25}``. Each change becomes part of the study's name,
    and so does a short digest of all changes with the content of the folders: different studies never share one.

    Raises ValueError with one sentence that names the key, what is wrong with it, and the nearest valid name.
    """
    available = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if profile not in available:
        raise ValueError(f"There is no profile '{profile}'{nearest(profile, available)}.")
    path = PROFILES / f"{profile}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no valid YAML: {' '.join(str(error).split())}") from None
    loaded = validated(tree, where=path.name)
    changes = dict(overrides or {})
    changes |= {key: folder for key, folder in (("data.folder", data), ("model.folder", model)) if folder}
    study = Study(name=loaded.name, profile=with_possible_runs(with_overrides(loaded, changes)))
    for run in study.profile.runs:  # what is wrong with a run is said now, not hours later
        paid, reward = run.stage in ("rl", "joint"), study.for_run(run.name).rl.reward
        if (run.proxy is not None) != (paid and reward == "proxy"):
            raise ValueError(
                f"run '{run.name}' has rl.reward={reward} and proxy {run.proxy}: rl.reward=proxy, and no other "
                f"reward, needs a proxy, which is a run of stage 'reward'"
            )
    if not changes:
        return study
    settings = study.profile.model_dump()  # with 1 and 1.0 made alike
    changes = {key: settings[key.partition(".")[0]][key.partition(".")[2]] for key in changes}
    named = [
        slug(f"{key}={json.dumps(changes[key])}") for key in sorted(overrides or {}) if not key.endswith(".folder")
    ]
    folders = {key: changes[key] for key in ("data.folder", "model.folder") if changes.get(key)}
    for key, folder in folders.items():
        if not Path(folder).is_dir():
            raise ValueError(f"{key}: '{folder}' is not a folder; give the path of an existing one.")
        changes[key] = str(Path(folder).resolve())
    patterns = {"data.folder": "*.tsv", "model.folder": "*"}
    contents = {key: folder_digest(Path(folder), patterns[key]) for key, folder in folders.items()}
    digest = hashlib.sha256(json.dumps(changes | contents, sort_keys=True).encode()).hexdigest()[:6]
    if len(named) > 3:  # the digest tells studies apart; the name is for reading
        named = [f"{len(named)}_settings"]
    names = [loaded.name, *(slug(Path(folder).resolve().name) for folder in folders.values()), *named]
    profile_used = with_possible_runs(with_overrides(loaded, changes))
    return Study(name=f"{'-'.join(names)[:120]}-{digest}", profile=profile_used)


def with_possible_runs(profile: Profile) -> Profile:
    """``profile`` without the controls that it cannot have: those on true labels that nobody knows, and those on a base
    of its own where the base is given."""
    kept: list[Run] = []
    left_out: set[str] = set()
    for run in profile.runs:
        wants_truth = run.overrides.get("data.labels") == "truth" and not profile.data.generated
        if wants_truth or (run.stage == "base" and not profile.pretrains) or run.parent in left_out:
            left_out.add(run.name)
        else:
            kept.append(run)
    return profile.model_copy(update={"runs": kept})


def folder_digest(folder: Path, pattern: str) -> str:
    """A digest of the files in ``folder``, the same wherever it stands: name, size, first and last mebibyte of each."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.glob(pattern) if path.is_file()):
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


def validated(tree: Any, where: str) -> Profile:
    """``tree`` as a Profile, or ValueError with one sentence about its first fault."""
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_fault(error, tree)}") from None


def first_fault(error: ValidationError, tree: Any) -> str:
    """One sentence for the first fault that pydantic found in ``tree``."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = Profile
        for part in fault["loc"][:-1]:
            section = Run if part == "runs" or isinstance(part, int) else section.model_fields[part].annotation
        return f"unknown setting '{key}'{nearest(str(fault['loc'][-1]), list(section.model_fields))}"
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
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def parse_seeds(text: str) -> list[int]:
    """``"0-4"`` or ``"0,3,7"`` (or both, ``"0-2,7"``) as a sorted list of distinct seeds."""
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"Cannot read seeds '{text}': write 0-4 or 0,3,7.")
        seeds.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(seeds)
