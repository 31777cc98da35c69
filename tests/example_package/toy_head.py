"""A head for pcd: one linear map from a column of tokens to depth, trained with L1."""

from collections.abc import Mapping

from torch import Tensor, nn

from pcd.heads.base import Batch, Head, HeadOptions, Phase


class StraightHead(Head):
    class Options(HeadOptions):
        column: str = "colour/patch"
        lr: float = 0.01

    def __init__(self, options: Options, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        super().__init__()
        self.options, self.grid = options, grid
        self.linear = nn.Linear(shapes[options.column][-1], 1)

    @staticmethod
    def reads(options: Options) -> tuple[str, ...]:
        return (options.column,)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("depth", 1, tuple(self.named_parameters()), lr=self.options.lr, weight_decay=0.0),)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        share: Tensor = self.linear(columns[self.options.column].float())[..., 0].sigmoid()
        return self.options.min_depth + (self.options.max_depth - self.options.min_depth) * share

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        target = batch.targets["depth"]
        counted = target.flat  # the patches that have a target, in the flattened (B * P) axis
        error = self.depth(batch.columns).flatten()[counted] - target.mean.flatten()[counted]
        return {"total": error.abs().sum() / max(1, len(counted))}
