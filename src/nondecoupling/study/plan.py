"""The plan: every run of a study, once, from the profile's own numbers.

A run is a stage applied to the policy of its parent. What it changes is a function of the profile, so that no setting
of a user can turn a control into something else. To add a run, add an entry here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from nondecoupling.study.profile import Profile

Group = Literal["main", "sweep", "controls"]  # make reproduce, make betas and make controls add them up
StageKind = Literal["data", "base", "sft", "rl", "joint", "reward_model"]

# The policies of the two experiments, with their names for readers.
NAMES = {"base": "base", "sft": "SFT", "sft-rl": "SFT → RL", "rl": "RL", "rl-sft": "RL → SFT"}
STATES = list(NAMES)
SEQUENTIAL = ("sft-rl", "rl-sft")  # what joint training is compared with
# What notebooks make of the tables, in the order in which they run, with the groups of runs that each reads.
SUMMARIES: dict[str, tuple[Group, ...]] = {
    "theory": ("main", "sweep"),
    "controls": ("main", "controls"),
    "claims": ("main",),
}
WEIGHTS = (0.2, 0.5, 0.8)  # of the SFT loss in joint training
SMALL_BETA = 0.25  # at which the sweep asks why RL stops short of its closed form


@dataclass(frozen=True)
class Run:
    """One entry of the plan.

    ``changes`` maps dotted settings to the values that make the run what it is. ``curve``: it is measured along its way
    and not only at both ends. ``proxy`` is the run whose reward model pays. ``half`` is the run that trains alike for
    half of the steps; ``instead`` says in words what a run of the sweep changes besides beta and steps.
    """

    name: str
    stage: StageKind
    parent: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    group: Group = "main"
    curve: bool = True
    proxy: str | None = None
    half: str | None = None
    instead: str = ""

    @property
    def once(self) -> bool:
        """Whether the run serves all seeds."""
        return self.stage in ("data", "base")

    @property
    def parents(self) -> list[str]:
        """The runs whose results it needs."""
        return [name for name in (self.parent, self.proxy) if name]


def plan(profile: Profile) -> list[Run]:
    """Every run of a study with this profile, parents before children."""
    main = [
        Run("data", "data"),
        Run("base", "base", "data"),
        Run("sft", "sft", "base"),
        Run("sft-rl", "rl", "sft"),  # experiment A: RL after SFT
        Run("rl", "rl", "base"),
        Run("rl-sft", "sft", "rl"),  # experiment B: SFT after RL
    ]
    return [*main, *sweep(profile), *controls(profile)]


def rl_at(
    beta: float, name: str, steps: int, changes: dict[str, Any] | None = None, parent: str = "sft", **more: Any
) -> Run:
    """A run of the sweep: RL after SFT at ``beta``, of which only the ends count."""
    return Run(name, "rl", parent, {"rl.beta": beta, "rl.steps": steps} | (changes or {}), "sweep", curve=False, **more)


def sweep(profile: Profile) -> list[Run]:
    """RL after SFT at other prices of the KL, each beta for twice `sft-rl`'s steps and for as many.

    Where both end at the same place, training has converged. The rest asks why RL stops short of the closed form at a
    small beta: each guess has the setting that would cure it.
    """
    rl, betas, runs = profile.rl, profile.sweep.betas, []
    for beta in betas:
        name = f"sft-rl-b{beta:g}"
        if beta == rl.beta:
            runs.append(rl_at(beta, name, 2 * rl.steps, half="sft-rl"))
        else:
            runs.append(rl_at(beta, name, 2 * rl.steps, half=f"{name}-half"))
            runs.append(rl_at(beta, f"{name}-half", rl.steps))
    if 1.0 in betas and rl.normalisation == "none":  # GRPO's own normalisation, all else equal
        grpo = {"rl.normalisation": "group", "rl.algorithm": "grpo"}
        words = "divided" if rl.algorithm == "grpo" else "grpo, divided"
        runs.append(rl_at(1.0, "sft-rl-b1-group", 2 * rl.steps, grpo, instead=words))
    return runs + (why_short(profile) if SMALL_BETA in betas else [])


def why_short(profile: Profile) -> list[Run]:
    """Groups of equal answers teach nothing: four times the answers to a question, or as many more to four times the
    questions. The frozen output layer, or gradients that fade: RL of all weights, from an SFT of its own, at the
    adapter's learning rate, with which they move further, and at a quarter of it."""
    rl, name, words = profile.rl, f"sft-rl-b{SMALL_BETA}", "all weights"
    answers, prompts, slow = 4 * rl.answers_per_prompt, 4 * rl.prompts_per_step, rl.learning_rate / 4
    runs = [
        rl_at(
            SMALL_BETA,
            f"{name}-{answers}answers",
            rl.steps,
            {"rl.answers_per_prompt": answers},
            instead=f"{answers} answers",
        ),
        rl_at(
            SMALL_BETA,
            f"{name}-{prompts}prompts",
            rl.steps,
            {"rl.prompts_per_step": prompts},
            instead=f"{prompts} prompts",
        ),
    ]
    if profile.adaptation.method == "lora" and profile.model.quantization == "none":
        whole, name = {"adaptation.method": "full"}, f"sft-all-rl-b{SMALL_BETA}"
        slowly, slow_words = whole | {"rl.learning_rate": slow}, f"{words}, learning rate {slow:g}"
        runs += [
            Run("sft-all", "sft", "base", whole, "sweep", curve=False),
            rl_at(SMALL_BETA, name, rl.steps, whole, "sft-all", instead=words),
            rl_at(SMALL_BETA, f"{name}-slow", rl.steps, slowly, "sft-all", instead=slow_words),
        ]
    return runs


