"""Which runs the study consists of, and what of each is measured."""

from dataclasses import dataclass

GLOBAL_BATCH = 8
BATCHES = (1, 2, 4, 8)  # per process
LOCAL, SYNC = "local", "sync"
# The statistics that a trained model is validated with, on the same weights.
RUNNING, POPULATION = "running", "population"
STATISTICS = (RUNNING, POPULATION)


@dataclass(frozen=True)
class Run:
    """One training job: `GLOBAL_BATCH / batch` processes with `batch` images each."""

    seed: int
    batch: int
    norm: str

    @property
    def processes(self) -> int:
        return GLOBAL_BATCH // self.batch

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"seed{self.seed}-batch{self.batch}-{self.norm}"

    @property
    def images_seen_by_a_layer(self) -> int:
        """How many images' statistics normalize a batch in training."""
        return GLOBAL_BATCH if self.norm == SYNC else self.batch


def plan(seeds: int, batches: tuple[int, ...]) -> list[Run]:
    """All runs, seed by seed, so that a study that is cut short has whole seeds.

    One process with the whole batch is the reference: there is nobody to synchronize with, so it runs once.
    """
    return [
        Run(seed, batch, norm)
        for seed in range(seeds)
        for batch in sorted(batches, reverse=True)
        for norm in ((LOCAL,) if batch == GLOBAL_BATCH else (LOCAL, SYNC))
    ]
