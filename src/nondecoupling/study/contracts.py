"""What result files hold, for programs that read them: a type per file, a sentence per key.

Losses and divergences are in nats, rewards between -1 and 1. Tests validate every committed file against these types.
"""

from typing import Any, Literal

from typing_extensions import TypedDict

# Of the paper's claims: reproduced or not; of ours: confirmed or refuted. `analysis.claims.worded` is the rule.
Verdict = Literal["reproduced", "not reproduced", "confirmed", "refuted", "inconclusive", "not run"]


class RunFile(TypedDict):
    """metrics.json of a run."""

    run: str  # the run's name in the plan
    stage: str  # data, base, sft, rl, joint or reward_model
    parent: str | None  # the run whose policy it starts from
    parents: dict[str, str | None]  # every run that it read, with the sha256 of its metrics.json
    profile: str  # the profile's name
    study: str  # the study's folder
    seed: int | None  # None for runs that serve all seeds
    status: Literal["complete"]  # nothing else is ever published
    evaluation: dict[str, dict[str, float]]  # by split, the metrics of the finished policy
    training: dict[str, Any]  # steps, seconds, memory, numbers of parameters
    provenance: dict[str, Any]  # code, settings, versions, machine, times


class ProvenanceFile(TypedDict):
    """provenance.json of a study: what all runs share once, and what differs by run."""

    study: str  # the study's folder
    profile: str  # the profile's name
    seeds: list[int]  # the seeds whose runs are in the tables
    chosen: list[str]  # the settings that the user chose, dotted
    parameters: dict[str, Any]  # every setting of the study
    shared: dict[str, Any]  # code, versions and machine of most runs
    data: dict[str, dict[str, float]]  # sentences and majority reward by split, of the first seed
    runs: dict[str, dict[str, Any]]  # by "seed0/sft": sha256, parents, times, and what is not as in `shared`
    tables: dict[str, str]  # sha256 of the tables beside it; empty before they are written


class ClaimRow(TypedDict):
    """One entry of claims.json and controls.json."""

    id: str  # A, B: the paper's; O, M: ours beside them; T: the theory's; K: controls; J: joint training; G: geometry
    statement: str  # what is claimed
    quantity: str  # what is measured, "metric: policy - policy"
    paper: str  # the paper's number, "-" where it has none
    predicted: float | None  # the closed form for a perfect learner
    predicted_from_policies: float | None  # the closed form from the measured policies
    estimate: float | None  # mean over seeds; None where it was not run
    ci95: list[float] | None  # its 95 % t interval over seeds; None where there is none
    seeds: int  # how many were averaged
    margin: float | None  # of a claim of no difference: what still counts as none; None for a claim about a sign
    test: str  # the test that p comes from; "exact" for what must hold in every seed
    p_value: float | None  # uncorrected; two-sided, or of the two one-sided tests of a claim of no difference
    p_holm: float | None  # after Holm's correction over the family
    verdict: Verdict  # by the rules of analysis.claims and analysis.controls
    note: str  # collapses, seeds that lack the quantity, and other warnings


class OverSeeds(TypedDict):
    """A mean over seeds."""

    mean: float
    ci95: list[float] | None  # 95 % t interval; None for a single seed


class Share(OverSeeds):
    """A share, and its value for every seed."""

    seeds: list[float]


class Point(TypedDict):
    """A policy in the plane of both goals, on the two labels as given."""

    loss: float
    reward: float


class Landing(TypedDict):
    """One RL run of one seed: where it started, where it should have landed, where it did."""

    run: str
    seed: int
    parent: str
    beta: float
    start: Point  # the measured policy before RL
    measured: Point  # the measured policy after RL
    tilted: Point | None  # ideal RL that knows the truth; None where it is unknown or beta is 0
    self_tilted: Point | None  # ideal RL that learns nothing new; None where beta is 0


class Level(TypedDict):
    """Where one policy ends: measured, and predicted before the stage that made it. On the two labels, on dev."""

    quantity: Literal["loss", "reward", "greedy"]  # L; J of sampled answers; J of greedy answers
    run: str
    measured: OverSeeds
    own_belief: float | None  # None for sft, from which it starts, and where beta is 0
    perfect_learner: float | None  # None where the truth is unknown or beta is 0


class Decoding(TypedDict):
    """What decoding gets from the SFT policy, next to what RL gets by training it."""

    gain_of_reward: OverSeeds  # of sampled answers, by RL
    rise_of_loss: OverSeeds  # by RL
    shares: dict[str, Share]  # of RL's gain that a decoder of the SFT policy has; empty where RL gained nothing
    gain_of_greedy_reward: OverSeeds  # by RL
    above_temperature_curve: OverSeeds | None  # RL's reward minus that of the sharpened SFT policy at RL's loss


