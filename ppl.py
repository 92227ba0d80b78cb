"""Perplexity of a model on a set of sentences, as the model-editing papers measure it, and how it is spread.

`python ppl.py --help` has the flags; the code is easyeditor/commands/ppl.py.
"""

from easyeditor.commands.cli import run
from easyeditor.commands.ppl import main

if __name__ == "__main__":
    run(main)
