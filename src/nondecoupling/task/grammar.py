"""A hand-written grammar of English acceptability: sentences in CoLA's shape whose truth is known.

A template is a minimal pair. ``{is|*are}`` reads "is" in the acceptable sentence and "are" in the starred one;
an upper-case word is a slot, filled from LEXICON; a slot in parentheses may stay empty. The template

    the (TALL) MALE slept {|*the THING} .

thus makes as many acceptable as unacceptable sentences that differ in the violation alone.

No word gives the label away: every phenomenon also holds the mirror of each template, in which the starred words
are the right ones, and slots are drawn uniformly, so a word is as frequent in starred as in acceptable sentences.
"""

import math
import re
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

GRAMMATICAL_SHARE = 0.75  # with a tenth of the labels flipped, 0.70 are labelled acceptable, as in CoLA

MALE, MALES = ("boy", "man", "king"), ("boys", "men", "kings")
FEMALE, FEMALES = ("girl", "woman", "queen"), ("girls", "women", "queens")
PAPER, PAPERS = ("book", "letter", "key"), ("books", "letters", "keys")
VESSEL, VESSELS = ("box", "cup", "chair"), ("boxes", "cups", "chairs")
FIX, FIXED = ("fix", "damage", "describe", "mention"), ("fixed", "damaged", "described", "mentioned")
TALL, HAPPY = ("tall", "young", "clever"), ("happy", "hungry", "sad")

# All adjectives and nouns start with a consonant sound, so that "a" never has to become "an".
LEXICON = {
    "MALE": MALE,
    "FEMALE": FEMALE,
    "PERSON": MALE + FEMALE,
    "PEOPLE": MALES + FEMALES,
    "ANYONE": MALE + FEMALE + MALES + FEMALES,
    "PAPER": PAPER,
    "PAPERS": PAPERS,
    "ANYVESSEL": VESSEL + VESSELS,
    "THING": PAPER + VESSEL,
    "THINGS": PAPERS + VESSELS,
    "ANYTHING": PAPER + VESSEL + PAPERS + VESSELS,
    "NAME": ("Anna", "John", "Lucy", "Mary", "Peter", "Tom"),
    "TALL": TALL,
    "HAPPY": HAPPY,
    "KIND": TALL + HAPPY,
    "RED": ("new", "red", "heavy", "small", "blue"),
    "THIS": ("this", "a", "every"),
    "THESE": ("these", "many", "two"),
    "SHE": ("he", "she", "they"),
    "HER": ("him", "her", "them"),
    "NOT_HIMSELF": ("herself", "themselves"),
    "NOT_HERSELF": ("himself", "themselves"),
    "NOT_THEMSELVES": ("himself", "herself"),
    "IS": ("is", "was"),
    "ARE": ("are", "were"),
    "AUX": ("did", "will", "could", "should"),
    # These verbs, and find, never stand without an object.
    "FIX": FIX,
    "FIXED": FIXED,
    "FIND": ("find", *FIX),
    "FOUND": ("found", *FIXED),
    # Not find, because "did not found" is fine: it has the base form of another verb.
    "SEE": ("see", *FIX),
    "SEEN": ("seen", *FIXED),
    "MET": ("saw", "found", "mentioned", "described", "praised"),
    "HURT": ("hurt", "saw", "found", "described", "praised"),
    "SLEPT": ("slept", "arrived", "smiled", "laughed"),  # never with an object
    "THOUGHT": ("thought", "hoped"),  # with a clause, never with a thing
    "WASHED": ("washed", "fixed"),  # with a thing, never with a clause
    "NEAR": ("near", "behind", "beside"),
    "PLACE": ("house", "school", "garden", "river", "bridge"),
    "HERE": ("here", "there"),
    "READY": ("here", "there", *HAPPY),
    "WHEN": ("yesterday", "today", "at home", "at school"),
    "AGAIN": ("again", "yesterday", "today"),
    # None of these can be read as an object, as "here" or "today" could after a verb that lacks one.
    "ALONE": ("again", "alone", "quietly"),
    "MANNER": ("again", "alone", "quietly", "at home", "at school"),
    "SOON": ("also", "once", "soon"),  # not "often": a habit may leave out its object
    "DANCED": ("danced", "sang", "cried"),
}