def controls(profile: Profile) -> list[Run]:
    """Controls, each of which answers an objection (`analysis.controls`), a learnt reward, and joint training."""
    runs = []

    def add(
        name: str, stage: StageKind, parent: str, changes: dict[str, Any] | None = None, curve: bool = False, **more
    ):
        runs.append(Run(name, stage, parent, changes or {}, "controls", curve, **more))

    add("sft-sft", "sft", "sft", {"sft.steps": profile.rl.steps})  # as many further SFT steps as RL takes
    add("rl-rl", "rl", "rl")
    add("sft-rl-random", "rl", "sft", {"rl.reward": "random"})  # a coin as the reward
    add("sft-wordings", "sft", "base", {"sft.other_wording_share": 0.1})
    add("sft-rl-format", "rl", "sft-wordings", {"rl.reward": "other_wording"})
    add("rl-sft-short", "sft", "rl", {"sft.steps": max(1, round(profile.sft.steps / 10))})  # a tenth of the SFT
    if profile.data.generated:  # annotators who never disagree: only a generated corpus knows the truth
        add("sft-clean", "sft", "base", {"data.labels": "truth"})
        add("sft-rl-clean", "rl", "sft-clean", {"data.labels": "truth"})
    if profile.pretrains and profile.pretrain:  # a base that knows the answer format and little else
        weak = {"pretrain.probe_every": profile.pretrain.weak_steps, "pretrain.probe_target": 0.0}
        add("base-weak", "base", "data", weak)
        add("rl-weak", "rl", "base-weak", curve=True)
        add("rl-weak-sft", "sft", "rl-weak", curve=True)
    add("reward-model", "reward_model", "base", curve=True)
    add("rl-proxy", "rl", "base", {"rl.reward": "proxy"}, curve=True, proxy="reward-model")
    add("sft-rl-proxy", "rl", "sft", {"rl.reward": "proxy"}, curve=True, proxy="reward-model")
    add("sft-rl-rloo", "rl", "sft", {"rl.algorithm": "rloo", "rl.normalisation": "none"})  # another policy gradient
    for weight in WEIGHTS:
        add(f"joint-m{weight}", "joint", "base", {"joint.weight": weight}, curve=True)
    # half of the updates each
    add("interleaved", "joint", "base", {"joint.phases": 5, "joint.steps": 2 * profile.joint.steps}, curve=True)
    return runs
