"""Gradients of a policy sentence by sentence: where SFT and RL would move it, how far they agree, and for how long.

Sentence i has log-odds l_i between its two answers, p_i = sigma(l_i), and the gradient g_i = dl_i/dtheta by what is
trained. y_i is the probability that its label is "acceptable": known for a generated corpus, else the label. On
n sentences, with L the SFT loss over the two labels, J the reward of sampled answers and H the Gauss-Newton matrix of L
(of two answers also the Fisher matrix),

    grad L = mean (p_i - y_i) g_i,    grad J = mean 2 p_i (1 - p_i) (2 y_i - 1) g_i,    H = mean p_i (1 - p_i) g_i g_i',

so that all lengths, cosines and curvatures follow from the n x n Gram matrix of the g_i. (Ours; the paper's second
version speaks of such gradients in its abstract.) Noise of the sentences, and of labels where y is a label, makes a
gradient look longer than it is and agree with another of the same sentences; products of two *halves* of the sentences
have no such bias.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import entr, expit, log_expit

from nondecoupling.study import folders, provenance
from nondecoupling.study.plan import FOLLOWED
from nondecoupling.task.corpus import fixed_subset
from nondecoupling.task.prompts import prompt_ids, response_ids, responses
from nondecoupling.task.seeds import seed_of
from nondecoupling.training.generation import answer_log_probabilities, batches, padded
from nondecoupling.training.models import count_parameters
from nondecoupling.training.stage import Stage
from nondecoupling.training.trainer import memory_explained, peak_memory

FloatArray = NDArray[np.float64]
TOP = (1, 2, 5, 10, 20, 50)  # numbers of eigenvectors of H whose share of a gradient is reported
SHUFFLES = 20  # of y among the sentences
RISE = 0.2  # nats of the loss to which paths are followed, by the second-order prediction


class Sentences(NamedTuple):
    """What is read, and what pays: token ids of n questions and of both answers, y (n,), and the tokenizer's pad id."""

    questions: list[list[int]]
    answers: list[list[int]]  # unacceptable, acceptable
    y: FloatArray
    pad: int


def sentences_of(stage: Stage) -> Sentences:
    """``gradients.sentences`` of dev, the same for all policies."""
    table = fixed_subset(stage.corpus, "dev", stage.settings.gradients.sentences)
    known = table["agreement"].notna().all()
    y = np.where(table["truth"] == 1, table["agreement"], 1 - table["agreement"]) if known else table["label"]
    prompt, tokenizer = stage.settings.prompt, stage.tokenizer
    answers = [response_ids(tokenizer, text) for text in responses(prompt)]
    questions = prompt_ids(tokenizer, prompt, table["sentence"])
    return Sentences(questions, answers, np.asarray(y, dtype=np.float64), tokenizer.pad_token_id)


# From the model


