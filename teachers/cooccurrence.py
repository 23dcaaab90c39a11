"""Baselines as teachers, fitted by counting: class frequencies, and co-occurrence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd.nn.cooccurrence import Evidence, NaiveBayes, Objects


class Counted(nn.Module):
    """Naive Bayes as a teacher, without parameters to train by gradient.

    Attributes:
        task: Name of the task that fits the input.
        image_inputs: Which images the teacher reads: `none`.
        reads_labels: Whether the teacher reads the other objects' classes.
    """

    task = "scene_tokens"
    image_inputs = "none"

    def __init__(self, counts: NaiveBayes) -> None:
        super().__init__()
        self.counts = counts
        self.reads_labels = "company" in counts.evidence

    def fit(self, objects: Objects) -> None:
        """Count all objects of the train images, see `NaiveBayes.fit`."""
        self.counts.fit(objects)

    def forward(self, objects: Objects, hidden: Tensor, images: Tensor, regions: Tensor) -> Tensor:
        """Objects of N images and indices of the hidden ones (K,) to log-probabilities (K, C)."""
        log_probs: Tensor = self.counts(objects, hidden)
        return log_probs


def prior(num_classes: int) -> Counted:
    """Predict the class frequencies of the train objects, whatever the scene."""
    return Counted(NaiveBayes(num_classes, evidence=()))


def cooccurrence(
    num_classes: int,
    *,
    evidence: Sequence[Evidence] = ("company", "place", "size"),
    fitted: bool = True,
) -> Counted:
    """Naive Bayes over the other objects' classes, the box's position in the image and its size.

    Args:
        num_classes: C.
        evidence: Any of `company`, `place`, `size`.
        fitted: Whether to fit the weight of each kind of evidence on the train images, each of
            which is left out of the counts for its own objects; otherwise plain naive Bayes.
    """
    return Counted(NaiveBayes(num_classes, evidence=evidence, fitted=fitted))
