"""Schema of recipes, with defaults and descriptions; `kd.problems.recipes` reads them."""

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
    """How a teacher's outputs are computed and cached."""

    kind: Literal["stored", "live"] = Field(
        "stored", description="stored: outputs are cached once; live: the teacher runs in each step"
    )
    out_of_fold: bool = Field(
        True, description="posteriors of train images from folds that did not train on them"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of cached outputs")
    int8: bool = Field(False, description="posteriors in 8-bit integers on a CPU: faster")
    top_k: Whole = Field(0, description="number of likeliest classes cached of posteriors; 0 = all")
    cache: str | None = Field(None, description="folder or URL; null: in the teacher's run folder")
    mirrored: bool = Field(False, description="also cache maps of mirrored images, for flips")
    equivariance_error: NotNegative = Field(
        0.1, description="largest relative error of cached maps that are moved with the image"
    )
    stride: Count = Field(8, description="of cached maps, pixels; for crops of label maps")
    score_stride: Count | None = Field(None, description="of score maps; null: stride")
    size: Count | None = Field(
        None,
        description="long side of whole images when caching: larger is finer; null: as trained",
    )
    balance: Probability = Field(
        0.0, description="fraction of the prior removed from posteriors: rare classes count more"
    )

    def stride_of(self, *, layer: bool) -> int:
        """Stride of cached maps, pixels: that of layers if `layer`, else that of score maps."""
        return self.stride if layer or self.score_stride is None else self.score_stride


class TeacherReference(Section):
    """A trained teacher."""

    run: str | None = Field(None, description="run folder, or a file model.safetensors in one")
    name: str = Field("unet", description="if run is null: runs/teacher/NAME/DATA")
    weight: Positive = Field(1.0, description="in mean.posterior of several teachers")
    kind: Literal["stored", "live"] | None = Field(None, description="null: soft_targets.kind")


Unit = Literal["place", "image", "box", "object"]
VARIANTS = ("plain", "distilled", "no_context", "shuffled", "output_kd")


class Model(Section):
    """Name of a model and the keyword-only options of its builder."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Optimizer(Section):
    """An optimiser; biases and norms have no weight decay."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="of sgd; the first beta of adam and adamw"
    )
    lr_scale: dict[str, NotNegative] = Field(
        default_factory=dict, description="rate factor by prefix of parameter names; 0 freezes"
    )
    decay_scale: dict[str, NotNegative] = Field(
        default_factory=dict, description="weight-decay factor by prefix of parameter names"
    )


class Schedule(Section):
    """Learning rate over the steps of training."""

    name: Literal["constant", "cosine", "linear", "poly"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="fraction of the steps")
    final: Probability = Field(0.0, description="last rate, as a fraction of the first")
    power: Positive = Field(0.9, description="of the poly schedule")


class Critic(Section):
    """Training of the critic of a holistic term."""

    optimizer: Optimizer = Optimizer(name="adam", lr=4e-4, momentum=0.0, weight_decay=0.0)
    schedule: Schedule = Schedule(name="poly", warmup=0.0)
    clip_norm: NotNegative = Field(100.0, description="largest gradient norm; 0 = no clipping")


class Train(Section):
    """The training loop."""

    epochs: Whole = Field(20, description="0 = evaluate only")
    batch_size: Count = Field(32, description="images per step, over all processes")
    accumulate: Count = Field(1, description="micro-batches per step of batch_size images")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: NotNegative = Field(5.0, description="largest gradient norm; 0 = no clipping")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay; 0 = none")
    critic: Critic = Critic()
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 autocast where the hardware supports it"
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
    """Schedule of the factor that multiplies the `weight` of a term."""

    name: Literal["constant", "linear", "cosine", "off_after"] = "constant"
    until: Fraction = Field(1.0, description="fraction of training at which it ends")
    until_step: Count | None = Field(None, description="the same as a number of steps")
    start: NotNegative = Field(0.0, description="factor at the first step of a ramp")

    def factor(self, progress: float, step: int = 0) -> float:
        """Factor at a fraction 0..1 of training, after `step` steps."""
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
            raise ValueError("off_after: give until (a fraction) or until_step")
        return self


class TermSection(Section):
    """A distillation term: a loss, what it compares and its weight."""

    name: str = Field(
        description="of kd.distill --list, torchdistill.NAME or package.module:attribute"
    )
    label: str = Field(
        default_factory=lambda given: given.get("name", ""),
        description="tag of its curve, loss/LABEL, and its name in ablations; default: name",
    )
    weight: Positive
    student: str | None = Field(None, description="output or layer of the student")
    teacher: str | None = Field(None, description="output or layer of the teacher")
    unit: Unit | None = Field(
        None, description="unit that the mean of a loss of your own is over, unless it declares it"
    )
    options: dict[str, Any] = Field(default_factory=dict)
    schedule: Weighted = Weighted()


class Adapter(Section):
    """Maps a student's layer to the shape of a teacher's."""

    kind: str = "conv1x1"
    to: str = Field(description="layer of the teacher")
    options: dict[str, Any] = Field(default_factory=dict)


