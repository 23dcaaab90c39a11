"""Baselines as teachers, which only count: class shares, and co-occurrence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd.nn.cooccurrence import Evidence, NaiveBayes, Objects


class Counted(nn.Module):
    """Naive Bayes as a teacher; there is nothing to train by gradient.

    Attributes:
        task: The kind of task that fits the input.
        image_inputs: `none`: it takes no images.
        reads_labels: Whether it is told the other objects' classes.
    """

    task = "scene_tokens"
    image_inputs = "none"

    def __init__(self, counts: NaiveBayes) -> None:
        super().__init__()
        self.counts = counts
        self.reads_labels = "company" in counts.evidence

    def fit(self, objects: Objects) -> None:
        """Learn from all objects of the train images; see `NaiveBayes.fit`."""
        self.counts.fit(objects)

    def forward(
        self, objects: Objects, hidden: Tensor, pictures: Tensor, regions: Tensor
    ) -> Tensor:
        """Objects of N images and indices of the hidden ones (K,) to log-probabilities (K, C)."""
        log_probs: Tensor = self.counts(objects, hidden)
        return log_probs


def prior(num_classes: int) -> Counted:
    """The class shares of the train objects, whatever the scene.

    Args:
        num_classes: C.
    """
    return Counted(NaiveBayes(num_classes, evidence=()))


def cooccurrence(
    num_classes: int,
    *,
    evidence: Sequence[Evidence] = ("company", "place", "size"),
    fitted: bool = True,
) -> Counted:
    """Naive Bayes over the other objects' classes, the box's place in the picture and its size.

    Args:
        num_classes: C.
        evidence: Any of `company`, `place`, `size`.
        fitted: Whether the weight of each kind of evidence is fitted on the train images, each
            left out of the counts for its own objects; otherwise plain naive Bayes.
    """
    return Counted(NaiveBayes(num_classes, evidence=evidence, fitted=fitted))