def log_odds_of(model: torch.nn.Module, sentences: Sentences, rows: Any) -> torch.Tensor:
    """log p(acceptable) - log p(unacceptable) of the questions ``rows``, (rows,), nats, with gradient."""
    device = next(model.parameters()).device
    answers, counted = padded(sentences.answers * len(rows), sentences.pad, "right", device)
    questions = [sentences.questions[row] for row in rows for _ in sentences.answers]
    logp = answer_log_probabilities(model, questions, answers, sentences.pad)
    unacceptable, acceptable = (logp * counted).sum(1).view(-1, 2).T
    return acceptable - unacceptable


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that a stage changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flat(tensors: Any) -> torch.Tensor:
    """``tensors`` as one float32 vector."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


def sentence_gradients(model: torch.nn.Module, sentences: Sentences) -> tuple[FloatArray, torch.Tensor]:
    """The log-odds (n,) and their gradients (n, trained parameters), each sentence read for itself."""
    parameters, n = trained(model), len(sentences.y)
    log_odds, gradients = np.empty(n), torch.empty(n, sum(parameter.numel() for parameter in parameters))
    for row in range(n):
        found = log_odds_of(model, sentences, [row])[0]
        gradients[row] = flat(torch.autograd.grad(found, parameters))
        log_odds[row] = found.item()
    return log_odds, gradients


# From log-odds and Gram matrix


def loss_of(log_odds: FloatArray, y: FloatArray) -> float:
    """L, nats over the two labels, in expectation over them."""
    return float(np.mean(-y * log_expit(log_odds) - (1 - y) * log_expit(-log_odds)))


def reward_of(log_odds: FloatArray, y: FloatArray) -> float:
    """J, the reward of sampled answers in expectation over the labels."""
    return float(np.mean((2 * y - 1) * np.tanh(log_odds / 2)))


def loss_weights(log_odds: FloatArray, y: FloatArray) -> FloatArray:
    """dL/dl_i times n."""
    return expit(log_odds) - y


def reward_weights(log_odds: FloatArray, y: FloatArray) -> FloatArray:
    """dJ/dl_i times n."""
    return 2 * curvature_weights(log_odds) * (2 * y - 1)


def curvature_weights(log_odds: FloatArray) -> FloatArray:
    """p(1-p), the second derivative of L with respect to l_i, times n."""
    return expit(log_odds) * expit(-log_odds)


def halves(n: int) -> Iterator[tuple[slice, slice]]:
    """Even and odd rows of n, and the other way round: what is paid, and what is held out."""
    even, odd = slice(0, n, 2), slice(1, n, 2)
    yield even, odd
    yield odd, even


def summary(gram: FloatArray, log_odds: FloatArray, y: FloatArray, seed: int) -> dict[str, float]:
    """The geometry of one policy, from the Gram matrix (n, n) of the g_i, the log-odds (n,) and y (n,).

    * ``loss``, ``best_loss`` (mean H(y)), ``reward``, ``loss_gradient`` and ``reward_gradient`` (lengths);
    * ``cosine`` between -grad L and grad J, on the same sentences, and ``cosine_shuffled``, its mean over `SHUFFLES`
      draws of y among the sentences (``seed``): what it would be if labels had nothing to do with sentences;
    * ``cosine_split``: of halves. It is left out where a half says that a gradient has no length beyond its noise;
    * ``slope`` s = <grad L, grad J> / |grad J|^2 and ``curvature`` h = grad J' H grad J / |grad J|^2 of the loss on one
      half along the gradient of the reward on the other, means of both ways round;
    * ``loss_top_k``, ``reward_top_k`` and ``reward_shuffled_top_k``: the share of a gradient's squared length in the
      first k eigenvectors of H; ``bound``, the least sqrt(1 - loss_top_k) + sqrt(reward_top_k), and ``bound_k``: no
      cosine is larger in size. It says something where it is below 1;
    * ``directions``: the participation ratio (sum of eigenvalues)^2 / (sum of their squares) of H.
    """
    n = len(y)
    loss, reward, curvature = loss_weights(log_odds, y), reward_weights(log_odds, y), curvature_weights(log_odds)

    def product(one: FloatArray, two: FloatArray) -> float:
        return float(one @ gram @ two) / n**2

    def cosine(one: FloatArray, two: FloatArray) -> float:
        return -product(one, two) / np.sqrt(product(one, one) * product(two, two))

    found = {
        "n": n,
        "loss": loss_of(log_odds, y),
        "best_loss": float(np.mean(entr(y) + entr(1 - y))),
        "reward": reward_of(log_odds, y),
        "loss_gradient": np.sqrt(product(loss, loss)),
        "reward_gradient": np.sqrt(product(reward, reward)),
        "cosine": cosine(loss, reward),
        **split_summary(gram, loss, reward, curvature),
    }
    rng, (values, vectors) = np.random.default_rng(seed), spectrum(gram, curvature)
    shuffled = [(loss_weights(log_odds, mixed), reward_weights(log_odds, mixed))
                for mixed in (rng.permutation(y) for _ in range(SHUFFLES))]  # fmt: skip
    found["cosine_shuffled"] = float(np.mean([cosine(*pair) for pair in shuffled]))
    top = {"loss": energy(gram, loss, vectors), "reward": energy(gram, reward, vectors)}
    top["reward_shuffled"] = np.mean([energy(gram, weights, vectors) for _, weights in shuffled], axis=0)
    for name, shares in top.items():
        found |= {f"{name}_top_{k}": float(shares[min(k, n) - 1]) for k in TOP}
    bounds = np.sqrt(1 - top["loss"]) + np.sqrt(top["reward"])
    found |= {"bound": float(bounds.min()), "bound_k": int(bounds.argmin()) + 1}
    return {name: float(value) for name, value in found.items()} | {
        "directions": float(values.sum() ** 2 / (values**2).sum())
    }


def split_summary(gram: FloatArray, loss: FloatArray, reward: FloatArray, curvature: FloatArray) -> dict[str, float]:
    """``slope``, ``curvature`` and ``cosine_split`` of `summary`."""
    across: dict[str, list[float]] = {
        "loss loss": [],
        "reward reward": [],
        "loss reward": [],
        "slope": [],
        "curvature": [],
    }
    for paid, held in halves(len(loss)):
        moved = gram[:, paid] @ reward[paid] / len(reward[paid])  # how l_i moves along the gradient of J
        square = float(np.mean(reward[paid] * moved[paid]))
        across["loss reward"].append(float(np.mean(loss[held] * moved[held])))
        across["reward reward"].append(float(np.mean(reward[held] * moved[held])))
        across["loss loss"].append(
            float(loss[held] @ gram[held, paid] @ loss[paid]) / len(loss[held]) / len(loss[paid])
        )
        across["slope"].append(across["loss reward"][-1] / square)
        across["curvature"].append(float(np.mean(curvature[held] * moved[held] ** 2)) / square)
    mean = {name: float(np.mean(values)) for name, values in across.items()}
    lengths = mean["loss loss"] * mean["reward reward"]
    found = {"slope": mean["slope"], "curvature": mean["curvature"]}
    if min(mean["loss loss"], lengths) > 0:
        cosine = -mean["loss reward"] / np.sqrt(lengths)  # of estimates, which may take it beyond 1
        found["cosine_split"] = float(np.clip(cosine, -1, 1))
    return found


def spectrum(gram: FloatArray, curvature: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues of H that are not zero, falling, (k,), and what its eigenvectors are made of, (n, k).

    H = G' W G / n has the eigenvalues of the n x n matrix W^1/2 G G' W^1/2 / n; column j holds the weights of the g_i
    whose sum is H's unit eigenvector j.
    """
    n, root = len(curvature), np.sqrt(curvature)
    values, vectors = np.linalg.eigh(root[:, None] * gram * root / n)
    kept = values > values[-1] * 1e-10
    values, vectors = values[kept][::-1], vectors[:, kept][:, ::-1]
    return values, root[:, None] * vectors / np.sqrt(n * values)


