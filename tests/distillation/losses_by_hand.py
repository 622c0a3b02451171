"""Every distillation loss as its paper writes it, in NumPy, float64 and loops: the independent answers."""

from __future__ import annotations

import itertools

import numpy as np


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def kl(p, q):
    """Sum of p log(p / q), without the outcomes that p rules out."""
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def rows(values):
    return values.reshape(-1, values.shape[-1])


def softened(student, teacher, temperature):
    return [
        (softmax(s / temperature), softmax(t / temperature)) for s, t in zip(rows(student), rows(teacher), strict=True)
    ]


def soft_targets(student, teacher, temperature=2.0):
    return temperature**2 * np.mean([kl(t, s) for s, t in softened(student, teacher, temperature)])


def reverse_kl(student, teacher, temperature=1.0):
    return temperature**2 * np.mean([kl(s, t) for s, t in softened(student, teacher, temperature)])


def jensen_shannon(student, teacher, temperature=1.0, beta=0.5):
    values = []
    for s, t in softened(student, teacher, temperature):
        mixture = beta * t + (1 - beta) * s
        values.append(beta * kl(t, mixture) + (1 - beta) * kl(s, mixture))
    return temperature**2 * np.mean(values)


def hard_labels(student, teacher):
    return np.mean([-np.log(softmax(s)[t.argmax()]) for s, t in zip(rows(student), rows(teacher), strict=True)])


def logit_mse(student, teacher):
    return np.mean([((s - t) ** 2).sum() for s, t in zip(rows(student), rows(teacher), strict=True)])


def decoupled(student, teacher, temperature=4.0, *, labels, alpha=1.0, beta=8.0):
    values = []
    for (s, t), label in zip(softened(student, teacher, temperature), labels.reshape(-1), strict=True):
        target = kl([t[label], 1 - t[label]], [s[label], 1 - s[label]])
        s, t = (np.delete(p, label) for p in (s, t))
        values.append(alpha * target + beta * kl(t / t.sum(), s / s.sum()))
    return temperature**2 * np.mean(values)


def dist(student, teacher, temperature=1.0, inter=1.0, intra=1.0):
    pairs = softened(student, teacher, temperature)
    s, t = (np.array(side) for side in zip(*pairs, strict=True))
    between = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    within = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    return temperature**2 * (inter * between + intra * within)


def standardize(logits):
    return np.stack([(row - row.mean()) / row.std() for row in rows(logits)]).reshape(logits.shape)


def standardized_soft_targets(student, teacher, temperature=2.0):
    return soft_targets(standardize(student), standardize(teacher), temperature)


def feature_mse(student, teacher):
    return np.mean((student - teacher) ** 2)


def cosine_distance(student, teacher):
    pairs = zip(rows(student), rows(teacher), strict=True)
    return np.mean([1 - s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in pairs])


def attention_transfer(student, teacher, power=2.0):
    values = []
    for s, t in zip(student, teacher, strict=True):
        s, t = ((np.abs(a) ** power).sum(axis=0).ravel() for a in (s, t))
        values.append(((s / np.linalg.norm(s) - t / np.linalg.norm(t)) ** 2).sum())
    return np.mean(values)


def query_key_relation(student, teacher, causal=False):
    values = []
    for (s_queries, s_keys), (t_queries, t_keys) in zip(heads_of(*student), heads_of(*teacher), strict=True):
        for i in range(len(s_queries)):
            seen = slice(i + 1 if causal else None)
            s = softmax(s_keys[seen] @ s_queries[i] / np.sqrt(s_queries.shape[1]))
            t = softmax(t_keys[seen] @ t_queries[i] / np.sqrt(t_queries.shape[1]))
            values.append(kl(t, s))
    return np.mean(values)


def heads_of(queries, keys):
    return [(q, k) for batch in zip(queries, keys, strict=True) for q, k in zip(*batch, strict=True)]


def value_relation(student, teacher, causal=False):
    return query_key_relation((student, student), (teacher, teacher), causal)


def huber(a, b):
    gap = abs(a - b)
    return gap**2 / 2 if gap <= 1 else gap - 1 / 2


def similarity_preserving(student, teacher):
    similar = []
    for values in (student, teacher):
        flat = values.reshape(len(values), -1)
        gram = flat @ flat.T
        similar.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
    return ((similar[0] - similar[1]) ** 2).sum() / len(student) ** 2


def relational_distance(student, teacher):
    pairs = list(itertools.combinations(range(len(student)), 2))
    distances = [np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (student, teacher)]
    s, t = (d / d.mean() for d in distances)
    return np.mean([huber(a, b) for a, b in zip(s, t, strict=True)])


def relational_angle(student, teacher):
    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))

    triplets = list(itertools.permutations(range(len(student)), 3))
    return np.mean([huber(cosine(student, *which), cosine(teacher, *which)) for which in triplets])


def contrastive(student, teacher, temperature=0.07):
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher))
    scores = s @ t.T / temperature
    rows_right = [np.log(softmax(row)[i]) for i, row in enumerate(scores)]
    columns_right = [np.log(softmax(column)[i]) for i, column in enumerate(scores.T)]
    return -(np.mean(rows_right) + np.mean(columns_right)) / 2


def gradient_matching(student, teacher, normalize=True):
    values = []
    for s, t in zip(student, teacher, strict=True):
        if normalize:
            s, t = s / np.linalg.norm(s), t / np.linalg.norm(t)
        values.append(((s - t) ** 2).sum())
    return np.mean(values)
