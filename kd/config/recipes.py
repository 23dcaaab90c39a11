"""The schema of recipes with its defaults and descriptions.

A recipe is YAML, read by `kd.problems.recipes`. Every section is frozen and refuses unknown keys
and values of another type.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from kd.config.datasets import (
    Count,
    DatasetSection,
    Fraction,
    NotNegative,
    Positive,
    Probability,
    Section,
    Whole,
)
from kd.config.pyramid_levels import on_levels


class SoftTargets(Section):
    """Where a term's targets come from."""

    kind: Literal["stored", "live"] = Field(
        "stored", description="stored: posteriors computed once; live: the teacher in each step"
    )
    out_of_fold: bool = Field(
        True, description="posteriors of train images from folds that did not train on them"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored numbers")
    int8: bool = Field(
        False, description="compute posteriors in 8-bit integers, on a CPU: several times as fast"
    )
    top_k: Whole = Field(0, description="likeliest classes stored of posteriors; 0 = all")
    cache: str | None = Field(
        None, description="folder or URL of stored outputs; null: in the teacher's run folder"
    )
    mirrored: bool = Field(
        False, description="also store layers and logits of mirrored images, for flips"
    )
    equivariance_error: NotNegative = Field(
        0.1, description="largest relative error of stored maps that are moved with the image"
    )
    stride: Count = Field(
        8, description="stride in pixels of stored maps, for crops of data with label maps"
    )
    score_stride: Count | None = Field(
        None, description="the same for score maps, which may be finer than layers; null: stride"
    )
    size: Count | None = Field(
        None,
        description="long side at which a teacher sees whole images when its outputs are stored: "
        "larger gives more detail; null: as in its training",
    )
    balance: Probability = Field(
        0.0,
        description="how much of the posteriors' mean is removed, so that rare classes count more",
    )

    def stride_of(self, *, layer: bool) -> int:
        """Stride in pixels of the stored maps that crops get: of layers, or of score maps."""
        return self.stride if layer or self.score_stride is None else self.score_stride


class TeacherReference(Section):
    """A trained teacher: a run folder, or a file model.safetensors in one."""

    run: str | None = None
    name: str = Field("unet", description="looked for in runs/teacher/NAME/DATA when run is null")
    weight: Positive = Field(1.0, description="in mean.posterior, where there are several")
    kind: Literal["stored", "live"] | None = Field(
        None, description="of this teacher alone; null: soft_targets.kind"
    )


Unit = Literal["place", "image", "box", "object"]
VARIANTS = ("plain", "distilled", "no_context", "shuffled", "output_kd")


class Model(Section):
    """A name of a catalogue and the keyword-only options of its builder."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Optimizer(Section):
    """An optimiser; weight decay spares biases and norms."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="of sgd; the first beta of adam and adamw"
    )
    lr_scale: dict[str, NotNegative] = Field(
        default_factory=dict,
        description="factor on the rate of parameters whose name starts with the key; 0 freezes",
    )
    decay_scale: dict[str, NotNegative] = Field(
        default_factory=dict, description="factor on their weight decay likewise"
    )


class Schedule(Section):
    """The learning rate over the steps of training."""

    name: Literal["constant", "cosine", "linear", "poly"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="fraction of the steps")
    final: Probability = Field(0.0, description="last rate, as a fraction of the first")
    power: Positive = Field(0.9, description="of the poly schedule")


class Critic(Section):
    """How the critic of a holistic term learns."""

    optimizer: Optimizer = Optimizer(name="adam", lr=4e-4, momentum=0.0, weight_decay=0.0)
    schedule: Schedule = Schedule(name="poly", warmup=0.0)
    clip_norm: NotNegative = Field(100.0, description="largest gradient norm; 0 = no clipping")


class Train(Section):
    """The training loop."""

    epochs: Whole = Field(20, description="0 = the model is evaluated as it is")
    batch_size: Count = Field(32, description="images a step, over all processes")
    accumulate: Count = Field(1, description="micro-batches a step; batch_size is the whole step")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: NotNegative = Field(5.0, description="largest gradient norm; 0 = no clipping")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay; 0 = none")
    critic: Critic = Critic()
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 autocast where the hardware multiplies bf16 natively"
    )
    channels_last: bool = True
    compile: bool = False
    sync_batch_norm: bool = Field(False, description="statistics over all processes (GPU only)")
    evaluate_every: Whole = Field(5, description="epochs; 0 = only at the end")
    checkpoint_every: Whole = Field(200, description="steps between checkpoints inside an epoch")
    log_every: Count = Field(20, description="steps")
    images: Whole = Field(4, description="val images written to TensorBoard")

    @model_validator(mode="after")
    def _micro_batches_are_equal(self) -> Train:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self


