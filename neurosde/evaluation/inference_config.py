"""What `neurosde benchmark inference` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from neurosde.evaluation.inference_methods import DEFAULT, METHODS
from neurosde.evaluation.inference_tasks import Suite, Task, suite_tasks
from neurosde.validation import check_count


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to infer, with what, and how often."""

    suite: Suite = field(default="quick", metadata={"help": "quick takes minutes, paper covers the whole grid"})
    tasks: tuple[str, ...] = field(default=(), metadata={"help": "names of tasks of the suite (default: all)"})
    methods: tuple[str, ...] = field(default=DEFAULT, metadata={"help": "of " + ", ".join(METHODS)})
    networks: int = field(default=8, metadata={"help": "networks per task"})
    draws: int = field(default=32, metadata={"help": "draws of each posterior"})
    simulations: int = field(default=10_000, metadata={"help": "simulations that methods of sbi are trained on"})
    checkpoint: str = field(default="base", metadata={"help": "file, folder or name of the trained posterior"})
    seed: int = field(default=0, metadata={"help": "seed; networks of training have others"})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}.")
        names = [task.name for task in suite_tasks(self.suite)]
        if unknown := [name for name in self.tasks if name not in names]:
            some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(f"tasks must be of the suite {self.suite}, {some}; got {', '.join(unknown)}.")
        for what, given in (("tasks", self.tasks), ("methods", self.methods)):
            if len(set(given)) < len(given):
                raise ValueError(f"{what} must be named once each; got {', '.join(given)}.")
        for name in ("networks", "draws"):
            check_count(getattr(self, name), name, 2)
        check_count(self.simulations, "simulations")
        check_count(self.seed, "seed", 0)

    @property
    def chosen(self) -> tuple[Task, ...]:
        """The tasks."""
        return tuple(task for task in suite_tasks(self.suite) if not self.tasks or task.name in self.tasks)
