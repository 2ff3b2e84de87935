"""The command of the original log: python train_tinystories.py --dtype bfloat16 --max_iters 1000"""

import sys

try:
    from storylab.cli import run_verb
except ModuleNotFoundError as error:
    print(
        f"storylab: {error}: install first (make demo does), then: source .venv/bin/activate",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:], prog="python train_tinystories.py"))
