"""Train MEND's hypernetwork: it learns to turn the gradient of one fact into an edit of that fact alone.

`python pretrain_mend.py --help` has the flags; the code is easyeditor/commands/pretrain_mend.py.
"""

from easyeditor.commands.cli import run
from easyeditor.commands.pretrain_mend import main

if __name__ == "__main__":
    run(main)
