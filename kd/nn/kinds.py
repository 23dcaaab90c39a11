"""Kinds of scene that nobody names: an answer is a mixture over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.nn.transformer import PLACE_FEATURES, Tokens, place_features

# The first guesses at a scene's kind are nearly alike: kinds chosen by chance before there is
# anything to know about them are hard to leave again.
_TIMID = 0.2
_NAMES_STD = 0.5
_NEVER = -1e4  # log odds, finite where every kind is dropped


class SceneKinds(nn.Module):
    """`p(c | rest) = sum_k p(k | rest) p(c | k, place, rest)`, k a kind of scene.

    Each visible object is evidence for each kind, and evidence adds up, `log p(k | rest) =
    b_k + sum_j e_k(class_j, box_j) + const`; a kind says by itself what belongs where in it. The
    kinds are never told: they are what explains best which objects come together (latent class
    analysis, Lazarsfeld and Henry, 1968; as the end of a network a mixture of softmaxes, Yang et
    al., 2018, https://arxiv.org/abs/1711.03953). A few thousand scenes are enough to find them,
    where attention alone would need many more to learn to multiply evidence.

    Args:
        num_classes: C.
        width: Of the hidden layers.
        kinds: How many, more than there may be: kinds that are alike cost nothing.
        dropout: Share of the kinds that an answer must do without in training, so that none is
            the only one of its sort.
    """

    def __init__(self, num_classes: int, *, width: int, kinds: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.names = nn.Embedding(num_classes, width)
        self.place = nn.Sequential(nn.Linear(PLACE_FEATURES, width), nn.GELU())
        said = nn.Linear(width, kinds)
        self.speak = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), said)
        self.belongs = nn.Sequential(
            nn.Linear(PLACE_FEATURES, width), nn.GELU(), nn.Linear(width, kinds * num_classes)
        )
        self.often = nn.Parameter(torch.zeros(kinds))
        nn.init.normal_(self.names.weight, std=_NAMES_STD)
        with torch.no_grad():
            said.weight.mul_(_TIMID)

    def evidence(self, classes: Tensor, boxes: Tensor) -> Tensor:
        """What each object says of each kind, log odds (M, kinds).

        Args:
            classes: (M,).
            boxes: (M, 4) xyxy in units of the frame.
        """
        place = self.place(place_features(boxes))
        said: Tensor = self.speak(torch.cat([self.names(classes), place], dim=1))
        return said

    def forward(self, asked: Tensor, company: Tokens, logits: Tensor) -> Tensor:
        """Log-probabilities (K, C).

        Args:
            asked: Boxes of the hidden objects, (K, 4).
            company: `evidence` as tokens, and what of it each hidden object's answer may know.
            logits: (K, C) what is said for each class whatever the kind of scene.
        """
        # A sum over what is seen, and nothing taken away again: exact, to the last bit.
        seen = company.queries.put(company.seen.to(company.tokens.dtype))
        votes = company.queries.take(torch.einsum("nqt,ntk->nqk", seen, company.tokens))
        kind = votes + self.often
        if self.training and self.dropout:
            kind = kind.masked_fill(torch.rand_like(kind) < self.dropout, _NEVER)
        belongs = self.belongs(place_features(asked)).unflatten(1, (-1, self.num_classes))
        of_kind = (belongs + logits[:, None]).float().log_softmax(dim=2)
        joint = kind.float().log_softmax(dim=1)[:, :, None] + of_kind
        mixed: Tensor = joint.logsumexp(dim=1)
        return mixed
