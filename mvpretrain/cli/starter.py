"""The text of a starter recipe: what was found in shards as settings, with a comment on every line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mvpretrain.data.guess import Guess, ViewGuess

STEPS = 1000  # about so many make a first run


class Line(NamedTuple):
    depth: int
    text: str
    comment: str


VIEW = {  # what a key of a view's settings is, by the kind of view or for all
    "kind": "how the bytes become numbers; others: `mvpretrain recipe schema`",
    "field": "what follows the key in the tar; of a;b the first that is there",
    "missing": "whole shards lack it; such samples train with their other views",
    "tower": "both views go through this encoder",
    "augment": "random changes in training, none in evaluation",
    "normalize": "measured, by channel, of pixels from 0 to 1",
    "image.size": "side of the square; an encoder of kind timm or openclip wants 224",
    "image.channels": "1 is grey, 3 is colour",
    "audio.rate": "samples a second after resampling",
    "audio.seconds": "of each recording; longer ones are cut, a random piece in training",
    "audio.window": "samples of one spectrum, 25 ms",
    "audio.hop": "samples from one spectrum to the next, 10 ms",
    "audio.mels": "frequency bands; channels of its encoder",
    "text.tokenizer": "a token a byte; or openclip:MODEL, huggingface:FOLDER",
    "text.length": "tokens, begin and end included; longer text is cut",
    "text.lines": "each line is a text of its own; training draws one",
    "text.key": "of the JSON object",
    "series.channels": "numbers at each step",
    "series.length": "steps; longer series are cut, shorter ones padded",
    "series.time_first": "the array is `steps channels`",
    "vector.dim": "numbers of the array, laid flat",
    "vector.mean": "measured; is subtracted",
    "vector.std": "measured; is divided by",
}
ENCODER = {
    "conv.kind": "a small network for small images; others: resnet timm openclip",
    "transformer.kind": "a small transformer over tokens; others: openclip huggingface",
    "series.kind": "convolutions, then a small transformer, over time",
    "mlp.kind": "a small network for vectors",
    "channels": "as the view has them",
    "width": "numbers in its hidden layers; larger learns more and takes longer",
    "stages": "each halves the side and doubles the width",
    "depth": "blocks",
    "heads": "of attention; they divide the width",
    "length": "as the view has it",
    "input": "numbers, as the view has them",
    "strides": "convolutions before the transformer, and by how much each shortens the series",
}


def starter(guess: Guess, run: str, command: str, name: str, cache: Path | None = None) -> str:
    """The recipe, as YAML: `run` is the folder of the run, `command` what wrote it, `name` the file it is kept in.

    What comes from the shards stands in values as YAML escapes it, or in comments, from which line breaks are taken.
    """
    head = [
        f"# {guess.train_samples + guess.eval_samples:,} samples. A start, of which every line may change, by",
        f"#   {one_line(command)}",
        f"#   mvpretrain train {name} --dry-run     what it would be, and whether it fits into memory",
        f"#   mvpretrain train {name}               one process; or the same under torchrun, accelerate or deepspeed",
        f"#   mvpretrain recipe show {name}         every setting there is, with its default",
        *(f"# Not a view: {one_line(field)}: {one_line(why)}." for field, why in guess.others.items()),
    ]
    lines = [*data(guess, run, cache), *views(guess.views), *towers(guess.views), *training(guess)]
    column = min(60, max(2 * line.depth + len(line.text) for line in lines)) + 2
    body = [f"{'  ' * line.depth + line.text + '  ':<{column}}# {one_line(line.comment)}" for line in lines]
    return "\n".join([*head, *body]) + "\n"


def one_line(text: str) -> str:
    return " ".join(text.split())


def scalar(value: Any) -> str:
    """A value on one line, as YAML reads it."""
    return yaml.safe_dump(
        [value], default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    ).strip()[1:-1]


def entries(depth: int, settings: Mapping[str, Any], comments: Mapping[str, str], kind: str = "") -> Iterator[Line]:
    for key, value in settings.items():
        yield Line(depth, f"{key}: {scalar(value)}", comments.get(f"{kind}.{key}") or comments[key])


def data(guess: Guess, run: str, cache: Path | None) -> Iterator[Line]:
    yield Line(0, f"run: {scalar(run)}", "folder of the run: log, checkpoints, and this recipe with its defaults")
    yield Line(0, "data:", "where samples come from")
    yield Line(1, "kind: shards", "WebDataset tars")
    yield Line(1, f"train: {scalar(one_or_all(guess.train))}", f"{guess.train_samples:,} samples")
    if guess.eval:
        comment = f"{guess.eval_samples:,} samples that are held out; scores are of these"
        yield Line(1, f"eval: {scalar(one_or_all(guess.eval))}", comment)
    else:
        yield Line(1, "eval: null", "no scores without held-out shards: pack two shards or more, and name one here")
    if guess.label:
        yield Line(
            1, f"label: {scalar(guess.label)}", "integer classes, for scores by class and probes; training reads none"
        )
    if guess.ids != "unique":
        what = "keys repeat between shards" if guess.ids == "shard" else "keys repeat; equal ones are positives"
        yield Line(1, f"ids: {guess.ids}", what)
    if cache:
        yield Line(1, f"cache: {scalar(str(cache))}", "folder that remote shards are copied to")


def one_or_all(urls: list[str]) -> Any:
    return urls[0] if len(urls) == 1 else urls


def views(found: list[ViewGuess]) -> Iterator[Line]:
    yield Line(0, "views:", "what is compared with what: each view of a sample with its others")
    for view in found:
        yield Line(1, f"{scalar(view.name)}:", f"{view.samples:,} samples have it; {view.measured}")
        yield from entries(2, view.settings, VIEW, view.settings["kind"])


def towers(found: list[ViewGuess]) -> Iterator[Line]:
    yield Line(0, "towers:", "an encoder and its projection head for each view")
    for name, encoder in {view.settings.get("tower", view.name): view.encoder for view in found}.items():
        yield Line(1, f"{scalar(name)}:", "views share a tower by views.NAME.tower")
        yield Line(2, "encoder:", "what is exported")
        yield from entries(3, encoder, ENCODER, encoder["kind"])
        yield Line(2, "head: {layers: 2}", "from the encoder to the shared space; 1 is linear")


def training(guess: Guess) -> Iterator[Line]:
    batch = 2 ** int(math.log2(min(256, max(8, guess.train_samples / 8))))
    epochs = min(100, max(1, round(STEPS * batch / guess.train_samples)))
    steps = math.ceil(epochs * guess.train_samples / batch)
    lone = len({view.settings.get("tower", view.name) for view in guess.views}) < len(guess.views)
    yield Line(0, "dim: 64", "numbers of an embedding, the same for all views")
    yield Line(0, "objective:", "what is learnt; others: `mvpretrain recipe schema`")
    yield Line(1, "kind: infonce", "a sample's views are alike, those of different samples are not")
    yield Line(1, "temperature: {init: 0.1}", "small ones look at the hardest negatives; learnt")
    if lone:
        yield Line(1, "in_view: true", "other samples of the same view are negatives too, as in SimCLR")
    yield Line(0, f"batch: {batch}", "samples a step over all processes; larger ones have more negatives")
    yield Line(0, f"epochs: {epochs}", f"about {steps:,} steps; or say steps: N")
    yield Line(0, "optimizer: {kind: adamw, lr: 0.001, weight_decay: 0.05}", "lower lr where the loss is not finite")
    yield Line(0, f"schedule: {{kind: cosine, warmup: {max(1, steps // 20)}}}", "steps to the full rate, then down")
