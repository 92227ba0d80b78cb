"""`python -m easyeditor.export`: the command in commands/export.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.export", run_name="__main__", alter_sys=True)