def energy(gram: FloatArray, weights: FloatArray, vectors: FloatArray) -> FloatArray:
    """Share of the squared length of the gradient with ``weights`` in the first 1, 2, ... eigenvectors, (n,)."""
    along = vectors.T @ (gram @ weights)
    shares = np.cumsum(along**2) / float(weights @ gram @ weights)
    return np.clip(np.concatenate([shares, np.full(len(weights) - len(shares), shares[-1])]), 0, 1)


# How long: ascent on the exact reward of half of the sentences, and what the start predicts for the other half


def follow(
    model: torch.nn.Module, sentences: Sentences, paid: slice, rate: float, steps: int, optimiser: Callable, batch: int
) -> list[FloatArray]:
    """Log-odds (n,) of all sentences before each of ``steps`` of ascent on J of the ``paid`` ones, and after the last.

    ``optimiser`` is a class of torch's, ``rate`` its learning rate. The model ends as it began.
    """
    parameters, n = trained(model), len(sentences.y)
    start = [parameter.detach().clone() for parameter in parameters]
    ascent, found = optimiser(parameters, lr=rate, maximize=True), []
    rows, in_paid = range(n), set(range(n)[paid])
    others = [row for row in rows if row not in in_paid]
    for step in range(steps + 1):
        ascent.zero_grad()
        log_odds = np.empty(n)
        for part, learn in [(part, True) for part in batches(rows[paid], batch)] + [
            (part, False) for part in batches(others, batch)
        ]:
            with torch.set_grad_enabled(learn and step < steps):
                odds = log_odds_of(model, sentences, part)
            log_odds[list(part)] = odds.detach().double().cpu().numpy()
            if odds.requires_grad:
                weights = reward_weights(log_odds[list(part)], sentences.y[list(part)]) / len(in_paid)
                odds.backward(torch.tensor(weights, dtype=odds.dtype, device=odds.device))
        found.append(log_odds)
        if step < steps:
            ascent.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    return found


