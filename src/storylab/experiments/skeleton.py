"""The text of a new experiment file."""

from __future__ import annotations

import json

from storylab.decode import is_unicode
from storylab.errors import UserError
from storylab.experiments.factors import FACTORS

SKELETON = """\
title = {title}
purpose = "What do you want to know?"
factor = "learning_rate"          # a field of `storylab train --help`, or: {factors}
baseline = "1e-3"
seeds = [1337, 1338, 1339]        # each seed is one pair of runs: same weights, same data order
looks = [3, 5, 8]                 # verdicts are made with so many seeds; --seeds 8 trains them look by look

[data]
source = "builtin"                # tinystories, or builtin to try this without a download
tokenizer = "bpe:1024"

[config]                          # shared by all arms; other flags keep their defaults
preset = "nano"
max_iters = 300
batch_size = 32
gradient_accumulation_steps = 1
warmup_iters = 30
learning_rate = 1e-3
min_lr = 0.0
eval_interval = 50
eval_iters = 2

[arms]                            # the changes of each arm
"1e-3" = {{ learning_rate = 1e-3 }}
"3e-3" = {{ learning_rate = 3e-3 }}
"""


def skeleton(title: str) -> str:
    """The text of a new experiment file, which runs without an edit.

    Raises:
        UserError: no file can have the title.
    """
    if not title.strip():
        raise UserError("the title is empty: give a line of text")
    if not is_unicode(title):
        raise UserError("the title is not UTF-8 text: write it again")
    # A JSON string is a TOML string, except for one control character that JSON does not escape.
    quoted = json.dumps(title, ensure_ascii=False).replace("\x7f", "\\u007f")
    return SKELETON.format(title=quoted, factors=", ".join(FACTORS))
