"""FID against SciPy's root of a matrix, P-IDS and U-IDS against their definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpnet.evaluation import sets
from dpnet.evaluation.sets import Moments, discriminate, frechet_distance, measure_sets

WIDTH = 24


def features(seed: int, count: int, scale: float = 1.0, shift: float = 0.0) -> Any:
    made = np.random.default_rng(seed)
    mixed = made.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
    return (made.normal(size=(count, WIDTH)) @ mixed * scale + shift).astype(np.float32)


def gaussian(values: Any, pieces: int = 3) -> Any:
    moments = Moments(values.shape[1])
    for some in np.array_split(values, pieces):
        moments.add(some)
    return moments.gaussian()


def by_scipy(one: Any, other: Any) -> float:
    """Return FID as Heusel et al. wrote it."""
    from scipy.linalg import sqrtm

    one, other = one.astype(np.float64), other.astype(np.float64)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(first @ second).real
    means = one.mean(0) - other.mean(0)
    return float(means @ means + np.trace(first + second - 2 * root))


@pytest.mark.parametrize("count", [500, 25])
def test_the_frechet_distance_is_that_of_the_root_of_the_product(count: int) -> None:
    one, other = features(0, count), features(1, count, 1.3, 0.2)
    found = frechet_distance(gaussian(one), gaussian(other))
    assert found == pytest.approx(by_scipy(one, other), rel=1e-6)


def test_the_distance_of_gaussians_on_a_line_is_known() -> None:
    """|m1 - m2|² + (s1 - s2)², with the unbiased variances 2 and 8."""
    one, other = np.float32([[1], [3]]), np.float32([[5], [9]])
    assert frechet_distance(gaussian(one), gaussian(other)) == pytest.approx(25 + 2)


def test_an_equal_set_has_no_distance_even_without_full_rank() -> None:
    few = features(0, 5)
    assert frechet_distance(gaussian(few), gaussian(few[::-1])) == pytest.approx(0, abs=1e-6)


def test_the_moments_do_not_depend_on_the_parts() -> None:
    values = features(0, 60)
    whole, parts = gaussian(values, 1), gaussian(values, 7)
    assert np.allclose(whole.covariance, np.cov(values.astype(float), rowvar=False), atol=1e-12)
    assert np.allclose(parts.covariance, whole.covariance, atol=1e-12)
    assert np.allclose(parts.mean, values.astype(float).mean(0), atol=1e-12)


def test_sets_that_a_line_separates_have_0() -> None:
    real = features(0, 50)
    assert discriminate(real, real + 100) == (0, 0)


def test_ids_are_the_shares_of_wrong_sides_and_of_pairs_as_their_authors_compute_them() -> None:
    from sklearn.svm import LinearSVC

    real, fake = features(0, 80), features(1, 80, 1.0, 0.1)
    machine = LinearSVC(dual=False)
    both, labels = np.concatenate([real, fake]), np.array([1] * 80 + [0] * 80)
    machine.fit(both, labels)
    found = discriminate(real, fake)
    assert found.u_ids == pytest.approx(100 * (1 - machine.score(both, labels)))
    wins = machine.decision_function(fake) > machine.decision_function(real)
    assert found.p_ids == pytest.approx(100 * np.mean(wins))
    assert 0 < found.p_ids < found.u_ids < 50


def test_a_perfect_copy_is_wrong_half_of_the_time_and_never_looks_more_real() -> None:
    real = features(0, 40)
    assert discriminate(real, real) == (0, 50)


def parts_of(real: Any, *fakes: Any, size: int = 7) -> Any:
    whole = np.stack([real, *fakes])
    return [whole[:, start : start + size] for start in range(0, len(real), size)]


def test_each_method_is_compared_with_the_truths() -> None:
    real, near, far = features(0, 60), features(1, 60), features(2, 60, 2.0, 1.0)
    found = measure_sets(parts_of(real, near, far), 60, ["near", "far"])
    assert found["methods"]["near"]["fid"] == pytest.approx(by_scipy(real, near), rel=1e-6)
    assert found["methods"]["near"]["p_ids"] == discriminate(real, near).p_ids
    assert found["methods"]["far"]["fid"] == pytest.approx(by_scipy(real, far), rel=1e-6)
    assert found["methods"]["far"]["u_ids"] == discriminate(real, far).u_ids
    assert (found["pairs"], found["svm_pairs"]) == (60, 60)


def test_the_machine_sees_evenly_spread_pairs_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "SVM_PAIRS", 60)
    real, fake = features(0, 180), features(1, 180, 1.0, 0.1)
    found = measure_sets(parts_of(real, fake), 180, ["fake"])
    assert found["svm_pairs"] == 60
    ids = discriminate(real[::3], fake[::3])
    assert ids != discriminate(real[:60], fake[:60])
    assert {name: found["methods"]["fake"][name] for name in ids._fields} == ids._asdict()
    assert found["methods"]["fake"]["fid"] == pytest.approx(by_scipy(real, fake), rel=1e-6)


def test_memory_does_not_grow_with_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(sets, "SVM_PAIRS", 50)
    some = np.stack([features(0, 500), features(1, 500)])
    peaks = []
    for count in (1, 1, 40):  # the first one imports scikit-learn
        tracemalloc.start()
        measure_sets((some.copy() for _ in range(count)), 500 * count, ["fake"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 5 * some.nbytes


def test_linear_algebra_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from threadpoolctl import threadpool_info

    seen: list[int] = []
    real = sets.discriminate

    def noting(*given: Any) -> Any:
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return real(*given)

    monkeypatch.setattr(sets, "discriminate", noting)
    measure_sets(parts_of(features(0, 9), features(1, 9)), 9, ["fake"])
    assert seen
    assert set(seen) == {1}
