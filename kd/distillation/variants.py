"""The variants of an experiment: one student with and without each part of the method."""

from __future__ import annotations

from dataclasses import dataclass

from kd.config.recipes import DistillRecipe, TermSection
from kd.distillation.registry import term_kind


@dataclass(frozen=True)
class Variant:
    """A student that a recipe compares.

    Args:
        name: Name of its folder, curves and column.
        terms: Distillation terms that it learns from, beside the labels.
        watched: Terms whose curves are logged without training on them, where that costs nothing.
        context_head: Whether the student has its context head, if there is one.
        shuffled: Whether each cached posterior is assigned to another object: the control.
    """

    name: str
    terms: tuple[TermSection, ...] = ()
    watched: tuple[TermSection, ...] = ()
    context_head: bool = True
    shuffled: bool = False

    @property
    def outputs(self) -> set[str]:
        """Outputs and layers of the student that its terms read."""
        read = (section.student or term_kind(section).student for section in self.terms)
        return {name for name in read if name is not None}


def variants_of(recipe: DistillRecipe) -> dict[str, Variant]:
    """Return all variants of a recipe by name.

    `plain` learns from labels only, `distilled` from the recipe's terms as well; `no_context` is
    `plain` without the context head; `shuffled` is `distilled` with posteriors of other objects;
    `output_kd`, without the context head, learns the posterior with its own output. Ablations add
    more.
    """
    own = TermSection(name="output_kd", weight=1.0, options={"temperature": 1.0})
    variants = [
        Variant("distilled", recipe.losses),
        Variant("no_context", context_head=False),
        Variant("shuffled", recipe.losses, shuffled=True),
        Variant("output_kd", (own,), context_head=False),
    ]
    for ablation in recipe.ablations.values():
        for name, labels in ablation.items():
            terms = (term for term in recipe.all_losses if term.label in labels)
            variants.append(Variant(name, tuple(terms)))
    wanted = {term.label for one in variants if one.name in recipe.variants for term in one.terms}
    wanted |= {term.label for term in recipe.losses}
    watched = (term for term in recipe.all_losses if term.label in wanted)
    variants.insert(0, Variant("plain", watched=tuple(watched)))
    return {variant.name: variant for variant in variants}
