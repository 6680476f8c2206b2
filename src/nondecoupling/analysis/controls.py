"""Controls and joint training: what each answers, and the rules of its verdict, written before any run of this plan.

Verdicts follow the rules of `claims`, with Holm's correction over all controls that were run, and over all joint runs.
All statements here are ours; the paper runs no control, and concludes that the two stages should be one joint
optimisation without running it. To add a control, add its claim and its objection here and its run to `study.plan`.
"""

import math
from functools import partial

import pandas as pd

from nondecoupling.analysis import predictions
from nondecoupling.analysis.claims import (
    LOSS_MARGIN,
    REWARD_MARGIN,
    Claim,
    by_seed,
    change_of,
    corrected_family,
    judged,
    judged_family,
    not_run,
)
from nondecoupling.analysis.collapse import is_failed_judge
from nondecoupling.analysis.measures import advantage, kl_between, loss_per_nat
from nondecoupling.analysis.verdicts import interval_text
from nondecoupling.study.contracts import ClaimRow
from nondecoupling.study.plan import MAKES, SEQUENTIAL
from nondecoupling.study.results import Results
from nondecoupling.study.study import Study

LOSS, REWARD, GREEDY = "sft_loss", "reward_exact", "reward_greedy"
# Nats of loss for a nat of KL. It is 1 for both policies of K3 where SFT is calibrated; a quarter of that is what the
# theory's amounts are allowed, too. Loss and reward have the margins of `claims`.
SLOPE_MARGIN = 0.25

CONTROLS = [
    Claim("K1", "RL raises the SFT loss more than as many further SFT steps", LOSS, "sft-rl", "sft-sft", +1),
    Claim("K1e", "As many further SFT steps leave the SFT loss alone", LOSS, "sft-sft", "sft", 0, margin=LOSS_MARGIN),
    Claim("K2", "SFT after RL lowers the reward below that of more RL", REWARD, "rl-sft", "rl-rl", -1),
    # No difference is claimed, and not a sign: theory says that whatever moves a calibrated policy raises its loss by
    # the KL that it has moved. Only what RL learns about the labels, or SFT's miscalibration, can make a difference.
    Claim(
        "K3",
        "Per nat of KL(p_SFT || p), RL raises the SFT loss as much as RL paid for random labels",
        "rise of loss / KL",
        "sft-rl",
        "sft-rl-random",
        0,
        margin=SLOPE_MARGIN,
    ),
    Claim("K3r", "Only the true reward raises the reward", REWARD, "sft-rl", "sft-rl-random", +1),
    Claim("K4", "RL for another wording raises the loss", LOSS, "sft-rl-format", "sft-wordings", +1),
    Claim("K5", "A tenth of the SFT, on its own schedule, lowers the reward already", REWARD, "rl-sft-short", "rl", -1),
    Claim("K6", "Without disagreement RL lowers the SFT loss", LOSS, "sft-rl-clean", "sft-clean", -1),
    Claim("K9", "RL paid by the proxy earns less true reward", REWARD, "sft-rl-proxy", "sft-rl", -1),
    Claim("K10", "RLOO raises the SFT loss, too", LOSS, "sft-rl-rloo", "sft", +1),
    Claim(
        "K11",
        "A quarter of RL, on its own schedule, has more of the reward's gain than of the loss's rise",
        "share of reward - share of loss",
        "sft-rl-short",
        "",
        +1,
    ),
    Claim(
        "K12",
        "SFT after RL after SFT ends at the loss of SFT after SFT",
        LOSS,
        "sft-rl-sft",
        "sft-again",
        0,
        margin=LOSS_MARGIN,
    ),
    Claim(
        "K12g",
        "SFT after RL after SFT has the greedy reward of SFT after SFT",
        GREEDY,
        "sft-rl-sft",
        "sft-again",
        0,
        margin=REWARD_MARGIN,
    ),
]
OBJECTIONS = {
    "K1": "Is the rise of the loss just drift, which any further training brings?",
    "K1e": "Does further training of the same kind raise the loss at all?",
    "K2": "Is the fall of the reward just what more training of any kind does?",
    "K3": "Is it the true reward that costs SFT loss, or the distance that RL goes?",
    "K3r": "Does RL for random labels raise the true reward, too?",
    "K4": "Does the sign rule hold where RL pays for what the demonstrations do not show?",
    "K5": "Does the fall of the reward need a whole stage of SFT?",
    "K6": "Is the rise a law? The paper's theorem knows no rise where all demonstrations earn the top reward.",
    "K9": "Does a learnt reward change the picture, and is it over-optimised?",
    "K10": "Is it GRPO, or any policy gradient?",
    "K11": "Must one pay the whole rise of the loss to get the reward?",
    "K12": "Does RL leave a mark that a second SFT does not remove, in the loss?",
    "K12g": "And in the skill that greedy answers show?",
}


