"""Edit every request of a dataset, probe perplexity after each edit, and end with the list of collapses.

`python mass_edit.py --help` has the flags; the code is easyeditor/commands/mass_edit.py.
"""

from easyeditor.commands.cli import run
from easyeditor.commands.mass_edit import main

if __name__ == "__main__":
    run(main)
