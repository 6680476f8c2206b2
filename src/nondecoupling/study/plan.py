"""The plan: every run of a study, once, from the profile's own numbers.

A run is a stage applied to the policy of its parent. What it changes is a function of the profile, so that no setting
of a user can turn a control into something else. To add a run, add an entry here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from nondecoupling.study.profile import Profile

Group = Literal["main", "sweep", "controls", "geometry"]
MAKES: dict[Group, str] = {
    "main": "make reproduce",
    "sweep": "make betas",
    "controls": "make controls",
    "geometry": "make geometry",
}
StageKind = Literal["data", "base", "sft", "rl", "joint", "reward_model", "gradients"]

# The policies of the two experiments, with their names for readers.
NAMES = {"base": "base", "sft": "SFT", "sft-rl": "SFT → RL", "rl": "RL", "rl-sft": "RL → SFT"}
STATES = list(NAMES)
SEQUENTIAL = ("sft-rl", "rl-sft")  # what joint training is compared with
FOLLOWED = "gradients-sft"  # the run that also follows ascents on the reward from its policy
# What notebooks make of the tables, in the order in which they run, with the groups of runs that each reads.
SUMMARIES: dict[str, tuple[Group, ...]] = {
    "theory": ("main", "sweep"),
    "controls": ("main", "controls"),
    "geometry": ("main", "geometry"),
    "labels": ("main",),
    "claims": ("main",),
}
DRAWS = {  # the figures that each of them saves, some only where there is something to draw
    "theory": ("who_pays", "theory", "crossing"),
    "controls": ("controls", "proxy", "joint"),
    "geometry": ("duration", "threshold", "alignment", "story"),
    "labels": ("labels",),
    "claims": ("experiments", "plane", "calibration"),
}
OF_TWO, OF_MORE = ("theory", "controls", "geometry"), ("labels",)  # summaries of studies with so many answers
WEIGHTS = (0.2, 0.5, 0.8)  # of the SFT loss in joint training
SHARES = (10, 25, 50)  # per cent of SFT's steps after which RL begins, too
ALONG_SFT = ("base", *(f"sft-{share}" for share in SHARES), "sft")


@dataclass(frozen=True)
class Run:
    """One entry of the plan.

    ``changes`` maps dotted settings to the values that make the run what it is. ``once``: it serves all seeds, as real
    data and a published model do. ``curve``: it is measured along its way and not only at both ends. ``proxy`` is the
    run whose reward model pays. ``half`` is the run that trains alike for half of the steps; ``instead`` says in words
    what a run of the sweep changes besides beta and steps. ``also`` is another group that it belongs to.
    """

    name: str
    stage: StageKind
    parent: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    group: Group = "main"
    once: bool = False
    curve: bool = True
    proxy: str | None = None
    half: str | None = None
    instead: str = ""
    also: Group | None = None

    @property
    def parents(self) -> list[str]:
        """The runs whose results it needs."""
        return [name for name in (self.parent, self.proxy) if name]


def has_two_answers(profile: Profile) -> bool:
    """Whether a sentence may have two labels, and no more."""
    return len(profile.prompt.answers) == 2


def summaries(profile: Profile) -> dict[str, tuple[Group, ...]]:
    """Those of `SUMMARIES` that a study with this profile has."""
    others = OF_MORE if has_two_answers(profile) else OF_TWO
    return {name: read for name, read in SUMMARIES.items() if name not in others}


def plan(profile: Profile) -> list[Run]:
    """Every run of a study with this profile, parents before children.

    A seed is a replication: where a study makes its own world, it draws the sentences, who disagrees about which, the
    base model, and every stage. Real data and a published model are there once. With more than two answers there are
    both experiments only: sweep, controls and geometry are read by log-odds, which are those of two answers.
    """
    same_data = not profile.data.generated
    main = [
        Run("data", "data", once=same_data),
        Run("base", "base", "data", once=same_data and not profile.pretrains),
        Run("sft", "sft", "base"),
        Run("sft-rl", "rl", "sft"),  # experiment A: RL after SFT
        Run("rl", "rl", "base"),
        Run("rl-sft", "sft", "rl"),  # experiment B: SFT after RL
    ]
    if not has_two_answers(profile):
        return main
    return [*main, *sweep(profile), *controls(profile), *geometry(profile)]


def require_groups(profile: Profile, groups: Iterable[Group]) -> None:
    """ValueError where the plan for this profile is made without one of ``groups``."""
    lacking = [MAKES[group] for group in groups if group != "main"]
    if lacking and not has_two_answers(profile):
        raise ValueError(
            f"'{profile.name}' has {len(profile.prompt.answers)} answers, and {lacking[0]} needs a study with two: "
            f"sweep, controls and geometry are read by log-odds; {MAKES['main']} runs both experiments."
        )


def rl_at(beta: float, name: str, steps: int, changes: dict[str, Any] | None = None, **more: Any) -> Run:
    """A run of the sweep: RL after SFT at ``beta``, of which only the ends count."""
    return Run(name, "rl", "sft", {"rl.beta": beta, "rl.steps": steps} | (changes or {}), "sweep", curve=False, **more)


def sweep(profile: Profile) -> list[Run]:
    """RL after SFT at other prices of the KL.

    An embedded model, whose steps are cheap, takes twice `sft-rl`'s steps and as many at each: if both end at the same
    place, training has converged.
    """
    rl, betas, runs = profile.rl, profile.sweep.betas, []
    compared = three_betas(profile)
    for beta in betas:
        name = f"sft-rl-b{beta:g}"
        if not profile.pretrains:
            runs += [rl_at(beta, name, rl.steps)] if beta != rl.beta else []
        elif beta == rl.beta:
            runs.append(rl_at(beta, name, 2 * rl.steps, half="sft-rl"))
        else:
            runs.append(rl_at(beta, name, 2 * rl.steps, half=f"{name}-half"))
            runs.append(rl_at(beta, f"{name}-half", rl.steps, also="geometry" if beta in compared else None))
    if 1.0 in betas and profile.pretrains and rl.normalisation == "none":  # GRPO's own normalisation, all else equal
        grpo = {"rl.normalisation": "group", "rl.algorithm": "grpo"}
        words = "divided" if rl.algorithm == "grpo" else "grpo, divided"
        runs.append(rl_at(1.0, "sft-rl-b1-group", 2 * rl.steps, grpo, instead=words))
    return runs


def one_per_beta(runs: Iterable[Run]) -> list[Run]:
    """The sweep's runs among ``runs`` that differ in beta alone: no halves, and none that changes something else."""
    swept = [run for run in runs if run.group == "sweep" and not run.instead]
    return [run for run in swept if run.name not in {other.half for other in swept}]


