"""The built-in corpus: simple stories from a small grammar, deterministic by seed.

It exists so that the first run needs no download. A story picks a hero, a place, a thing and one
of several plots, and words every step in one of several ways, so that nearly all stories differ
and a model has names, pronouns, places and causes to keep track of. It is not English prose: its
vocabulary is about five hundred words and its plots are six, so losses on it are far lower than on
TinyStories and say nothing about them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


NAMES = {
    "she": _words(
        "Lily Mia Anna Sara Zoe Nora Ella Ruth Ivy Clara Lucy Molly Emma Daisy Sue Kate Jane Rosie "
        "Amy Tina Betty Grace Hannah Julia Lola Maya Penny Ruby Wendy Holly"
    ),
    "he": _words(
        "Tom Ben Max Sam Leo Jack Finn Otto Hugo Paul Tim Bob Fred Billy Charlie Danny Eric George "
        "Henry Ian Joe Kevin Luke Mark Nick Oscar Peter Rob Simon Toby"
    ),
}
PRONOUNS = {"she": ("She", "her", "her"), "he": ("He", "him", "his")}
ANIMALS = _words(
    "dog cat rabbit duck bear fox mouse frog horse goat cow pig sheep bird squirrel turtle lion "
    "monkey bee hen deer wolf puppy kitten snail"
)
ADJECTIVES = _words(
    "little happy kind brave shy clever curious quiet funny gentle playful cheerful polite silly "
    "young friendly lazy busy careful hungry"
)
PLACES = _words(
    "park forest garden beach farm market school hill river yard lake field bridge village castle "
    "playground meadow barn harbor library"
)
THINGS = _words(
    "ball kite boat book cake hat drum doll bell lamp cup box truck train robot puzzle crown scarf "
    "basket bucket blanket flute pencil bottle mirror balloon shovel jacket wagon whistle"
)
COLORS = _words("red blue green yellow pink white golden purple brown black gray silver")
SIZES = _words("big small tiny huge round plain new shiny soft long heavy pretty strange bright")
WEATHER = _words("sunny rainy windy cold warm snowy cloudy foggy hot stormy")
FAMILY = _words("mom dad grandma grandpa sister brother aunt uncle cousin mother father")
FEELINGS = _words("happy proud glad excited calm thankful cheerful merry safe pleased")
SORROWS = _words("sad scared worried upset lonely angry nervous tired hurt confused")
FOODS = _words(
    "apples cookies soup bread berries pie cheese honey carrots rice nuts grapes pancakes corn "
    "oranges pears noodles muffins"
)
HIDING = _phrases(
    "under a bush, behind a tree, in a hole, on a roof, under a bench, in the mud, behind a rock, "
    "in the tall grass, under a bed, inside a barrel, on a branch, behind the door"
)
LESSONS = _phrases(
    "it is good to share, friends help each other, it is fine to ask for help, "
    "being kind makes everyone happy, it is best to tell the truth, trying again is worth it, "
    "a small friend can be a great help, it is smart to be careful, saying sorry makes things better"
)

OPENINGS = (
    "Once upon a time there was a {adjective} {kind} named {hero}.",
    "One day, a {adjective} {kind} named {hero} went to the {place}.",
    "There once was a {kind} called {hero}. {They} was very {adjective}.",
    "{hero} was a {adjective} {kind} who lived near the {place}.",
    "It was a {weather} day. {hero}, a {adjective} {kind}, was at the {place}.",
)
HABITS = (
    "{They} loved to play with {their} {size} {color} {thing}.",
    "Every day {they} took {their} {color} {thing} to the {place}.",
    "{Their} {family} had given {them} a {size} {thing}, and {they} loved it.",
    "{They} had a {color} {thing} and liked to show it to {their} {family}.",
)
FRIENDS = (
    "There {they} met a {animal} named {friend}.",
    "A {animal} called {friend} came by.",
    "Then {they} saw {their} friend {friend}, the {animal}.",
)
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # something is lost and found
        (
            "But the {thing} was gone! {hero} looked and looked.",
            "One {weather} morning {they} could not find the {thing}.",
        ),
        (
            '{They} felt very {sorrow}. "Where is my {thing}?" {they} said.',
            '"Oh no, my {thing}!" cried {hero}. {They} was {sorrow}.',
        ),
        FRIENDS,
        (
            '"I will help you look," said {friend}.',
            '{friend} asked, "Why are you {sorrow}?" {hero} told {friend} about the {thing}.',
        ),
        (
            "They looked all over the {place}. At last they found it {hiding}.",
            "{friend} had a good nose and found the {thing} {hiding}.",
        ),
    ),
    (  # two want the same thing and share it
        FRIENDS,
        (
            "{friend} wanted to play with the {thing} too.",
            '"May I have the {thing}?" asked {friend}.',
        ),
        (
            '"No, it is mine!" said {hero}. {friend} was {sorrow} and went away.',
            "{hero} did not want to share. Soon {they} was alone and {sorrow}.",
        ),
        (
            '{Their} {family} said, "You can play together."',
            "{hero} thought about it and ran after {friend}.",
        ),
        (
            '"I am sorry," said {hero}. "Let us play with the {thing} together."',
            "{They} gave the {thing} to {friend}, and they took turns.",
        ),
    ),
    (  # something breaks and is mended
        (
            "The {weather} wind took the {thing}, and it fell on a rock.",
            "{hero} ran too fast and dropped the {thing}.",
        ),
        (
            "The {thing} broke. {hero} was {sorrow} and began to cry.",
            "Crack! Now the {color} {thing} had a hole, and {hero} was {sorrow}.",
        ),
        (
            "{They} did not know what to tell {their} {family}.",
            '"What will my {family} say?" {they} thought.',
        ),
        (
            '{They} told the truth. "Thank you for telling me," said {their} {family}.',
            '"Do not be {sorrow}," said {their} {family}. "We can fix it."',
        ),
        (
            "They fixed the {thing} together, and it was as good as new.",
            "With some string and some paint the {thing} was {color} and whole again.",
        ),
    ),
    (  # someone is hungry and is fed
        FRIENDS,
        (
            "{friend} was {sorrow} because there was nothing to eat.",
            '"I am so hungry," said {friend}.',
        ),
        (
            "{hero} had some {food} in {their} bag.",
            "{hero} ran home and asked {their} {family} for {food}.",
        ),
        (
            '"Here, have some {food}," said {hero}.',
            "{They} gave half of the {food} to {friend}.",
        ),
        (
            "{friend} ate it all up and smiled. Then they played with the {thing}.",
            'They ate the {food} in the {place}. "Yum!" said {friend}.',
        ),
    ),
    (  # something is hard and is learned
        (
            "{hero} wanted to climb the tall tree at the {place}.",
            "{hero} wanted to learn to swim in the water near the {place}.",
            "{hero} wanted to ride the {size} bike at the {place}.",
        ),
        (
            "{They} tried once and fell down. {They} tried again and fell again.",
            "It was too hard, and {they} was {sorrow}.",
        ),
        FRIENDS,
        (
            '"Go slowly," said {friend}, "and do not look down."',
            "{friend} showed {them} how to do it, step by step.",
        ),
        (
            '{hero} tried once more. "I did it!" {they} said.',
            "{They} tried every day. One {weather} day, {they} could do it.",
        ),
    ),
    (  # someone is lost and is brought home
        (
            "One day {they} walked far from the {place}. It got dark.",
            "{They} ran after a butterfly and did not know the way back.",
        ),
        (
            "{hero} was {sorrow}. Everything looked {size} and strange.",
            '"I want my {family}," said {hero}, and {they} was {sorrow}.',
        ),
        FRIENDS,
        (
            '"Follow me," said {friend}. "I know the way."',
            "{friend} held up a {color} lamp, and they walked slowly.",
        ),
        (
            "They walked past the {place} until {hero} saw {their} home.",
            "{Their} {family} was waiting at the door and gave {them} a big hug.",
        ),
    ),
)
ENDINGS = (
    "{hero} was very {feeling}.",
    "From that day on, {hero} and {their} {family} were {feeling}.",
    '"Thank you," said {hero}. {They} felt {feeling}.',
    "{hero} went home and told {their} {family} all about it. {They} was {feeling}.",
)
MORALS = ("{hero} learned that {lesson}.", "And so {they} knew that {lesson}.", "The end.", "")


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    # random() is the one method whose sequence Python promises to keep across versions.
    return options[int(rng.random() * len(options))]


def story(seed: int, index: int) -> str:
    """Story number ``index`` of the corpus with this seed."""
    rng = random.Random(f"storylab builtin 1, {seed}, {index}")
    gender = _pick(rng, ("she", "he"))
    hero = _pick(rng, NAMES[gender])
    friend = hero
    while friend == hero:
        friend = _pick(rng, NAMES["she"] + NAMES["he"])
    subject, them, their = PRONOUNS[gender]
    words = {
        "hero": hero,
        "friend": friend,
        "They": subject,
        "they": subject.lower(),
        "them": them,
        "their": their,
        "Their": their.capitalize(),
        "kind": _pick(rng, ({"she": "girl", "he": "boy"}[gender], *ANIMALS)),
        "adjective": _pick(rng, ADJECTIVES),
        "place": _pick(rng, PLACES),
        "thing": _pick(rng, THINGS),
        "color": _pick(rng, COLORS),
        "size": _pick(rng, SIZES),
        "weather": _pick(rng, WEATHER),
        "family": _pick(rng, FAMILY),
        "animal": _pick(rng, ANIMALS),
        "feeling": _pick(rng, FEELINGS),
        "sorrow": _pick(rng, SORROWS),
        "food": _pick(rng, FOODS),
        "hiding": _pick(rng, HIDING),
        "lesson": _pick(rng, LESSONS),
    }
    plot = PLOTS[int(rng.random() * len(PLOTS))]
    parts = (OPENINGS, HABITS, *plot, ENDINGS, MORALS)
    sentences = [_pick(rng, options).format_map(words) for options in parts]
    beginning, middle, end = sentences[:2], sentences[2:-2], sentences[-2:]
    paragraphs = (" ".join(s for s in part if s) for part in (beginning, middle, end))
    return "\n\n".join(paragraphs)


def stories(seed: int, first: int, count: int) -> Iterator[str]:
    """Stories number ``first`` to ``first + count - 1``."""
    for index in range(first, first + count):
        yield story(seed, index)
