"""Baseline teachers that are fitted by counting: class frequencies, and co-occurrence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd.nn.cooccurrence import Evidence, NaiveBayes, Objects


class Counted(nn.Module):
    """Naive Bayes as a teacher, without parameters to train by gradient descent.

    Attributes:
        task: Name of the task that fits the input.
        image_inputs: Which images are part of the input: `none`.
        reads_labels: Whether the classes of the other objects are part of the input.
    """

    task = "scene_tokens"
    image_inputs = "none"

    def __init__(self, counts: NaiveBayes) -> None:
        super().__init__()
        self.counts = counts
        self.reads_labels = "company" in counts.evidence

    def fit(self, objects: Objects) -> None:
        """Fit naive Bayes to all objects of the training images, see `NaiveBayes.fit`."""
        self.counts.fit(objects)

    def forward(self, objects: Objects, hidden: Tensor, images: Tensor, regions: Tensor) -> Tensor:
        """Compute class log-probabilities (K, C) of hidden objects.

        Args:
            objects: Objects of N images.
            hidden: Indices of the hidden objects, (K,).
            images: Not used.
            regions: Not used.
        """
        log_probs: Tensor = self.counts(objects, hidden)
        return log_probs


def prior(num_classes: int) -> Counted:
    """Build a teacher that always predicts the class frequencies of the training objects."""
    return Counted(NaiveBayes(num_classes, evidence=()))


def cooccurrence(
    num_classes: int,
    *,
    evidence: Sequence[Evidence] = ("company", "place", "size"),
    fitted: bool = True,
) -> Counted:
    """Build naive Bayes over co-occurring classes and the hidden object's position and size.

    Args:
        num_classes: Number of classes, C.
        evidence: Kinds of evidence to use: `company` (classes of the other objects), `place`
            (position of the hidden object's box) and `size` (area and aspect ratio of the box).
        fitted: Whether to fit a weight for each kind of evidence on the training images, with the
            image that contains an object left out of the counts for the object. If false, this is
            plain naive Bayes.
    """
    return Counted(NaiveBayes(num_classes, evidence=evidence, fitted=fitted))
