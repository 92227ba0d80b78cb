"""`python -m easyeditor.report`: the command in commands/report.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.report", run_name="__main__", alter_sys=True)
