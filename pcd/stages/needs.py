"""What recipes need of a cache beside tokens: texts to embed, and ways to bring ground truth to the canvas."""

from __future__ import annotations

from dataclasses import dataclass

from pcd.heads import head_options
from pcd.recipe import Recipe, known_recipes, load_recipe
from pcd.views import DepthResize


@dataclass(frozen=True)
class Needs:
    """Lists of phrases whose embeddings are read, and depth resizes."""

    phrases: tuple[tuple[str, ...], ...] = ()
    resizes: tuple[DepthResize, ...] = ()

    def joined(self, other: Needs) -> Needs:
        """Both, each once, in order."""
        return Needs(
            tuple(dict.fromkeys((*self.phrases, *other.phrases))), tuple(dict.fromkeys((*self.resizes, *other.resizes)))
        )


def needs_of(recipe: Recipe) -> Needs:
    """What one recipe needs. Raises `RecipeError` for a head that cannot be made."""
    cls, options = head_options(recipe.head, f"recipe {recipe.name}: head")
    phrases = cls.phrases(options)
    return Needs((phrases,) if phrases else (), (recipe.views.depth_resize,))


def needs_of_dataset(dataset: str) -> Needs:
    """What all shipped recipes of a dataset need, so that one extraction serves their ablations."""
    needs = Needs()
    for name in known_recipes():
        recipe = load_recipe(name)
        if recipe.dataset["name"] == dataset:
            needs = needs.joined(needs_of(recipe))
    return needs