def controls(profile: Profile) -> list[Run]:
    """Controls, each of which answers an objection (`analysis.controls`), a learnt reward, and joint training."""
    runs = []

    def add(
        name: str, stage: StageKind, parent: str, changes: dict[str, Any] | None = None, curve: bool = False, **more
    ):
        runs.append(Run(name, stage, parent, changes or {}, "controls", curve=curve, **more))

    rl, sft = profile.rl, profile.sft
    add("sft-sft", "sft", "sft", {"sft.steps": rl.steps})  # as many further SFT steps as RL takes
    add("sft-again", "sft", "sft")  # a second whole stage of SFT, and the same with RL between the two
    add("sft-rl-sft", "sft", "sft-rl")
    add("rl-rl", "rl", "rl")
    add("sft-rl-random", "rl", "sft", {"rl.reward": "random", "rl.beta": rl.beta * 0.3})
    add("sft-rl-short", "rl", "sft", {"rl.steps": max(1, round(rl.steps / 4))})
    short = {"sft.steps": max(1, round(sft.steps / 10)), "sft.learning_rate": sft.learning_rate / 4}
    add("rl-sft-short", "sft", "rl", short)
    add("sft-wordings", "sft", "base", {"sft.other_wording_share": 0.1})
    add("sft-rl-format", "rl", "sft-wordings", {"rl.reward": "other_wording"})
    if profile.data.generated:  # annotators who never disagree: only a generated corpus knows the truth
        add("sft-clean", "sft", "base", {"data.labels": "truth"})
        add("sft-rl-clean", "rl", "sft-clean", {"data.labels": "truth"})
    elif rl.reward == "strict":  # a published model may answer in sentences, which a strict reward never pays
        add("rl-robust", "rl", "base", {"rl.reward": "robust"}, curve=True)
    add("reward-model", "reward_model", "base", curve=True)
    add("rl-proxy", "rl", "base", {"rl.reward": "proxy"}, curve=True, proxy="reward-model")
    add("sft-rl-proxy", "rl", "sft", {"rl.reward": "proxy"}, curve=True, proxy="reward-model")
    add("sft-rl-rloo", "rl", "sft", {"rl.algorithm": "rloo", "rl.normalisation": "none"})  # another policy gradient
    for weight in WEIGHTS:
        add(f"joint-m{weight}", "joint", "base", {"joint.weight": weight}, curve=True)
    # half of the updates each
    add("interleaved", "joint", "base", {"joint.phases": 5, "joint.steps": 2 * profile.joint.steps}, curve=True)
    return runs


def three_betas(profile: Profile) -> list[float]:
    """The study's own beta between the next larger and the next smaller of the sweep, as far as there are such."""
    own, others = profile.rl.beta, profile.sweep.betas
    larger, smaller = ([beta for beta in others if beta > own], [beta for beta in others if beta < own])
    return [*([min(larger)] if larger else []), own, *([max(smaller)] if smaller else [])]


def starts(profile: Profile) -> dict[str, dict[float, str]]:
    """From where RL begins to see when it raises the SFT loss: by policy, the run of RL at each of `three_betas`.

    A start between base and SFT has had a share of SFT's steps, with a schedule of its own: what was stopped in the
    middle of one would tell of its learning rate.
    """
    own, found = profile.rl.beta, {}
    for start in ALONG_SFT:
        known = {"base": "rl", "sft": "sft-rl"}.get(start)
        names = {beta: f"{known or f'{start}-rl'}-b{beta:g}" for beta in three_betas(profile)}
        if start == "sft":
            names = {beta: f"{name}-half" for beta, name in names.items()}  # the sweep's, with as many steps
        found[start] = names | ({own: known} if known else {})
    return found


def geometry(profile: Profile) -> list[Run]:
    """Gradients of the policies of both experiments; and for an embedded model RL from starts between base and SFT."""
    runs, measured = [], list(STATES)
    if profile.pretrains:
        for share in SHARES:
            steps = {"sft.steps": max(1, round(profile.sft.steps * share / 100))}
            runs.append(Run(f"sft-{share}", "sft", "base", steps, "geometry", curve=False))
            measured.append(f"sft-{share}")
        for start, names in starts(profile).items():
            new = {beta: name for beta, name in names.items() if start != "sft" and name != "rl"}
            runs += [Run(name, "rl", start, {"rl.beta": beta}, "geometry", curve=False) for beta, name in new.items()]
    runs += [Run(f"gradients-{name}", "gradients", name, group="geometry", curve=False) for name in measured]
    return runs
