"""Compares the features of two networks, and probes them with linear classifiers."""

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Computes the linear centred kernel alignment of two feature sets, in [0, 1].

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv
    1905.00414), equation 3 with linear kernels. Invariant to rotation, shift and
    scaling of either set. Use many images: with n below the number of features, even
    unrelated features score high.

    Args:
        x: (n, ...) features of n images; all axes but the first are flattened.
        y: (n, ...) features of the same images, of any width.

    Raises:
        ValueError: different numbers of images, or fewer than two.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"CKA needs the same two or more images, got {len(x)}, {len(y)}"
        )
    k, l_ = _centred_gram(x), _centred_gram(y)
    norm = np.linalg.norm(k) * np.linalg.norm(l_)
    return float(np.sum(k * l_) / norm) if norm > 0 else 0.0


def _centred_gram(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    x = x - x.mean(0, keepdims=True)
    return x @ x.T


def probe_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """Computes the test accuracy of a linear classifier on frozen features.

    Logistic regression on standardised features (Alain and Bengio, "Understanding
    intermediate layers using linear classifier probes", arXiv 1610.01644).

    Args:
        train: (n, C) features averaged over positions.
        train_labels: (n,) integers of at least two classes.
        test: (m, C).
        test_labels: (m,).
    """
    from sklearn import linear_model, pipeline, preprocessing

    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=300)
    )
    return float(probe.fit(train, train_labels).score(test, test_labels))