TEMPLATES = {
    "agreement": (
        "the (RED) PAPER NEAR the (RED) ANYVESSEL {IS|*ARE} HERE .",
        "the (RED) PAPERS NEAR the (RED) ANYVESSEL {ARE|*IS} HERE .",
        "the (TALL) PERSON that MET the ANYONE {IS|*ARE} READY .",
        "the (TALL) PEOPLE that MET the ANYONE {ARE|*IS} READY .",
    ),
    "determiner": (
        "THIS (KIND) {PERSON|*PEOPLE} FOUND the (RED) ANYTHING (AGAIN) .",
        "THESE (KIND) {PEOPLE|*PERSON} FOUND the (RED) ANYTHING (AGAIN) .",
        "NAME FOUND THIS (RED) {THING|*THINGS} (MANNER) .",
        "NAME FOUND THESE (RED) {THINGS|*THING} (MANNER) .",
    ),
    "reflexive": (
        "the (KIND) MALE NEAR the ANYONE HURT {himself|*NOT_HIMSELF} (AGAIN) .",
        "the (KIND) FEMALE NEAR the ANYONE HURT {herself|*NOT_HERSELF} (AGAIN) .",
        "the (KIND) PEOPLE NEAR the ANYONE HURT {themselves|*NOT_THEMSELVES} (AGAIN) .",
        "NAME THOUGHT that the (KIND) MALE HURT {himself|*NOT_HIMSELF} (AGAIN) .",
        "NAME THOUGHT that the (KIND) FEMALE HURT {herself|*NOT_HERSELF} (AGAIN) .",
        "NAME THOUGHT that the (KIND) PEOPLE HURT {themselves|*NOT_THEMSELVES} (AGAIN) .",
    ),
    "case": (
        "WHEN {SHE|*HER} FOUND the (RED) ANYTHING (ALONE) .",
        "the (KIND) ANYONE MET {HER|*SHE} (MANNER) .",
    ),
    "argument": (
        "the (KIND) ANYONE (SOON) FOUND {the ANYTHING|*} (MANNER) .",
        "the (KIND) ANYONE (SOON) SLEPT {|*the ANYTHING} (MANNER) .",
    ),
    "order": (
        "the {KIND ANYONE|*ANYONE KIND} FOUND the (RED) ANYTHING (MANNER) .",
        # Not find, because "found empty the box" can be read as "found that the box was empty".
        "the (KIND) ANYONE FIXED {the RED|*RED the} ANYTHING (MANNER) .",
        "the (KIND) ANYONE (SOON) SLEPT {NEAR the PLACE|*the PLACE NEAR} .",
    ),
    "wh": (
        # Not find, because "What did you find it?" can be read as "What did you think it was?".
        "what AUX the (KIND) ANYONE FIX {|*the ANYTHING} (ALONE) ?",
        "AUX the (KIND) ANYONE FIX {the ANYTHING|*} (ALONE) ?",
    ),
    "tense": (
        # The time comes first, because a last "yesterday" could belong to the noun: "the news yesterday".
        "yesterday the (KIND) ANYONE {FOUND|*will FIND} the (RED) ANYTHING .",
        "tomorrow the (KIND) ANYONE {will FIND|*FOUND} the (RED) ANYTHING .",
        "the (KIND) PERSON did not {SEE|*SEEN} the (RED) ANYTHING .",
        "the (KIND) PERSON has not {SEEN|*SEE} the (RED) ANYTHING .",
    ),
    "embedding": (
        "NAME {THOUGHT|*WASHED} that the (KIND) ANYONE SLEPT (MANNER) .",
        "the (KIND) ANYONE {WASHED|*THOUGHT} the (RED) ANYVESSEL (AGAIN) .",
        "the (KIND) ANYONE {hoped|*inquired} that NAME SLEPT (MANNER) .",
        "the (KIND) ANYONE {inquired|*hoped} whether NAME SLEPT (MANNER) .",
    ),
    "coordination": (
        # One person, because "both the girls or the box" is fine: both girls.
        "NAME MET both the PERSON {and|*or} the (RED) ANYTHING .",
        "NAME MET either the PERSON {or|*and} the (RED) ANYTHING .",
        "the TALL {and HAPPY ANYONE|*ANYONE and HAPPY} (SOON) SLEPT (MANNER) .",
    ),
    # The second is the mirror of the first: a capital "No" is in starred sentences as often as in acceptable ones.
    "quantifier": (
        "{no|*the} (KIND) ANYONE ever FOUND {the|*no} (RED) ANYTHING (ALONE) .",
        "{the|*no} (KIND) ANYONE SLEPT and {no|*the} ANYONE ever DANCED .",
    ),
}

