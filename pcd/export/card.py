"""The model card of a bundle: what a stranger must know before using it, in words and as the front matter a hub reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pcd.evaluation.metrics import METRICS
from pcd.recipe import Recipe

SHOWN = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")
LIBRARY = "pcd"
TAGS = ("depth-estimation", "monocular-depth-estimation", "metric-depth", LIBRARY)
NO_LICENCE = "# license: say here under which licence you publish these weights, for example  license: mit"

_Evaluations = Mapping[str, Mapping[str, Any]]


def model_card(info: Mapping[str, Any], recipe: Recipe, evaluations: _Evaluations, licence: str | None = None) -> str:
    """The whole `README.md`. `info` is the bundle's `run.json`; `evaluations` are its documents by name.

    Without a `licence` (the hub's identifier, such as `mit`) the front matter has a commented line in its place.
    """
    sections = [
        _front_matter(info, evaluations, licence),
        _summary(info, recipe),
        _use(info),
        _training(info, recipe),
        "\n".join(_scores(info, evaluations)),
        _limits(info, recipe),
        _files(info),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _front_matter(info: Mapping[str, Any], evaluations: _Evaluations, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    results = {} if info["labels"] else _hub_results(info, evaluations)
    tags = [*TAGS, *(_slug(label) for label in info["labels"])]
    data = ModelCardData(library_name=LIBRARY, pipeline_tag="depth-estimation", tags=tags, license=licence, **results)
    text = data.to_yaml(line_break="\n")
    return "\n".join(["---", *([] if licence else [NO_LICENCE]), text, "---"])


def _slug(label: str) -> str:
    return label.replace(" ", "-")


def _hub_results(info: Mapping[str, Any], evaluations: _Evaluations) -> dict[str, Any]:
    """Scores as the hub lists them; none for a run with labels, which such a list would drop."""
    from huggingface_hub import EvalResult

    results = [
        EvalResult(
            task_type="depth-estimation",
            dataset_type=document["cache"],
            dataset_name=document["cache"],
            dataset_config=protocol,
            dataset_split=document["split"],
            metric_type=name,
            metric_name=f"{METRICS[name].title}, protocol {protocol}",
            metric_value=scores["metrics"][name],
        )
        for document in evaluations.values()
        for protocol, scores in document["protocols"].items()
        for name in SHOWN
        if scores["metrics"].get(name) is not None
    ]
    return {"model_name": info["bundle"]["run"], "eval_results": results} if results else {}


def _summary(info: Mapping[str, Any], recipe: Recipe) -> str:
    bundle = info["bundle"]
    head, encoder = recipe.head, _encoder_name(info)
    lines = [
        f"# {bundle['run']}: metric depth from one image",
        f"A depth head (`{head['name']}`, {bundle['parameters']:,} parameters) on the frozen encoder `{encoder}`. It takes one "
        f"RGB image and gives the distance of every pixel along the optical axis in metres, {_range(recipe)}. Made with "
        f"pcd {info['pcd']} (package `pcd-depth`); checkpoint `{bundle['checkpoint']}`, epoch {bundle['epoch']}.",
    ]
    return "\n\n".join([*lines, *(f"> **{label}**: {_WARNINGS.get(label, 'see below')}" for label in info["labels"])])


_WARNINGS = {
    "random encoder weights": "the encoder was never trained. This shows that the machinery works; the depth means little.",
    "synthetic scenes": "trained and scored on rendered scenes alone. Scores on them say nothing about photographs.",
}


def _encoder_name(info: Mapping[str, Any]) -> str:
    return ", ".join(str(entry["table"]["name"]) for entry in info["encoders"].values())


def _range(recipe: Recipe) -> str:
    return f"between {recipe.head['min_depth']:g} and {recipe.head['max_depth']:g} m"


def _use(info: Mapping[str, Any]) -> str:
    bundle = info["bundle"]
    usual = "abs_rel" in (bundle["checkpoint"], *bundle["best"])
    option, argument = (
        ("", "") if usual else (f" --checkpoint {bundle['checkpoint']}", f', checkpoint="{bundle["checkpoint"]}"')
    )
    return f"""## Use

In a folder that holds this repository as `{bundle["run"]}`:

```sh
pcd predict photo.jpg --run {bundle["run"]}{option} --out depth
pcd evaluate --run {bundle["run"]}{option} --cache CACHE
```

```python
import pcd

predictor = pcd.Predictor(pcd.open_run("{bundle["run"]}"){argument})
depth = predictor.predict(rgb).depth  # RGB uint8 (H, W, 3) of any size -> float32 (H, W), metres
```

{_where_weights_are(info)}"""


def _where_weights_are(info: Mapping[str, Any]) -> str:
    weights = [str(entry["table"].get("weights", "auto")) for entry in info["encoders"].values()]
    if "encoder.safetensors" in info["bundle"]["files"]:
        return "The encoder's image weights are in `encoder.safetensors`, under their owner's licence, and found there."
    if weights == ["random"]:
        return "The encoder's random weights are drawn anew from their seed."
    if weights == ["auto"]:
        return (
            "The encoder's published weights are fetched at first use, or given with `--weights FILE`; they must be the same."
        )
    return (
        f"The encoder's weights are not in here: give the file `{weights[0]}` with `--weights FILE`. Another than the one the "
        "head was trained on is refused."
    )


def _training(info: Mapping[str, Any], recipe: Recipe) -> str:
    data, views = info["dataset"], info["views"]
    low, high = data["depth_range"]
    crop = "whole frames" if views["crop"] is None else "rows {}:{}, columns {}:{} of frames".format(*views["crop"])
    grid = "" if views["grid"] == [1, 1] else f", cut into {_size(views['grid'])} tiles"
    return f"""## Training

* data: `{data["name"]}` ({data["family"]} family), frames of {_size(info["frame"])} pixels, depth from {low:g} to {high:g} m
* views: {crop}, resized to {_size(views["canvas"])}{grid}; {_size(info.get("patches", info["grid"]))} patches a view
* recipe: `{recipe.name}`, {recipe.description or "see recipe.toml"}
* training: seed {recipe.train.seed}, at most {recipe.train.epochs} epochs
* encoder: `{_encoder_name(info)}`, frozen; SHA-256 of its weights {_encoder_digest(info)}"""


def _size(pair: Sequence[int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _encoder_digest(info: Mapping[str, Any]) -> str:
    digests = {str(column["encoder"]["weights"]["digest"]) for column in info["columns"].values() if "encoder" in column}
    return ", ".join(f"`{digest}`" for digest in sorted(digests))


def _scores(info: Mapping[str, Any], evaluations: _Evaluations) -> Iterator[str]:
    yield "## Scores"
    if not evaluations:
        yield "\nNot scored: the run holds no evaluation of this epoch."
        return
    note = f" ({', '.join(info['labels'])})" if info["labels"] else ""
    for document in evaluations.values():
        protocols = document["protocols"]
        yield f"\n`{document['cache']}`, split `{document['split']}`, {document['samples']} images{note}:\n"
        yield "| metric | " + " | ".join(protocols) + " |"
        yield "|---|" + "---:|" * len(protocols)
        for name in SHOWN:
            yield (
                f"| {_heading(name)} | "
                + " | ".join(_number(scores["metrics"].get(name)) for scores in protocols.values())
                + " |"
            )
        yield ""
        for label, scores in protocols.items():
            yield f"* `{label}`: {scores['description']}"
    yield "\nNumbers under different protocols cannot be compared with each other."


def _heading(name: str) -> str:
    metric = METRICS[name]
    arrow = {"lower": "lower is better", "higher": "higher is better", "zero": "zero is best"}[metric.better]
    return f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}, {arrow}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _limits(info: Mapping[str, Any], recipe: Recipe) -> str:
    return f"""## Limits

* The head works with depths {_range(recipe)}; sky and anything farther gets a number all the same.
* Every image is resized to {_size(info["views"]["canvas"])} whatever its aspect. The scale in metres is that of the cameras of
  training: another focal length or aspect shifts it.
* Depth is predicted per patch and interpolated between them: edges are as coarse as the patches.
* No measure of confidence has been calibrated. Not for uses in which a wrong distance can hurt somebody."""


def _files(info: Mapping[str, Any]) -> str:
    kinds = {
        "model.safetensors": "the head's weights",
        "encoder.safetensors": "the encoder's image weights",
        "run.json": "what determines the predictions, with the SHA-256 of the weights, which is checked when they are read",
        "recipe.toml": "the recipe of the training",
        "metrics.json": "the scores above and more, with the protocols as data",
    }
    present = {**info["bundle"]["files"], "run.json": None}
    return "\n".join(["## Files\n", *(f"* `{name}`: {text}" for name, text in kinds.items() if name in present)])