class TaskSection(Section):
    """A task, and the weights of its supervised losses."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    weights: dict[str, Positive]


class Recipe(Section):
    """Keys of all recipes; `kd.problems.recipes` binds `data` to the section of their problem.

    Attributes:
        needs: Ability that the problem must have, see `kd.problems.spec.ProblemSpec.abilities`.
    """

    needs: ClassVar[str] = ""

    data: SerializeAsAny[DatasetSection]
    task: TaskSection
    metrics: tuple[str, ...] = Field((), description="of your own, package.module:ATTRIBUTE each")

    def needed(self) -> dict[str, str]:
        """Abilities that the problem must have, by the key that needs them."""
        return {"data.name": self.needs} if self.needs else {}


class TeacherRecipe(Recipe):
    """`python -m kd.train_teacher`: train a teacher."""

    teacher: Model
    train: Train = Train()
    hide: Literal["one", "all"] = Field(
        "one", description="objects of an image hidden in an epoch: one at random, or each in turn"
    )
    folds: Annotated[int, Field(ge=0, le=20)] = Field(
        0,
        description="number of further models, trained on folds, for out-of-fold posteriors",
    )
    seed: Whole = 0

    @field_validator("folds")
    @classmethod
    def _one_fold_leaves_nothing(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves no image to train on; 0 (none) or 2 and more")
        return folds

    def needed(self) -> dict[str, str]:
        """Training folds needs the ability `folds`."""
        return {"folds": "folds"} if self.folds else {}


class DistillRecipe(Recipe):
    """`python -m kd.distill`: train a student without and with a teacher, and compare them."""

    teacher: TeacherReference = TeacherReference()
    more_teachers: dict[str, TeacherReference] = Field(
        default_factory=dict, description="terms read NAME.posterior, NAME.layer or mean.posterior"
    )
    soft_targets: SoftTargets = SoftTargets()
    student: Model
    levels: tuple[str, ...] = Field((), description="values of {level} in terms and adapters")
    adapters: dict[str, Adapter] = Field(default_factory=dict)
    losses: tuple[TermSection, ...] = Field((), description="terms of the distilled variant")
    more_losses: tuple[TermSection, ...] = Field((), description="terms of ablations only")
    ablations: dict[str, dict[str, tuple[str, ...]]] = Field(
        default_factory=dict,
        description="for --ablation NAME: variants, with labels of their terms",
    )
    variants: tuple[str, ...] = Field(
        VARIANTS[:3], description=f"of {', '.join(VARIANTS)}, or an ablation's"
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
        names = [term.label for term in self.all_losses]
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
            raise ValueError(f"ablations: {', '.join(wrong)}: names of built-in variants")
        if twice := sorted({variant for variant in own if own.count(variant) > 1}):
            raise ValueError(f"ablations: {', '.join(twice)}: defined in two ablations")
        if wrong := sorted(set(self.variants) - {*VARIANTS, *own}):
            raise ValueError(
                f"variants: unknown {', '.join(wrong)}; known: {', '.join([*VARIANTS, *own])}"
            )
        if {"distilled", "shuffled"} & set(self.variants) and not self.losses:
            raise ValueError("losses: a distilled student needs at least one term")

    @property
    def teachers(self) -> dict[str, TeacherReference]:
        """All teachers by name; the key of the recipe's own `teacher` is ""."""
        return {"": self.teacher, **self.more_teachers}

    def caches(self, teacher: str) -> bool:
        """Whether a teacher's outputs are cached rather than computed in each step."""
        return (self.teachers[teacher].kind or self.soft_targets.kind) == "stored"

    @property
    def all_losses(self) -> tuple[TermSection, ...]:
        """Terms of all variants."""
        return (*self.losses, *self.more_losses)

    def terms_of(self, variant: str) -> tuple[str, ...] | None:
        """Labels of the terms of an ablation's variant; None for the other variants."""
        return next(
            (variants[variant] for variants in self.ablations.values() if variant in variants), None
        )


class Probe(Section):
    """Linear probe: only the head is trained; the trunk and its batch norms are frozen."""

    lr: Positive | None = Field(None, description="null: that of train")
    epochs: Count | None = Field(None, description="null: that of train")
    remember: bool = Field(False, description="cache the trunk's maps; for unaugmented images")


class Finetune(Section):
    """Fine-tuning of the whole student."""

    lr: Positive | None = Field(None, description="null: that of train")
    epochs: Count | None = Field(None, description="null: that of train")
    trunk: Positive = Field(1.0, description="rate factor of the trunk, unless it is random")


class TransferRecipe(Recipe):
    """`python -m kd.transfer`: probe and fine-tune a student from several trunk weights."""

    needs: ClassVar[str] = "transfer"

    teacher: TeacherReference = TeacherReference()
    student: Model = Field(description="transferred: has the teacher's trunk")
    starts: dict[str, str | None] = Field(
        default={"random": None, "context": "teacher"},
        description="trunk weights by name, the first is the baseline: null = random; teacher; "
        "imagenet; a run; or a file of torchvision weights",
    )
    probe: Probe | None = Field(Probe(), description="null: skip")
    finetune: Finetune | None = Field(Finetune(), description="null: skip")
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
            raise ValueError(f"student: options {named}: set by `starts`, `probe` and `finetune`")
        return self
