"""Edit one fact in a language model and see what it did: before/after table, perplexity, verdict on collapse.

`python single_case_edit.py --help` has the flags; the code is easyeditor/commands/single_case_edit.py.
"""

from easyeditor.commands.cli import run
from easyeditor.commands.single_case_edit import main

if __name__ == "__main__":
    run(main)