PHENOMENA = {
    "agreement": "The verb agrees with its subject, not with a nearer noun: "
    "The keys near the box are here. / *The keys near the box is here.",
    "determiner": "A determiner agrees in number with its noun: "
    "Mary found these red books. / *Mary found this red books.",
    "reflexive": "A reflexive agrees in gender and number with the subject of its own clause: "
    "The girl near the man saw herself. / *The girl near the man saw himself.",
    "case": "A pronoun has one form as a subject and another as an object: "
    "The queen praised him. / *The queen praised he.",
    "argument": "Some verbs need an object and others allow none: The boy slept. / *The boy slept the box.",
    "order": "Adjectives stand between determiner and noun, prepositions before their noun phrase: "
    "The tall girl found the box. / *The girl tall found the box.",
    "wh": "A question word leaves the object's place empty, and nothing else may: "
    "What did the boy fix? / *What did the boy fix the box?",
    "tense": "The tense fits the time named, and the verb's form fits its auxiliary: "
    "The girl did not see the box. / *The girl did not seen the box.",
    "embedding": "A verb selects a clause or a noun phrase, and the clause's first word: "
    "Mary thought that the boy slept. / *Mary washed that the boy slept.",
    "coordination": "Both goes with and, either with or, and only like phrases are joined: "
    "John saw both the girl and the box. / *John saw both the girl or the box.",
    "quantifier": "Ever needs a negative word before it, in its own clause: "
    "No girl ever found the box. / *The girl ever found no box.",
}


def require_each_phenomenon(named: Collection[str], setting: str, drawn: Collection[str] = tuple(PHENOMENA)) -> None:
    """Raise ValueError unless ``named``, what a user wrote in ``setting``, are the phenomena that are ``drawn``."""
    for wrong in sorted(set(named) ^ set(drawn)):
        what = "is no phenomenon of the grammar" if wrong not in PHENOMENA else "is not drawn"
        what = what if wrong in named else "is missing"
        raise ValueError(f"{setting}: '{wrong}' {what}; it must name each of {', '.join(drawn)}.")


def sample_sentences(
    n: int,
    seed: int,
    exclude: Collection[str] = (),
    *,
    grammatical_share: float = GRAMMATICAL_SHARE,
    phenomena: Collection[str] = tuple(PHENOMENA),
) -> pd.DataFrame:
    """Draw n distinct sentences, evenly over phenomena and over the templates of each.

    Parameters
    ----------
    n : int
        Number of sentences.
    seed : int
        Seed of the draw: the same arguments give the same table.
    exclude : collection of str
        Sentences that must not be drawn, such as those of another split.
    grammatical_share : float
        Share of acceptable sentences in [0, 1]; exactly round(grammatical_share * n) are acceptable.
    phenomena : collection of str
        Which of PHENOMENA are drawn.

    Returns
    -------
    pandas.DataFrame, shape (n, 4)
        In random order: `source` (a key of PHENOMENA), `label` (1 acceptable, 0 not), `mark` ("" or "*", the
        grammar's verdict, here the same as the label) and `sentence`.

    Raises
    ------
    ValueError
        If n is negative, the share is not in [0, 1], or the grammar has too few sentences.
    """
    if n < 0:
        raise ValueError(f"n is the number of sentences and must be at least 0, not {n}.")
    if not 0 <= grammatical_share <= 1:
        raise ValueError(f"grammatical_share must be between 0 and 1, not {grammatical_share}.")
    rng = np.random.default_rng(seed)
    acceptable = round(grammatical_share * n)
    taken = set(exclude)
    rows = []
    for label, total in ((1, acceptable), (0, n - acceptable)):
        drawn = [source for source in TEMPLATES if source in phenomena]
        for source, count in zip(drawn, _split_evenly(total, len(drawn), rng), strict=True):
            templates = TEMPLATES[source]
            for template, quota in zip(templates, _split_evenly(count, len(templates), rng), strict=True):
                sentences = _draw(template, label, quota, taken, rng)
                taken.update(sentences)
                rows += [(source, label, "" if label else "*", sentence) for sentence in sentences]
    table = pd.DataFrame(rows, columns=["source", "label", "mark", "sentence"]).astype({"label": int})
    return table.iloc[rng.permutation(n)].reset_index(drop=True)


