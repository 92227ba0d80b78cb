"""`python -m easyeditor.trainer`: the command in commands/convert.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.convert", run_name="__main__", alter_sys=True)
