"""`python -m easyeditor.stats`: the command in commands/stats.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.stats", run_name="__main__", alter_sys=True)