class Weighted(Section):
    """How a term's weight runs over training (a factor on `weight`)."""

    name: Literal["constant", "linear", "cosine", "off_after"] = "constant"
    until: Fraction = Field(
        1.0, description="fraction of training at which the ramp or the term ends"
    )
    until_step: Count | None = Field(None, description="the same as a number of steps")
    start: NotNegative = Field(0.0, description="factor at the first step of a ramp")

    def factor(self, progress: float, step: int = 0) -> float:
        """The factor at a fraction 0..1 of training, after so many steps."""
        way = progress / self.until if self.until_step is None else step / self.until_step
        if self.name == "off_after":
            return 1.0 if way < 1.0 else 0.0
        if self.name == "constant" or way >= 1.0:
            return 1.0
        if self.name == "cosine":
            way = 0.5 - 0.5 * math.cos(math.pi * way)
        return self.start + (1.0 - self.start) * way

    @model_validator(mode="after")
    def _one_end(self) -> Weighted:
        if self.until_step is not None and self.until != 1.0:
            raise ValueError("until and until_step: give one of them")
        if self.name == "off_after" and self.until_step is None and self.until == 1.0:
            raise ValueError("off_after: say when, by until (a fraction) or until_step")
        return self


class TermSection(Section):
    """A distillation term: a loss, what it compares and its weight."""

    name: str = Field(
        description="of kd.distill --list, torchdistill.NAME or package.module:attribute"
    )
    label: str | None = Field(
        None, description="what its curve is called; needed where a loss is there twice"
    )
    weight: Positive
    student: str | None = Field(None, description="output or layer of the student")
    teacher: str | None = Field(None, description="output or layer of the teacher")
    unit: Unit | None = Field(
        None, description="what the mean of a loss of your own is over, if it does not declare it"
    )
    options: dict[str, Any] = Field(default_factory=dict)
    schedule: Weighted = Weighted()

    @property
    def curve(self) -> str:
        """What tells it from the recipe's other terms."""
        return self.label or self.name


class Adapter(Section):
    """Brings a student's layer to the shape of a teacher's."""

    kind: str = "conv1x1"
    to: str = Field(description="layer of the teacher")
    options: dict[str, Any] = Field(default_factory=dict)


