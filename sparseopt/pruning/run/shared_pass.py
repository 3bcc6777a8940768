"""What the runs of one pass over a model share, decided before any work."""

from dataclasses import dataclass, field

from jax.sharding import Mesh

from sparseopt.core.base.types import Observer
from sparseopt.models import PrunableModel
from sparseopt.pruning.base.activations import Batches, DiskBatches, SpreadBatches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import Calibration, Event, Footprint, LayerRecord
from sparseopt.pruning.base.torch_grams import runner_of
from sparseopt.pruning.run.branch import Branch
from sparseopt.pruning.run.calibration import CalibrationWindows
from sparseopt.pruning.run.quality import Scoring


@dataclass
class Pass:
    """A pass over the blocks of a model, in their order, for all runs that see the same tokens.

    Attributes:
        model: the dense model.
        branches: the runs, each with its plan, its progress and its writer.
        windows: the tokens that are seen.
        calibration: what reports say of them.
        footprint: the memory that the pass is expected to take.
        scoring: scores the finished models.
        observer: called with an event or a text, how much is done, and how much there is, see `prune_model`.
        mesh: the devices; None for one.
        draw_seconds: that drawing the windows took.
        runner: runs the blocks.
    """

    model: PrunableModel
    branches: list[Branch]
    windows: CalibrationWindows
    calibration: Calibration
    footprint: Footprint
    scoring: Scoring
    observer: Observer
    mesh: Mesh | None
    draw_seconds: float
    runner: BlockRunner = field(init=False)
    done: int = 0  # layers

    def __post_init__(self) -> None:
        self.runner = runner_of(self.model)

    @property
    def batches(self) -> Batches:
        """Empty ones, stored where activations between blocks are to be stored."""
        if self.mesh is not None:
            return SpreadBatches(self.mesh)
        on_disk = self.footprint.activations == "disk"
        return DiskBatches(self.branches[0].plan.folder) if on_disk else Batches()

    def tell(self, event: Event) -> None:
        """Tell the observer, with the layers that are done and those of all runs."""
        self.done += isinstance(event, LayerRecord)
        # What is pruned may be known only after the choice of sizes.
        self.observer(event, self.done, sum(len(branch.plan.patterns) for branch in self.branches))
