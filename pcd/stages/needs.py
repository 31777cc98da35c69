"""What recipes need of a cache beside tokens: texts to embed, and ways to bring ground truth to the canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pcd.fingerprint import digest
from pcd.heads import head_options
from pcd.recipe import Recipe
from pcd.recipe_files import known_recipes, load_recipe
from pcd.stages.sweep_files import prompts_of_sweeps
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


def columns_of(recipe: Recipe) -> tuple[str, ...]:
    """The columns that the recipe's head learns from. Raises `RecipeError` for a head that cannot be made."""
    cls, options = head_options(recipe.head, f"recipe {recipe.name}: head")
    return cls.learns_from(options)


def columns_of_all(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """The columns that their heads read, each once."""
    return tuple(dict.fromkeys(name for recipe in recipes for name in columns_of(recipe)))


def needs_of_all(recipes: Sequence[Recipe]) -> Needs:
    """What several recipes need together."""
    needs = Needs()
    for recipe in recipes:
        needs = needs.joined(needs_of(recipe))
    return needs


def asked_by(recipes: Sequence[Recipe]) -> str:
    """A digest of everything that needs follow from, without importing a head."""
    return digest([repr((recipe.head, recipe.views.depth_resize)) for recipe in recipes])


def shipped_recipes(dataset: str) -> list[Recipe]:
    """The recipes that come with pcd for a dataset, and with them the prompts of the sweeps: one extraction serves them all."""
    names = [name for name in known_recipes() if load_recipe(name).dataset["name"] == dataset]
    return [load_recipe(name, changes) for changes in [(), *prompts_of_sweeps()] for name in names]
