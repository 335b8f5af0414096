"""Metrics of whole sets of images: FID, P-IDS and U-IDS, from Inception features.

They compare the composites of all pairs with the truths of all pairs. Features come part by part,
and the mean and covariance are sums over them. The support vector machine of P-IDS and U-IDS needs
many features at once, so it sees at most SVM_PAIRS pairs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from data_prep.core.lease import check_leases
from data_prep.core.temporary import nameless_file, naming_temporary_folder

Features = NDArray[np.float32]  # [images, features]
Values = NDArray[np.float64]

LEAST_PAIRS = 2  # a covariance needs two
SVM_PAIRS = 20_000  # then the machine needs about 2 GB


class Moments:
    """The count, sum and sum of products of features, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, features: Features) -> None:
        """Add the features of some images."""
        values = features.astype(np.float64)
        self.count += len(values)
        self._sum += values.sum(axis=0)
        self._products += values.T @ values

    def gaussian(self) -> Gaussian:
        """Return the mean and the unbiased covariance, as NumPy's `cov` does."""
        mean = self._sum / self.count
        centred = self._products - self.count * np.outer(mean, mean)
        return Gaussian(mean, centred / (self.count - 1))


@dataclass(frozen=True)
class Gaussian:
    """A mean [features] and a covariance [features, features]."""

    mean: Values
    covariance: Values

    @cached_property
    def root(self) -> Values:
        """Return the symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        found: Values = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        return found


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians (Heusel et al., NeurIPS 2017).

    It is |m1 - m2|² + trace(C1 + C2 - 2 (C1 C2)^½). The trace of the root is the sum of the roots
    of the eigenvalues of C1^½ C2 C1^½, which is symmetric. So covariances without full rank need no
    correction.
    """
    product = np.linalg.eigvalsh(one.root @ other.covariance @ one.root)
    overlap = np.sqrt(np.clip(product, 0, None)).sum()
    distance = np.square(one.mean - other.mean).sum()
    distance += np.trace(one.covariance) + np.trace(other.covariance)
    return max(0.0, float(distance - 2 * overlap))


class Discrimination(NamedTuple):
    """P-IDS and U-IDS in percent; 50 if nobody can tell the sets apart."""

    p_ids: float
    u_ids: float


def discriminate(real: Features, fake: Features) -> Discrimination:
    """Return P-IDS and U-IDS (Zhao et al., ICLR 2021).

    A linear support vector machine learns to tell real from fake features. U-IDS is the share of
    features on the wrong side. P-IDS is the share of pairs in which the fake image looks more real
    to it than its own truth.

    Args:
        real: features of the truths, [pairs, features].
        fake: features of the composites, in the same order.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    both = np.concatenate([real, fake], dtype=np.float64)
    labels = np.repeat([1, 0], len(real))
    machine = LinearSVC(dual=False)  # the authors' settings; without random numbers
    with warnings.catch_warnings():
        # Their figures do not wait for it to converge either.
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(both, labels)
    of_real, of_fake = np.split(machine.decision_function(both), 2)  # above 0: it looks real
    wrong = np.count_nonzero(of_real <= 0) + np.count_nonzero(of_fake > 0)
    return Discrimination(
        p_ids=100 * float(np.mean(of_fake > of_real)), u_ids=100 * float(wrong / len(both))
    )


def measure_sets(
    parts: Iterable[NDArray[np.float32]], pairs: int, methods: Sequence[str]
) -> dict[str, Any]:
    """Return FID, P-IDS and U-IDS of each method.

    Memory holds one part, a matrix for each method, and the features of two sets of at most
    SVM_PAIRS pairs. Linear algebra runs in one thread, because its rounding depends on their
    number.

    Args:
        parts: features [1 + methods, pairs of the part, features], the truth first, in the order
            of the pairs.
        pairs: the number of all pairs, at least LEAST_PAIRS.
        methods: names of the methods, in the order of the features.
    """
    kept = min(pairs, SVM_PAIRS)
    places = np.arange(kept) * pairs // kept  # of the pairs that the machine sees, evenly spread
    with threadpool_limits(1), nameless_file() as file:
        moments, seen, chosen = [], 0, None
        for part in parts:
            check_leases()
            sets, count, width = part.shape
            if chosen is None:
                moments = [Moments(width) for _ in range(sets)]
                chosen = _on_disk(file, (sets, kept, width))
            for own, features in zip(moments, part, strict=True):
                own.add(features)
            low, high = np.searchsorted(places, [seen, seen + count])
            chosen[:, low:high] = part[:, places[low:high] - seen]
            seen += count
        assert seen == pairs, "the parts have all pairs"
        assert chosen is not None
        found, real = {}, moments[0].gaussian()
        for number, method in enumerate(methods, 1):
            check_leases()
            shown = discriminate(chosen[0], chosen[number])
            distance = frechet_distance(real, moments[number].gaussian())
            found[method] = {"fid": distance, **shown._asdict()}
    return {"pairs": pairs, "svm_pairs": kept, "methods": found}


def _on_disk(file: Any, shape: tuple[int, ...]) -> Features:
    """Return an array in a temporary file, so that it is no memory of this process."""
    with naming_temporary_folder():
        # With its space, because a full disk would end the process at a later write.
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.float32().itemsize)
    return np.memmap(file, np.float32, "r+", shape=shape)