class Change(TypedDict):
    """A change by RL, measured and predicted."""

    measured: OverSeeds
    own_belief: float  # predicted from each seed's measured policy before RL
    perfect_learner: float | None  # predicted for one who knows the truth; None where it is unknown
    gap_to_own_belief: OverSeeds  # measured minus predicted, seed by seed


class Payer(Change):
    """The rise of the SFT loss by RL after SFT on the sentences of one q(x)."""

    q: float  # probability of the likelier label
    share: float  # of the sentences


class TiltBin(Change):
    """The rise of the SFT loss by RL on the sentences to whose label the start gave a probability in one bin."""

    low: float
    high: float
    share: float  # of the sentences
    ideal_shift: float  # of the label's log-odds by own belief
    measured_shift: OverSeeds


class Tilt(TypedDict):
    """How far RL moved the log-odds of each sentence, against how far its closed form by own belief asks it to."""

    run: str
    slope: OverSeeds  # measured shift per nat of ideal shift, least squares through zero in each seed; ideal is 1
    cosine: OverSeeds  # between both shifts over the sentences; 1 if all moved in proportion
    bins: list[TiltBin]


class CrossingPoint(Change):
    """L after RL at one beta, minus the base's L."""

    run: str
    beta: float


class Crossing(TypedDict):
    """At which beta RL after SFT ends at the base's SFT loss (claim A2): above it where beta is smaller."""

    points: list[CrossingPoint]  # by falling beta; the study's own sft-rl is last, if its beta is not 0
    by_seed: list[float | None]  # beta* by interpolation in log beta; None where a seed's curve does not cross
    measured: OverSeeds | None  # exp of the mean of log beta*, over the seeds that cross; None if none does
    own_belief: float | None  # the same from each seed's closed form; None if none crosses
    perfect_learner: float | None


class SweepEntry(TypedDict):
    """One run of the sweep of beta, over all seeds."""

    run: str
    seeds: list[int]
    beta: float
    steps: int
    varied: str  # what it changes besides beta and steps
    half: str | None  # the run with half of its steps
    is_half: bool  # whether it is there as the half of another
    doubling: OverSeeds | None  # what the second half of the steps added to the rise of the loss
    settled: bool | None  # whether that is next to nothing; None where it cannot be told
    log_odds_asked: float  # mean size where own belief predicts it
    log_odds_reached: float  # mean size at the end of training
    silent_groups: float  # share of groups whose answers are all equal
    objective: float  # share of what there is to gain in J - beta KL
    slope: OverSeeds  # measured shift of log-odds per nat of ideal shift, as in Tilt
    change_of_loss: Change
    change_of_reward: Change


class Agreement(TypedDict):
    """How many sentences have one q(x)."""

    q: float  # probability of the likelier label
    share: float  # of the dev sentences of all seeds


class Uninformed(TypedDict):
    """RL from the base, beside ideal RL from there that cannot tell sentences apart."""

    loss: OverSeeds  # measured
    reward: OverSeeds
    loss_uninformed: OverSeeds
    reward_uninformed: OverSeeds


class TheoryFile(TypedDict):
    """theory.json: what the mathematics says about a study's runs, next to what they measured."""

    agreement: list[Agreement] | None  # by falling q; None where it is unknown
    beta: float
    levels: list[Level]
    temperatures: dict[str, OverSeeds]  # of least loss, by policy: 1 is calibrated, more is overconfident
    runs: list[Landing]
    uninformed: Uninformed | None  # None where beta is 0
    who_pays: list[Payer]  # by falling q; empty where q(x) is unknown or beta is 0
    tilts: list[Tilt]  # of sft-rl and of rl; empty where beta is 0
    identity_gaps: dict[str, float]  # largest violation of each identity on random problems
    test_time: Decoding
    fixed_points: dict[str, Any]  # where each variant of GRPO comes to rest, for an example's q
    sweep: list[SweepEntry] | None  # None where the sweep was not run
    crossing: Crossing | None  # None where the sweep was not run


class PolicyGeometry(TypedDict):
    """Gradients of one policy, means over seeds."""

    policy: str
    quantities: dict[str, OverSeeds]  # those of `training.gradients.summary`
    cosines: int  # seeds whose noise leaves a cosine of halves; where most have none, `quantities` have no mean of it