def controls_of(study: Study) -> list[Claim]:
    """The controls that the plan of ``study`` has, in order."""
    planned = {"", *(run.name for run in study.runs)}
    return [claim for claim in CONTROLS if {claim.before, claim.after} <= planned]


def joint_runs(study: Study) -> list[str]:
    """The runs of joint training in the plan of ``study``."""
    return [run.name for run in study.runs if run.stage == "joint"]


def joint_claims(study: Study) -> list[Claim]:
    """J1, J1e and J2 of each joint run: it earns more at equal SFT loss, no more and no less, more when greedy."""
    claims, equal, greedy = [], "reward at equal SFT loss", "reward of greedy answers"
    for run in joint_runs(study):
        words = f"'{run}' earns {{}} sequential training at equal SFT loss"
        quantities = [f"{what}: {run} - better of {', '.join(SEQUENTIAL)}" for what in (equal, greedy)]
        claims += [
            Claim(f"J1-{run}", words.format("more than"), quantities[0], run, "", +1),
            Claim(f"J1e-{run}", words.format("as much as"), quantities[0], run, "", 0, margin=REWARD_MARGIN),
            Claim(f"J2-{run}", f"'{run}' earns more with greedy answers", quantities[1], run, "", +1),
        ]
    return claims


def controls_not_run(study: Study) -> list[ClaimRow]:
    """The rows of controls and joint training of a study that has run none; empty where its plan has none."""
    return with_those_not_run([*controls_of(study), *joint_claims(study)], [])


def finished(results: Results, claims: list[Claim]) -> list[Claim]:
    """Those of ``claims`` whose runs are in the tables."""
    return [claim for claim in claims if results.has(*filter(None, (claim.before, claim.after)))]


def with_those_not_run(planned: list[Claim], rows: list[ClaimRow]) -> list[ClaimRow]:
    """A row for each planned claim, in order: its own, or that it was not run."""
    judged_rows = {row["id"]: row for row in rows}
    return [judged_rows.get(claim.id) or not_run(claim, MAKES["controls"]) for claim in planned]


def values_of_controls(results: Results) -> dict[str, pd.Series]:
    """The quantity of each control that was run, by seed.

    K11's is the share of RL's gain of reward minus the share of its rise of loss that a quarter of RL has.
    """
    special = {"K3": partial(slope_difference, results), "K11": partial(shares_ahead, results)}
    found = finished(results, controls_of(results.study))
    return {claim.id: special.get(claim.id, partial(change_of, results, claim))() for claim in found}


def slope_difference(results: Results) -> pd.Series:
    """K3's quantity: `measures.loss_per_nat` of RL minus that of RL paid for random labels."""
    paid, random = (by_seed(results, loss_per_nat, "sft", run) for run in ("sft-rl", "sft-rl-random"))
    return paid - random


def early_shares(results: Results) -> pd.DataFrame:
    """By seed, the shares of RL's gain of ``reward`` and of its rise of ``loss`` that a quarter of RL has.

    nan in a seed in which RL has not raised it.
    """
    ends = {run: results.final(run).set_index("seed")[[REWARD, LOSS]] for run in ("sft", "sft-rl-short", "sft-rl")}
    whole = ends["sft-rl"] - ends["sft"]
    shares = (ends["sft-rl-short"] - ends["sft"]) / whole.where(whole > 0)
    return shares.rename(columns={REWARD: "reward", LOSS: "loss"})


def shares_ahead(results: Results) -> pd.Series:
    """K11's quantity."""
    shares = early_shares(results)
    return shares["reward"] - shares["loss"]