class TaskSection(Section):
    """What is learned; `weights` are those of its supervised losses."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    weights: dict[str, Positive]


class Recipe(Section):
    """What all recipes have; `kd.problems.recipes` binds `data` to the section of their problem.

    Attributes:
        needs: What the problem must be able to do, see `kd.problems.spec.ProblemSpec.abilities`.
    """

    needs: ClassVar[str] = ""

    data: SerializeAsAny[DatasetSection]
    task: TaskSection
    metrics: tuple[str, ...] = Field(
        (), description="metrics of your own, package.module:ATTRIBUTE each"
    )

    def needed(self) -> dict[str, str]:
        """Abilities that the problem must have, by the place that asks for them."""
        return {"data.name": self.needs} if self.needs else {}


class TeacherRecipe(Recipe):
    """`python -m kd.train_teacher`: a teacher of objects' context, label maps or gaze."""

    teacher: Model
    train: Train = Train()
    hide: Literal["one", "all"] = Field(
        "one", description="objects of an image hidden in an epoch: one drawn anew, or each in turn"
    )
    folds: Annotated[int, Field(ge=0, le=20)] = Field(
        0, description="also train this many models by folds of images, for out-of-fold posteriors"
    )
    seed: Whole = 0

    @field_validator("folds")
    @classmethod
    def _one_fold_leaves_nothing(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves no image to train on; 0 (none) or 2 and more")
        return folds

    def needed(self) -> dict[str, str]:
        """Folds are not for every problem."""
        return {"folds": "folds"} if self.folds else {}


class DistillRecipe(Recipe):
    """`python -m kd.distill`: a student, its plain twin, and the comparison."""

    teacher: TeacherReference = TeacherReference()
    more_teachers: dict[str, TeacherReference] = Field(
        default_factory=dict,
        description="further teachers; a term reads NAME.posterior, NAME.layer or mean.posterior",
    )
    soft_targets: SoftTargets = SoftTargets()
    student: Model
    levels: tuple[str, ...] = Field(
        (),
        description="of pyramids: a term or adapter with {level} in its layers is there for each",
    )
    adapters: dict[str, Adapter] = Field(default_factory=dict)
    losses: tuple[TermSection, ...] = Field((), description="terms of the distilled variant")
    more_losses: tuple[TermSection, ...] = Field((), description="terms that only ablations have")
    ablations: dict[str, dict[str, tuple[str, ...]]] = Field(
        default_factory=dict,
        description="for --ablation NAME: variants beside plain, each with its terms' labels",
    )
    variants: tuple[str, ...] = Field(
        ("plain", "distilled", "no_context"),
        description=f"of {', '.join(VARIANTS)}, or an ablation's",
    )
    seeds: tuple[Whole, ...] = (0,)
    train: Train = Train()

    @model_validator(mode="before")
    @classmethod
    def _levels_are_spelled_out(cls, values: Any) -> Any:
        return on_levels(values)

    @model_validator(mode="after")
    def _sections_agree(self) -> DistillRecipe:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be one or more different numbers")
        self._check_variants()
        names = [term.curve for term in self.all_losses]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"losses: {', '.join(twice)}: given twice; tell them apart by `label`")
        for ablation, variants in self.ablations.items():
            for variant, terms in variants.items():
                if wrong := sorted(set(terms) - set(names)):
                    raise ValueError(
                        f"ablations.{ablation}.{variant}: no term {', '.join(wrong)} in losses or "
                        f"more_losses; there are: {', '.join(names) or 'none'}"
                    )
        for name in self.more_teachers:
            if name == "mean" or not name.isidentifier():
                raise ValueError(f"more_teachers.{name}: a name is letters, digits and _, not mean")
        tapped = {term.student for term in self.all_losses}
        for layer in self.adapters:
            if layer not in tapped:
                raise ValueError(f"adapters.{layer}: no term of losses reads student layer {layer}")
        return self

    def _check_variants(self) -> None:
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants {list(self.variants)} must be one or more different names")
        own = [variant for variants in self.ablations.values() for variant in variants]
        if wrong := sorted(set(own) & set(VARIANTS)):
            raise ValueError(f"ablations: {', '.join(wrong)}: these variants are there already")
        if twice := sorted({variant for variant in own if own.count(variant) > 1}):
            raise ValueError(f"ablations: {', '.join(twice)}: a variant of two ablations")
        if wrong := sorted(set(self.variants) - {*VARIANTS, *own}):
            raise ValueError(
                f"variants: unknown {', '.join(wrong)}; known: {', '.join([*VARIANTS, *own])}"
            )
        if {"distilled", "shuffled"} & set(self.variants) and not self.losses:
            raise ValueError("losses: a distilled student needs at least one term")

    @property
    def teachers(self) -> dict[str, TeacherReference]:
        """All teachers by name; that of the recipe's `teacher` is empty."""
        return {"": self.teacher, **self.more_teachers}

    def caches(self, teacher: str) -> bool:
        """Whether what a teacher says is computed once rather than in each step."""
        return (self.teachers[teacher].kind or self.soft_targets.kind) == "stored"

    @property
    def all_losses(self) -> tuple[TermSection, ...]:
        """Every term of any variant."""
        return (*self.losses, *self.more_losses)

    def terms_of(self, variant: str) -> tuple[str, ...] | None:
        """Labels of the terms of an ablation's variant, None for the other variants."""
        return next(
            (variants[variant] for variants in self.ablations.values() if variant in variants), None
        )


class Probe(Section):
    """A linear probe: the trunk and its batch norms stay as they are, the head alone learns."""

    lr: Positive | None = Field(None, description="rate; null: that of train")
    epochs: Count | None = Field(None, description="null: those of train")
    remember: bool = Field(
        False, description="keep the trunk's maps in memory: for images that are not augmented"
    )


class Finetune(Section):
    """Fine-tuning: all of the student learns."""

    lr: Positive | None = Field(None, description="rate; null: that of train")
    epochs: Count | None = Field(None, description="null: those of train")
    trunk: Positive = Field(
        1.0, description="factor on the trunk's rate, where it does not start at random weights"
    )


class TransferRecipe(Recipe):
    """`python -m kd.transfer`: a student from several starts, as a linear probe and fine-tuned."""

    needs: ClassVar[str] = "transfer"

    teacher: TeacherReference = TeacherReference()
    student: Model = Field(description="transferred: with the teacher's trunk, whatever it is")
    starts: dict[str, str | None] = Field(
        default={"random": None, "context": "teacher"},
        description="weights of the trunk by name, the first is compared with: null = random; "
        "teacher; imagenet; a run; or a file of torchvision weights",
    )
    probe: Probe | None = Field(Probe(), description="null leaves it out")
    finetune: Finetune | None = Field(Finetune(), description="null leaves it out")
    seeds: tuple[Whole, ...] = (0,)
    train: Train = Train()

    @model_validator(mode="after")
    def _sections_agree(self) -> TransferRecipe:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be one or more different numbers")
        if not self.starts or (self.probe is None and self.finetune is None):
            raise ValueError("starts: at least one is needed, and one of probe and finetune")
        for name in self.starts:
            if not name.isidentifier():
                raise ValueError(f"starts.{name}: a name is letters, digits and _")
        if set_by_start := {"weights", "frozen", "remember"} & self.student.options.keys():
            named = ", ".join(sorted(set_by_start))
            raise ValueError(f"student: options {named}: `starts`, `probe` and `finetune` say that")
        return self
