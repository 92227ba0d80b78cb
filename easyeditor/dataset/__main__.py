"""`python -m easyeditor.dataset`: the command in commands/dataset.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.dataset", run_name="__main__", alter_sys=True)