def judge_controls(results: Results, claims: list[ClaimRow]) -> list[ClaimRow]:
    """One row per control that the plan has; ``claims`` are the judged claims of the same study."""
    planned, predicted = controls_of(results.study), predictions.of_controls(results, claims)
    found = finished(results, planned)
    notes = {claim.id: NOTES[claim.id](results) for claim in found if claim.id in NOTES}
    return with_those_not_run(planned, judged_family(results, found, values_of_controls(results), predicted, notes))


def distances_note(results: Results) -> str:
    """How far both policies of K3 have gone, so that a reader sees whether they match."""
    kl = {run: by_seed(results, kl_between, "sft", run).mean() for run in ("sft-rl", "sft-rl-random")}
    return f"KL(p_SFT || p): {', '.join(f'{run} {nats:.3f}' for run, nats in kl.items())} nats"


def failed_judges_note(results: Results) -> str:
    """In which seeds the reward model of K9 judges no better than the majority label; they are judged all the same."""
    table = results.metrics[(results.metrics["run"] == "reward-model") & (results.metrics["split"] == "dev")]
    failed = table.loc[is_failed_judge(table), "seed"]
    return f"the reward model had failed in seeds {', '.join(map(str, failed))}" if len(failed) else ""


NOTES = {"K3": distances_note, "K9": failed_judges_note}


def reward_per_nat(results: Results) -> pd.DataFrame:
    """`early_shares`, and how much reward a quarter of RL buys for a nat of SFT loss, and the rest of it, by seed."""
    shares = early_shares(results)
    after, before = (results.final(run).set_index("seed")[[REWARD, LOSS]] for run in ("sft-rl", "sft"))
    change = after - before
    early = change[REWARD] * shares["reward"] / (change[LOSS] * shares["loss"])
    late = change[REWARD] * (1 - shares["reward"]) / (change[LOSS] * (1 - shares["loss"]))
    return shares.assign(**{"reward per nat, a quarter": early, "reward per nat, the rest": late})


# Joint training


def values_of_joint(results: Results) -> dict[str, pd.Series]:
    """The quantities of J1, J1e and J2 of each finished joint run by seed: `measures.advantage` over `SEQUENTIAL`."""
    values: dict[str, pd.Series] = {}
    for run in filter(results.has, joint_runs(results.study)):
        found = {
            seed: advantage(results.answers_of(run, seed), [results.answers_of(rival, seed) for rival in SEQUENTIAL])
            for seed in results.seeds
        }
        sampled, greedy = (pd.Series({seed: both[place] for seed, both in found.items()}) for place in (0, 1))
        values |= {f"J1-{run}": sampled, f"J1e-{run}": sampled, f"J2-{run}": greedy}
    return values


def judge_joint(results: Results) -> list[ClaimRow]:
    """Does joint training beat doing one stage after the other, at equal cost? Three rows per joint run."""
    planned, values = joint_claims(results.study), values_of_joint(results)
    rows = corrected_family([judged(claim, values[claim.id]) for claim in planned if claim.id in values])
    return with_those_not_run(planned, rows)


def joint_answer(rows: list[ClaimRow]) -> str:
    """The answer to "does joint training beat sequential training at equal cost?" in one paragraph, with numbers."""

    def summary(letter: str, what: str) -> str:
        family = [row for row in judged_rows if row["id"].startswith(f"{letter}-")]
        best = max(family, key=lambda row: -math.inf if row["estimate"] is None else row["estimate"])
        better, worse = (sum(row["verdict"] == verdict for row in family) for verdict in ("confirmed", "refuted"))
        return (
            f"{what}, {better} of {len(family)} joint runs are shown to be better and {worse} worse; the "
            f"highest mean is {best['id'].partition('-')[2]}'s, {interval_text(best['estimate'], best['ci95'])}"
        )

    judged_rows = [row for row in rows if row["verdict"] != "not run"]
    if not judged_rows:
        return f"Joint training was not run ({MAKES['controls']})."
    alike = [row["verdict"] == "confirmed" for row in judged_rows if row["margin"] is not None]
    sampled = summary("J1", "In sampled reward at equal SFT loss")
    same = f"No more than {REWARD_MARGIN:g} of reward apart, either way: {sum(alike)} of {len(alike)}"
    greedy = summary("J2", "In greedy reward")
    of_means = f"(Means over {judged_rows[0]['seeds']} seeds with 95 % intervals; Holm's correction.)"
    return f"{sampled}. {same}. {greedy}. {of_means}"
