"""``storylab sample``."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from storylab.cli.arguments import CheckpointName, RunFolder
from storylab.cli.registry import Call, Verb
from storylab.errors import UserError

MOST_SAMPLES = 10_000


@dataclass(frozen=True)
class SampleCommand:
    """Write stories with the model of a run, or an imported one.

    Examples: storylab sample runs/a | storylab sample runs/a --prompt "Tom had a dog" --samples 4
    """

    run: RunFolder
    """Run folder, or folder of an imported model."""
    prompt: str = "Once upon a time there was a little"
    """Beginning of the stories; if it is empty or <|endoftext|>, the model begins them."""
    samples: int = 1
    """Number of stories, written in one batch; the first one is shown as it grows."""
    max_new_tokens: int = 256
    """Longest continuation, in tokens."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many of the most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the draws."""
    checkpoint: CheckpointName = "last"
    """The newest weights, or those with the best validation loss."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def run(call: Call) -> int:
    """Write stories."""
    command = call.parse(SampleCommand)
    if command.samples > MOST_SAMPLES:
        raise UserError(f"samples is {command.samples}: it must be at most {MOST_SAMPLES:,}")
    from storylab.imported.folder import open_story_model
    from storylab.model.generate import Sampling
    from storylab.training.sampling import as_in_stories

    sampling = Sampling(command.temperature, command.top_k, command.top_p, command.seed)
    model = open_story_model(command.run, command.checkpoint, command.device)
    prompt = as_in_stories(command.prompt)
    if command.prompt.endswith(" "):
        print(
            "storylab: the space at the end of the prompt is left out: in stories it belongs to the word "
            "after it",
            file=sys.stderr,
        )
    stream = model.stream(prompt, sampling, command.max_new_tokens, command.samples)
    _print_stories(prompt, stream, command.samples)
    return 0


def _print_stories(prompt: str, stream: Iterable[list[bytes]], samples: int) -> None:
    """Print the first story while it grows, then the others.

    Characters may span tokens, so each story has its own decoder.
    """
    from storylab.training.log_format import printable

    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(samples)]
    stories = [prompt] * samples
    print(printable(prompt), end="", flush=True)
    for pieces in stream:
        new = [d.decode(piece) for d, piece in zip(decoders, pieces, strict=True)]
        stories = [story + text for story, text in zip(stories, new, strict=True)]
        print(printable(new[0]), end="", flush=True)
    print()
    for story in stories[1:]:
        print(f"\n---\n\n{printable(story)}")


VERB = Verb(
    "sample",
    "write stories with a model",
    "runs",
    run,
    SampleCommand,
    position=5,
    memory_remedy="take fewer --samples, or a machine with more memory",
)
