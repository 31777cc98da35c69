"""Few-shot depth codebooks and learnable prompts (Hu et al., WACV 2024), as far as the literature tells.

No code is public, and what is implemented here follows from the abstract alone: DepthCLIP's weighted sum, but with other depth
bins for each kind of scene, between which the model itself chooses, and with learned prompts in the sentences; trained on one
image per scene.

Not knowable from there, and therefore options here, without a claim that any of them is the published one: how many kinds of
scene there are and how a view is told to be of one (`scenes`, `scene_names`, `choice`), what the learned prompts are and where
they go (`prompts`), the loss and the optimiser, and which tokens of the image are compared (`space`; DepthCLIP's by default).

That there is one image per scene is a matter of the rows that are trained on, not of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pcd.device import without_autocast
from pcd.errors import RecipeError, TrainingError
from pcd.heads.base import Batch, Context, Phase
from pcd.heads.bins import Distribution
from pcd.heads.learned_words import SHARED, LearnedWords
from pcd.heads.tokens import Grid, Shape, require_vector
from pcd.heads.words import FineOptions, WordHead, WordOptions, counted, fitting_text, require_places
from pcd.losses import masked_l1, silog
from pcd.recipe import Names, Positive


class HuOptions(WordOptions, FineOptions):
    """`[head]` of `name = "hu"`. `depths` are those that all scenes start with, ascending."""

    scenes: Annotated[int, Field(gt=0)] = 8
    """Kinds of scene, S, each with depths of its own for the words; with `scene_names` as many as there are names."""
    scene_names: Names = ()
    """What the kinds are called. Views are then told apart by texts; without names by vectors, which start as the CLS tokens
    of S training views that are as different as possible."""
    scene_template: str = "a photo of a {scene}"
    choice: Literal["soft", "hard"] = "soft"
    """A view has the mean depths of all scenes, weighted by a softmax, and their vectors are learned; or the depths of the one
    that its CLS token agrees with most, and the vectors stay."""
    scene_temperature: Positive = 0.01
    """Of that softmax over cosines."""
    cls_column: str = "clip/cls"
    prompts: Literal["tower", "joint", "none"] = "tower"
    """`tower`: learned vectors in front of each sentence, through the text tower; `joint`: a learned vector for each text,
    added to its unit embedding; `none`: the texts as they are."""
    prompt_vectors: Annotated[int, Field(gt=0)] = 16
    """With `prompts = "tower"`, shared by all sentences."""
    token_width: Annotated[int, Field(gt=0)] = 512
    """Channels of the text tower's tokens: 512 for RN50 and ViT-B, 768 for ViT-L/14."""
    loss: Literal["silog", "l1"] = "silog"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("depths")
    @classmethod
    def _ascending(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if sorted(set(value)) != list(value):
            raise PydanticCustomError("depths", "the depths of a codebook ascend; order the words from near to far")
        return value

    @property
    def count(self) -> int:
        """Kinds of scene."""
        return len(self.scene_names) or self.scenes

    @property
    def scene_sentences(self) -> tuple[str, ...]:
        """A text for each named scene. Raises `RecipeError` for a template without `{scene}`."""
        if self.scene_names:
            require_places("head.scene_template", self.scene_template, ("{scene}",))
        return tuple(self.scene_template.replace("{scene}", name) for name in self.scene_names)


class HuHead(WordHead):
    """DepthCLIP with depths by scene `(S, K)` and learned prompts."""

    Options = HuOptions
    options: HuOptions
    text: Tensor
    scenes: Tensor

    def __init__(self, options: HuOptions, shapes: Mapping[str, Shape], grid: Grid) -> None:
        """`shapes` as for `DepthClipHead`, and `(D,)` for the CLS column. Raises `RecipeError`."""
        super().__init__(options, shapes, grid)
        words, vector = len(options.words), require_vector(options.cls_column, shapes[options.cls_column])
        steps = [math.log(math.expm1(high - low)) for low, high in zip((0.0, *options.depths), options.depths, strict=False)]
        self.steps = nn.Parameter(torch.tensor(steps).repeat(options.count, 1))
        scenes = F.normalize(torch.randn(options.count, vector), dim=-1)
        if options.choice == "soft" and not options.scene_names:
            self.scenes = nn.Parameter(scenes)
        else:
            self.register_buffer("scenes", scenes)
        self.learned: LearnedWords | None = None
        self.offsets: nn.Parameter | None = None
        if options.prompts == "tower":
            sentences = [f"{SHARED} {sentence}" for sentence in options.sentences]
            self.learned = LearnedWords(sentences, options.prompt_vectors, 0, options.token_width, self.width)
        else:
            self.register_buffer("text", torch.zeros(words, self.width))
            self.offsets = nn.Parameter(torch.zeros(words, self.width)) if options.prompts == "joint" else None
        self.register_buffer("_up_to", torch.ones(words, words).triu(), persistent=False)
        self._up_to: Tensor

    @staticmethod
    def reads(options: HuOptions) -> tuple[str, ...]:
        """The tokens, and the CLS token that tells the scene."""
        return options.token_column, options.cls_column

    @staticmethod
    def phrases(options: HuOptions) -> tuple[str, ...]:
        """A sentence for each word, unless prompts are learned in front of the tower, and one for each named scene."""
        return (*(() if options.prompts == "tower" else options.sentences), *options.scene_sentences)

    def attach(self, context: Context) -> None:
        """Learn prompts through the text tower. Raises `TextTowerError` if there is none, `RecipeError` if it does not fit."""
        if self.learned is not None:
            self.learned.attach(context.text_tower())

    @torch.no_grad()
    def initialise(self, context: Context) -> None:
        """Keep the texts; the vectors of scenes are texts or CLS tokens. Raises as `attach`, or `TrainingError`."""
        phrases = self.phrases(self.options)
        found = context.text(phrases) if phrases else torch.empty(0, 0)
        named = len(self.options.scene_names)
        words, scenes = found[: len(found) - named], found[len(found) - named :]
        if self.learned is None:
            self.text.copy_(fitting_text(words, *self.text.shape))
        if not named:
            scenes = self._far_apart(context)
        if scenes.shape != self.scenes.shape:
            raise RecipeError(
                f"head: {self.options.cls_column} is {self.scenes.shape[1]} wide and the texts of scene_names are "
                f"{scenes.shape[1]}; name the CLS column of an encoder with such texts, or leave scene_names out."
            )
        self.scenes.copy_(F.normalize(scenes, dim=-1))

    def _far_apart(self, context: Context) -> Tensor:
        """CLS tokens `(S, D)`: that of the first training row, and always the one least like those that are taken already."""
        found = [F.normalize(batch.columns[self.options.cls_column].double(), dim=-1).cpu() for batch in context.batches()]
        vectors = torch.cat(found)
        if len(vectors) < len(self.scenes):
            raise TrainingError(f"head.scenes = {len(self.scenes)}, and there are {len(vectors)} training rows; take fewer.")
        taken, likeness = [0], vectors @ vectors[0]
        while len(taken) < len(self.scenes):
            taken.append(int(likeness.argmin()))
            likeness = torch.maximum(likeness, vectors @ vectors[taken[-1]])
        return vectors[taken].float()

    def texts(self) -> Tensor:
        """Unit vectors."""
        unit = F.normalize(self.text if self.learned is None else self.learned(), dim=-1)
        return unit if self.offsets is None else F.normalize(unit + self.offsets, dim=-1)

    def codebook(self) -> Tensor:
        """Depths of the words in each scene `(S, K)`, in metres: positive and ascending, whatever is learned."""
        with without_autocast(self.steps):
            return F.softplus(self.steps) @ self._up_to

    def shares(self, columns: Mapping[str, Tensor]) -> Tensor:
        """How much of each scene a view is `(B, S)`; each row sums to 1."""
        cls = F.normalize(columns[self.options.cls_column].float(), dim=-1)
        with without_autocast(cls):
            cosines = cls @ F.normalize(self.scenes, dim=-1).T
            if self.options.choice == "hard":
                chosen = cosines.argmax(dim=-1, keepdim=True)
                return (chosen == torch.arange(self.options.count, device=cls.device)).to(cosines)
            return (cosines / self.options.scene_temperature).softmax(dim=-1)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` on the output grid."""
        probabilities, shares = self.probabilities(columns), self.shares(columns)
        with without_autocast(probabilities):
            centres = shares @ self.codebook()
            return self.upsampled(probabilities @ centres[:, :, None]).squeeze(-1)

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution:
        """Over the depths of all words in all scenes `(B, P, S * K)`."""
        probabilities = self.upsampled(self.probabilities(columns))
        joint = self.shares(columns)[:, None, :, None] * probabilities[:, :, None, :]
        return Distribution(joint.flatten(2), self.codebook().flatten())

    def phases(self) -> tuple[Phase, ...]:
        """One: codebook, prompts and vectors of scenes on the loss of depths."""
        return (Phase("depth", 1, tuple(self.named_parameters()), self.options.lr, self.options.weight_decay),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """SILog or mean absolute error over the cells that count. Raises `TextTowerError` for a tower that is not attached."""
        target = batch.targets["depth"]
        if not len(target.flat):
            return {"total": self.steps.detach().new_zeros(())}
        found, truth, pixels = counted(self.depth(batch.columns), target)
        return {"total": silog(found, truth, pixels) if self.options.loss == "silog" else masked_l1(found, truth, pixels)}
