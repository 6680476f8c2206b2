"""The schema of a profile: every number of a study, validated before anything runs.

A *profile* is a YAML file in ``profiles/``. What is run with its numbers is the business of `plan`; how a user changes
them, that of `study`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, le=10_000_000)]  # more steps, rows or sentences no study has
ROUNDING = 1e-9  # by which shares may miss their sum
LEAST_DEV = 20  # sentences, of which both labels have some
LEAST_VOCABULARY = 300  # every byte, the special tokens, and a few words


class Section(BaseModel):
    """A part of a profile: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Columns(Section):
    """What the columns of a corpus's files are called, where they have a header."""

    sentence: str = "sentence"
    label: str = "label"
    source: str = "source"  # where a sentence is from, or what it is about; need not be there


class Data(Section):
    """Where sentences come from: ``folder`` (a corpus's files) if it is given, else ``source``.

    ``columns`` names the columns of the files in ``folder``. ``overlap`` says whether dev keeps its sentences that are
    also trained on, as CoLA's has a few, or leaves them out. ``expect: cola`` refuses files with CoLA's names that are
    not CoLA 1.1's, byte for byte. ``labels`` are the annotators', or the truth (the grammar's verdict), which only the
    generated corpus knows. The other settings shape the generated corpus; ``disagreement`` is the share of labels that
    annotators get wrong, of all sentences or by phenomenon. Where there are more than two labels, ``violations`` says
    which label a violation of each phenomenon has (the last label is that nothing is violated), and ``contradictions``
    what annotators say who get it wrong: a row for each true label, with the share of every label in it.
    """

    source: Literal["generated", "hub"]
    folder: str | None
    expect: Literal["any", "cola"]
    columns: Columns = Columns()
    overlap: Literal["keep", "leave_out"] = "keep"
    labels: Literal["annotated", "truth"] = "annotated"
    train_size: Count | None = None
    dev_size: Count | None = None
    disagreement: float | dict[str, float] | None = None
    violations: dict[str, Annotated[int, Field(ge=0)]] | None = None
    contradictions: list[list[Share]] | None = None

    @property
    def answers(self) -> int:
        """How many labels a sentence may have."""
        return 2 if self.violations is None else 2 + max(self.violations.values(), default=0)

    @property
    def generated(self) -> bool:
        """Whether the corpus is the generated one, whose disagreement is known."""
        return self.source == "generated" and self.folder is None

    @field_validator("disagreement", mode="before")
    @classmethod
    def rates_say_something(cls, value: Any) -> Any:
        rates = value.values() if isinstance(value, dict) else [] if value is None else [value]
        for rate in rates:
            if type(rate) not in (int, float) or not 0 <= rate < 0.5:
                raise ValueError(f"a rate must be a number of at least 0 and less than 0.5, not {rate!r}")
        return value

    @model_validator(mode="after")
    def generated_corpus_is_described(self) -> "Data":
        missing = [name for name in ("train_size", "dev_size", "disagreement") if getattr(self, name) is None]
        if self.source == "generated" and missing:
            raise ValueError(f"the generated corpus needs the setting '{missing[0]}'")
        return self

    @model_validator(mode="after")
    def labels_are_described(self) -> "Data":
        if (self.violations is None) != (self.contradictions is None):
            raise ValueError("violations and contradictions need each other")
        if self.violations is None or self.contradictions is None:
            return self
        if not self.generated:
            raise ValueError("violations need the generated corpus: files of sentences have two labels")
        if self.answers < 3 or set(self.violations.values()) != set(range(self.answers - 1)):
            raise ValueError("violations must use two labels or more, and each number from 0 on")
        if [len(row) for row in self.contradictions] != [self.answers] * self.answers:
            raise ValueError(f"contradictions need {self.answers} rows of {self.answers} shares, one for each label")
        for label, row in enumerate(self.contradictions):
            if row[label] or abs(sum(row) - 1) > ROUNDING:
                raise ValueError(f"row {label} of contradictions must have 0 in place {label}, and the sum 1")
        return self

    @model_validator(mode="after")
    def truth_is_known(self) -> "Data":
        if self.labels == "truth" and not self.generated:
            raise ValueError("labels: truth needs the generated corpus, whose truth is known")
        return self