def paths(stage: Stage, sentences: Sentences, log_odds: FloatArray, gradients: torch.Tensor) -> pd.DataFrame:
    """Ascent on J from the stage's policy, with and without Adam, measured on the sentences that do not pay.

    A row per path, way round, and step: ``path, paid, step, tau`` (the sum of the learning rates so far), ``loss`` and
    ``reward`` as measured, and as the start predicts them along the straight line in the first direction d:
    ``loss_second`` and ``reward_second`` to second order in tau (Gauss-Newton for the loss), ``loss_linear`` and
    ``reward_linear`` for a model whose log-odds are linear in theta. Nothing is fitted. d is the gradient, or with Adam
    the gradient's sign, which is Adam's first step. A path is as long as it takes ``loss_second`` to rise by `RISE`.
    """
    how, y, n = stage.settings.gradients, sentences.y, len(sentences.y)
    rows = []
    for paid, held in halves(n):
        gradient = gradients[paid].T @ torch.tensor(reward_weights(log_odds, y)[paid]).float() / len(y[paid])
        for path, direction, optimiser in (
            ("plain", gradient, torch.optim.SGD),
            ("adam", gradient.sign(), torch.optim.Adam),
        ):
            along = (gradients[held] @ direction).double().numpy()
            slope, bend = second_order_loss(log_odds[held], y[held], along)
            length = (np.sqrt(slope**2 + 2 * bend * RISE) - slope) / bend
            rate, batch = length / how.path_steps, stage.settings.evaluation.batch_size
            measured = follow(stage.policy, sentences, paid, rate, how.path_steps, optimiser, batch)
            for step, odds in enumerate(measured):
                tau = step * length / how.path_steps
                rows.append(
                    {
                        "path": path,
                        "paid": paid.start,
                        "step": step,
                        "tau": tau,
                        "loss": loss_of(odds[held], y[held]),
                        "reward": reward_of(odds[held], y[held]),
                        **predicted(log_odds[held], y[held], along, tau),
                    }
                )
    return pd.DataFrame(rows)


def second_order_loss(log_odds: FloatArray, y: FloatArray, along: FloatArray) -> tuple[float, float]:
    """Slope and curvature of L along a straight line on which l_i has the derivative ``along`` (n,)."""
    curvature = curvature_weights(log_odds)
    return float(np.mean(loss_weights(log_odds, y) * along)), float(np.mean(curvature * along**2))


def predicted(log_odds: FloatArray, y: FloatArray, along: FloatArray, tau: float) -> dict[str, float]:
    """L and J after ``tau`` along a straight line on which l_i has the derivative ``along`` (n,): see `paths`."""
    reward, (slope, curvature) = reward_weights(log_odds, y), second_order_loss(log_odds, y, along)
    bend = reward * -np.tanh(log_odds / 2)  # second derivative of J with respect to l_i, times n
    moved = log_odds + tau * along
    return {
        "loss_second": loss_of(log_odds, y) + tau * slope + tau**2 / 2 * curvature,
        "reward_second": reward_of(log_odds, y) + float(np.mean(tau * reward * along + tau**2 / 2 * bend * along**2)),
        "loss_linear": loss_of(moved, y),
        "reward_linear": reward_of(moved, y),
    }


# The stage


class Geometry(NamedTuple):
    """What was measured of a policy: `summary`, its `paths` (None where none were followed), the cost."""

    summary: dict[str, float]
    paths: pd.DataFrame | None
    training: dict[str, Any]


def measure_gradients(stage: Stage) -> Geometry:
    """The geometry of the stage's policy; of the policy that RL starts from in experiment A also its `paths`."""
    start, sentences = time.perf_counter(), sentences_of(stage)
    stage.policy.eval()
    with memory_explained("gradients.sentences", "evaluation.batch_size"):
        log_odds, gradients = sentence_gradients(stage.policy, sentences)
        gram = (gradients @ gradients.T).double().numpy()
        found = paths(stage, sentences, log_odds, gradients) if stage.run.name == FOLLOWED else None
    measured = summary(gram, log_odds, sentences.y, seed_of("shuffled labels", stage.seed))
    trained_parameters, parameters = count_parameters(stage.policy)
    seconds = time.perf_counter() - start
    training = {
        "wall_seconds": round(seconds, 2),
        "samples_per_second": round(len(sentences.y) / seconds, 1),
        "peak_memory_bytes": peak_memory(),
        "trained_parameters": trained_parameters,
        "parameters": parameters,
    }
    return Geometry(measured, found, training)


def publish_gradients(stage: Stage, geometry: Geometry) -> Path:
    """Write the run's files and publish it; returns its folder."""
    partial = folders.open_run(stage.root, stage.run, stage.seed)
    if geometry.paths is not None:
        geometry.paths.to_csv(partial / folders.PATHS, index=False)
    provenance.write_metrics(
        stage.root,
        partial,
        stage.study,
        stage.run,
        stage.seed,
        stage.started,
        {"dev": geometry.summary},
        geometry.training,
    )
    return folders.publish(partial)
