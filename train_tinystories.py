"""The record's command: python train_tinystories.py --dtype bfloat16 --max_iters 1000"""

import sys

try:
    from storylab.cli import guarded, train_command
except ModuleNotFoundError as error:
    print(
        f"storylab: {error}: install first (make demo does), then: source .venv/bin/activate",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    prog = "python train_tinystories.py"
    sys.exit(guarded(lambda: train_command(sys.argv[1:], prog)))
