"""`python -m easyeditor.evaluate`: the command in commands/evaluate.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.evaluate", run_name="__main__", alter_sys=True)