def flip_labels(table: pd.DataFrame, rates: float | Mapping[str, float], seed: int) -> pd.DataFrame:
    """Return the table with labels flipped at a known rate, by annotators who disagree.

    Of n sentences at rate r exactly round(r * n) are flipped, spread over truly unacceptable and truly acceptable
    sentences in proportion, so that the noise tells nothing of the truth. `mark` keeps the truth. The best SFT loss per
    label is then the entropy -r log r - (1 - r) log(1 - r) nats; the reward of a policy that samples from the true
    label distribution is (1 - 2 r)**2, that of one that always gives the likelier label 1 - 2 r.

    Parameters
    ----------
    table : pandas.DataFrame, shape (n, columns)
        With `label` (0 or 1), `mark` ("" if truly acceptable) and, for rates by phenomenon, `source`.
    rates : float, or a mapping from each source to a float
        Share of labels to flip, in [0, 0.5): of all sentences, or of those of each source.
    seed : int
        Seed of the choice of rows.

    Returns
    -------
    pandas.DataFrame, shape (n, columns)

    Raises
    ------
    ValueError
        If a rate is not in [0, 0.5).
    """
    rng = np.random.default_rng(seed)
    marks, labels = table["mark"].to_numpy(), table["label"].to_numpy(copy=True)
    by_source = rates if isinstance(rates, Mapping) else {None: rates}
    for source, rate in by_source.items():
        if not 0 <= rate < 0.5:
            raise ValueError(f"rate must be at least 0 and below 0.5, where labels say nothing, not {rate}.")
        among = np.full(len(table), True) if source is None else (table["source"] == source).to_numpy()
        fine, starred = (np.flatnonzero(among & (marks == "")), np.flatnonzero(among & (marks != "")))
        starred_flips = round(rate * len(starred))
        fine_flips = round(rate * among.sum()) - starred_flips  # round(rate * len(fine)), or 1 off to meet the total
        for rows, flips in ((starred, starred_flips), (fine, fine_flips)):
            chosen = rng.choice(rows, flips, replace=False)
            labels[chosen] = 1 - labels[chosen]
    return table.assign(label=labels)


def _split_evenly(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Split total into `parts` counts that differ by at most 1; chance says which are larger."""
    return (total // parts + (rng.permutation(parts) < total % parts)).tolist()


def _slots(template: str, label: int) -> list[tuple[str, ...]]:
    """List the alternatives at each place of a template's acceptable (label 1) or starred (0) sentence."""
    side = re.sub(r"\{(.*?)\|\*(.*?)\}", r"\1" if label else r"\2", template)
    words = side.split()[:-1]  # the last is the punctuation
    return [("", *LEXICON[word[1:-1]]) if word.startswith("(") else LEXICON.get(word, (word,)) for word in words]


def _draw(template: str, label: int, quota: int, taken: set[str], rng: np.random.Generator) -> list[str]:
    """Draw `quota` distinct sentences that are not taken; raise ValueError if there are fewer."""
    slots = _slots(template, label)
    drawn: list[str] = []
    for index in rng.permutation(math.prod(map(len, slots))):
        if len(drawn) == quota:
            break
        sentence = _spell(slots, int(index)) + template[-1]
        if sentence not in taken:
            drawn.append(sentence)
    if len(drawn) < quota:
        raise ValueError(
            f"Only {len(drawn)} {'acceptable' if label else 'unacceptable'} sentences of the template '{template}' "
            f"are available where {quota} are asked for: ask for fewer sentences, or exclude fewer."
        )
    return drawn


def _spell(slots: list[tuple[str, ...]], index: int) -> str:
    """Spell the index-th sentence, without punctuation: the index is a number whose digits choose the words."""
    words = []
    for alternatives in slots:
        index, digit = divmod(index, len(alternatives))
        words.append(alternatives[digit])
    text = " ".join(filter(None, words))
    return text[0].upper() + text[1:]
