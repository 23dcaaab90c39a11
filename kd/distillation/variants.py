"""The variants of an experiment: one student, trained with and without each part of the method."""

from __future__ import annotations

from dataclasses import dataclass

from kd.config.recipes import DistillRecipe, TermSection
from kd.distillation.registry import term_kind


@dataclass(frozen=True)
class Variant:
    """One way to train the student; a recipe compares several.

    Args:
        name: Name of the run folder, of the curves and of the column in tables.
        terms: Distillation terms that the student learns from, in addition to the labels.
        watched: Terms that are logged but not trained on, if the targets are cached anyway.
        context_head: False removes the context head from students that can have one.
        shuffled: Whether each cached posterior is assigned to another object, as a control.
    """

    name: str
    terms: tuple[TermSection, ...] = ()
    watched: tuple[TermSection, ...] = ()
    context_head: bool = True
    shuffled: bool = False

    @property
    def outputs(self) -> set[str]:
        """Outputs and layers of the student that the variant's terms read."""
        read = (section.student or term_kind(section).student for section in self.terms)
        return {name for name in read if name is not None}


def variants_of(recipe: DistillRecipe) -> dict[str, Variant]:
    """Return all variants that a recipe may name, by name; its ablations add more to these.

    - `plain` learns from labels only.
    - `distilled` learns from labels and from the recipe's terms.
    - `no_context` is `plain` without the context head.
    - `shuffled` is `distilled` with each posterior assigned to another object.
    - `output_kd` has no context head; its class scores are trained towards the teacher's posterior.
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