class Prompt(Section):
    """The question, its answers, and another wording of them (``{answer}`` is where the answer goes).

    ``unacceptable`` is one answer, or a list of them for kinds of violation.
    """

    template: Annotated[str, Field(pattern=r"\{sentence\}")]
    acceptable: Annotated[str, Field(min_length=1)]
    unacceptable: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]]
    other_wording: Annotated[str, Field(pattern=r"\{answer\}")]
    max_new_tokens: Annotated[int, Field(ge=2, le=10_000)]  # an answer has one token at least, and its end of turn

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers, indexed by label: the last is that a sentence is acceptable."""
        kinds = [self.unacceptable] if isinstance(self.unacceptable, str) else self.unacceptable
        return (*kinds, self.acceptable)

    @model_validator(mode="after")
    def answers_differ(self) -> "Prompt":
        if len(self.answers) < 2:
            raise ValueError("unacceptable must name an answer")
        if len({answer.lower() for answer in self.answers}) < len(self.answers):
            raise ValueError("the answers, acceptable and unacceptable, must differ in more than case")
        return self


class Adaptation(Section):
    """Which weights a stage trains: a LoRA adapter on every linear layer, or all of them."""

    method: Literal["lora", "full"]
    rank: Count
    alpha: Count


class Model(Section):
    """The base model: ``folder`` (a causal LM with a chat template) if it is given, else ``hub``, else pretrained here.

    ``revision`` and ``sha256`` (of the weights) pin what the hub id names. ``quantization`` and ``dtype`` say
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
    """The embedded base model: shape, optimisation, and what it is taught.

    ``taught`` says for each phenomenon with which probability it is to call unacceptable and acceptable sentences
    "acceptable": two equal numbers where it is to tell nothing apart. Of the others it is taught the right answers
    until ``sure_until`` of its steps, these numbers from ``settled_at`` on, and in between what is between. Where there
    are more than two answers, a probability for each of them stands in a number's place.
    ``untaught_share`` is how often it is asked about a phenomenon in which it is to tell nothing apart, relative to one
    in which it is.
    """

    vocabulary: Count
    hidden_size: Count
    layers: Count
    head_size: Count
    intermediate_size: Count
    corpus_size: Count
    text_share: Share
    text_weight: Share
    batch_size: Count
    steps: Count
    learning_rate: Positive
    warmup_share: Share
    sure_until: Share
    settled_at: Share
    untaught_share: Share
    taught: dict[str, list[Share] | list[list[Share]]]

    @model_validator(mode="after")
    def shape_is_possible(self) -> "Pretrain":
        if self.hidden_size % self.head_size or self.head_size % 2:
            raise ValueError(f"head_size ({self.head_size}) must be even and divide hidden_size ({self.hidden_size})")
        if self.vocabulary < LEAST_VOCABULARY:
            raise ValueError(
                f"vocabulary ({self.vocabulary}) must be at least {LEAST_VOCABULARY}: every byte has a token"
            )
        return self

    @model_validator(mode="after")
    def targets_are_pairs(self) -> "Pretrain":
        if self.sure_until >= self.settled_at:
            raise ValueError("sure_until must come before settled_at")
        if wrong := [name for name, pair in self.taught.items() if len(pair) != 2]:
            raise ValueError(f"taught.{wrong[0]} needs two probabilities, of unacceptable and of acceptable sentences")
        for name, pair in self.taught.items():
            if any(isinstance(shares, list) and abs(sum(shares) - 1) > ROUNDING for shares in pair):
                raise ValueError(f"taught.{name}: the probabilities of all answers must have the sum 1")
        return self

    @model_validator(mode="after")
    def both_are_read(self) -> "Pretrain":
        if not 0 < round(self.text_share * self.batch_size) < self.batch_size:
            raise ValueError(f"text_share ({self.text_share}) must leave both texts and chats in a batch")
        return self


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
    "random" pays for a label that a coin chose, once for each sentence; "proxy" is the score of a reward model that
    learnt from preferences.
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

    @property
    def grpo_beta(self) -> float:
        """The beta that trl's GRPO is given, so that it comes to rest where E[r] - beta KL is largest.

        A group's mean reward contains the answer that it is subtracted from, which shrinks the policy gradient by
        (G - 1) / G and leaves the KL's. Divided by the group's deviation, the objective is another one in any case.
        """
        if self.normalisation == "group":
            return self.beta
        return self.beta * (self.answers_per_prompt - 1) / self.answers_per_prompt

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


