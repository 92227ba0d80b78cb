"""`python -m easyeditor.tune`: the command in commands/tune.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.tune", run_name="__main__", alter_sys=True)
