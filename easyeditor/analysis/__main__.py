"""`python -m easyeditor.analysis`: the command in commands/analysis.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.analysis", run_name="__main__", alter_sys=True)