class RewardModel(Section):
    """The proxy: a reward model (trl's RewardTrainer) on pairs of the right and the wrong answer to one question."""

    steps: Count
    pairs_per_step: Count
    learning_rate: Positive
    warmup_share: Share
    schedule: Literal["constant", "linear", "cosine"]


class Sweep(Section):
    """RL after SFT at other prices of the KL: the betas, or none."""

    betas: list[Positive]

    @model_validator(mode="after")
    def betas_differ(self) -> "Sweep":
        if len({f"{beta:g}" for beta in self.betas}) < len(self.betas):
            raise ValueError("betas must differ in their first six digits, which name the runs")
        return self


class Gradients(Section):
    """Gradients of finished policies on ``sentences`` of dev, and ``path_steps`` of ascent on the exact reward."""

    sentences: Annotated[int, Field(ge=4)]
    path_steps: Count


class Evaluation(Section):
    """How policies are measured: finished ones on ``splits``, those in training on ``along_size`` sentences of dev."""

    points: Annotated[int, Field(ge=2)]
    along_size: Count | None
    splits: list[Literal["dev", "dev_out", "train"]]
    train_size: Count
    batch_size: Count

    @model_validator(mode="after")
    def dev_is_measured(self) -> "Evaluation":
        if "dev" not in self.splits:
            raise ValueError("splits must include 'dev', on which claims are judged")
        return self


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
    reward_model: RewardModel
    sweep: Sweep
    gradients: Gradients
    evaluation: Evaluation

    @property
    def pretrains(self) -> bool:
        """Whether the study grows a base model of its own."""
        return not (self.model.folder or self.model.hub)

    @model_validator(mode="after")
    def answers_and_labels_agree(self) -> "Profile":
        asked, known = len(self.prompt.answers), self.data.answers
        if asked != known:
            raise ValueError(f"prompt.unacceptable and acceptable are {asked} answers, but data knows {known} labels")
        if asked > 2 and self.rl.beta == 0:
            raise ValueError("rl.beta must be positive where there are more than two answers, or RL has no closed form")
        for name, pair in self.pretrain.taught.items() if self.pretrain and self.pretrains else ():
            if any((len(shares) if isinstance(shares, list) else 2) != asked for shares in pair):
                raise ValueError(f"pretrain.taught.{name} must have a probability for each of the {asked} answers")
        return self

    @model_validator(mode="after")
    def sentences_suffice(self) -> "Profile":
        """What a step reads are different sentences; other corpora are counted when they are read."""
        if not self.data.generated:
            return self
        read = {
            "sft.batch_size": self.sft.batch_size,
            "rl.prompts_per_step": self.rl.prompts_per_step,
            "joint.prompts_per_step": self.joint.prompts_per_step,
            "joint.demonstrations_per_step": self.joint.demonstrations_per_step,
            "reward_model.pairs_per_step": self.reward_model.pairs_per_step,
        }
        name, most = max(read.items(), key=lambda item: item[1])
        if (self.data.train_size or 0) < most:
            raise ValueError(f"data.train_size ({self.data.train_size}) is less than {name} ({most}), read in one step")
        if (self.data.dev_size or 0) < LEAST_DEV:
            raise ValueError(f"data.dev_size ({self.data.dev_size}) must be at least {LEAST_DEV} to measure anything")
        return self

    @model_validator(mode="after")
    def base_can_be_had(self) -> "Profile":
        if self.pretrains and not self.pretrain:
            raise ValueError("the study has no base model: give model.folder, model.hub or the section 'pretrain'")
        if self.model.quantization == "8bit" and self.adaptation.method == "full":
            raise ValueError(
                "an 8-bit model cannot be trained whole: set adaptation.method=lora or model.quantization=none"
            )
        return self
