"""The schema of `python -m kd.transfer`, on the sections of `kd.config`."""

from __future__ import annotations

from pydantic import Field, model_validator

from kd.config import Model, TaskSection, TeacherReference, Train
from kd.config_data import Count, Data, Positive, Section, Whole


class Probe(Section):
    """A linear probe: the trunk and its batch norms stay as they are, the head alone learns."""

    lr: Positive | None = Field(None, description="rate; null: that of train")
    epochs: Count | None = Field(None, description="null: those of train")
    remember: bool = Field(
        False, description="keep the trunk's maps in memory: for pictures that come unchanged"
    )


class Finetune(Section):
    """Fine-tuning: all of the student learns."""

    lr: Positive | None = Field(None, description="rate; null: that of train")
    epochs: Count | None = Field(None, description="null: those of train")
    trunk: Positive = Field(
        1.0, description="factor on the trunk's rate, where it does not start at random weights"
    )


class TransferRecipe(Section):
    """`python -m kd.transfer`: a student from several starts, as a linear probe and fine-tuned."""

    data: Data
    task: TaskSection
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