class PathPoint(TypedDict):
    """One step of an ascent on the exact reward from the SFT policy: changes of loss and reward since its start."""

    path: str  # plain or adam
    step: int
    tau: OverSeeds  # sum of the learning rates so far
    loss: OverSeeds  # measured, on sentences that did not pay
    reward: OverSeeds
    loss_second: OverSeeds  # predicted at the start, to second order
    reward_second: OverSeeds
    loss_linear: OverSeeds  # predicted at the start, for log-odds that are linear in the weights
    reward_linear: OverSeeds


class Stop(TypedDict):
    """Where to stop an ascent if a nat of SFT loss is worth ``rate`` of reward: the gain of J there."""

    rate: float
    measured: OverSeeds  # at the best step of the measured path
    predicted: OverSeeds  # at the step that the second-order prediction calls best


class Duration(TypedDict):
    """How long RL may go on after SFT."""

    points: list[PathPoint]
    gain_of_rl: OverSeeds  # of J by `sft-rl`, on the sentences of the gradients
    rise_by_rl: OverSeeds  # of L
    free_stretch: OverSeeds  # tau0 = -2s/h, on which the loss is not above its start to second order; 0 where s > 0
    seeds_with_a_free_stretch: int
    free_share: OverSeeds | None  # of RL's gain, for 0.01 nats of loss; None where RL gained nothing
    stops: list[Stop]


class StartPoint(TypedDict):
    """RL at one beta from one start: change of L, measured and predicted, and how far SFT had come."""

    start: str
    beta: float
    distance: OverSeeds  # L - L* before RL
    measured: OverSeeds
    truth: OverSeeds  # predicted by the sign rule with the known q(x)
    own_belief: OverSeeds  # predicted from the start, taken to be calibrated
    refitted_belief: OverSeeds  # from the start after one temperature and one bias, fitted on other sentences


class Zero(TypedDict):
    """L - L* at which the change of L by RL at one beta turns from negative (further from L*) to positive."""

    beta: float
    turning: int  # seeds in which it turns, as measured
    measured: OverSeeds | None  # over the seeds in which it turns; None where it turns in none
    truth: OverSeeds | None
    own_belief: OverSeeds | None
    refitted_belief: OverSeeds | None


class Threshold(TypedDict):
    """When RL helps SFT and when it hurts."""

    points: list[StartPoint]
    zeros: list[Zero]
    zero_of_cosine: OverSeeds | None  # L - L* at which -grad L and grad J turn from agreeing to opposing


class GeometryFile(TypedDict):
    """geometry.json: how long, when, and along which directions RL after SFT costs SFT loss."""

    policies: list[PolicyGeometry]  # along SFT, then what RL was part of
    duration: Duration
    threshold: Threshold | None  # None where RL was not begun between base and SFT
    lojasiewicz: OverSeeds | None  # mu along SFT
    claims: list[ClaimRow]


class OfLabel(TypedDict):
    """One answer to the sentences of one phenomenon and truth: mean probabilities, and RL's shift of log p."""

    share: float  # of annotators who give it, known
    ideal: float  # of ideal RL from those shares
    sft: OverSeeds  # measured after SFT
    rl: OverSeeds  # measured after RL on top of it
    shift: OverSeeds  # of log p by RL, mean over sentences, nats
    shift_own_belief: float  # the same as the SFT policy, taken to be calibrated, predicts it


class Cell(TypedDict):
    """The sentences of one phenomenon and truth, whose labels are distributed alike. Losses over p_D, nats."""

    source: str
    truth: int  # the true label
    share_of_sentences: float
    lowest_loss: float  # the entropy of what annotators say
    c1: float  # what ideal RL adds to it
    own_belief: float  # what ideal RL from the SFT policy, taken to be calibrated, adds to its loss
    loss: dict[str, OverSeeds]  # measured, of sft and rl (on top of it)
    rise: OverSeeds  # measured
    labels: list[OfLabel]  # by label


class LabelsFile(TypedDict):
    """labels.json: more than two answers, label by label; only studies of such have it."""

    answers: list[str]  # by label
    beta: float
    cells: list[Cell]
    claims: list[ClaimRow]


class Score(TypedDict):
    """A row of score.json: one policy on the dev sentences, judged by this project and by lm-evaluation-harness."""

    run: str
    seed: int
    n: int  # sentences
    accuracy: float  # of the likelier of the two answers
    harness_accuracy: float
    mcc: float
    harness_mcc: float
    offset: float  # mean log p, nats, of the white space that the harness moves from question to answer
    difference: float  # largest distance, nats, of the two log-likelihoods of an answer, the offset taken off
