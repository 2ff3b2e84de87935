"""The record's command: python train_tinystories.py --dtype bfloat16 --max_iters 1000"""

import sys

from storylab.cli import guarded, train_command

if __name__ == "__main__":
    prog = "python train_tinystories.py"
    sys.exit(guarded(lambda: train_command(sys.argv[1:], prog)))
